"""A step for devices that are not here: what it holds, says, and why it may not fit."""

import functools
import importlib.util
import json

import pytest
from jax.experimental import topologies
from tiny_run import composed

from experiments.rehearse import run
from lowrank.core.errors import BadInput, UnknownName
from lowrank.cost.chips import topology_of
from lowrank.report.rehearsal import advice, markdown
from lowrank.run.rehearsal import devices_of, rehearse
from lowrank.run.rehearsal_search import search

SMALL = (
    "base.source=shape:toy",
    "base.name=toy",
    "base.dtype=float32",
    "mesh=one",
    "mesh.topology=cpu:8",
    "mesh.small=0",
    "rehearse.rows=16",
    "rehearse.length=8",
    "delta.targets=decoder/**/kernel",
)
BOTH = ("mesh.fsdp=2", "mesh.tensor=4")


def config(*overrides):
    return composed("rehearse", *SMALL, *overrides)


@functools.cache
def reported(*overrides):
    return rehearse(config(*overrides))


def sent(report, what):
    return sum(row["bytes"] for row in report["exchanges"] if row["moves"] == what)


def test_every_device_holds_its_part_and_the_report_is_plain_data():
    whole = reported("mesh.topology=cpu:1")
    split = reported(*BOTH)
    json.dumps(split, allow_nan=False)
    assert split["mesh"] == {"trial": 1, "data": 1, "fsdp": 2, "tensor": 4}
    # All but the norms is split by eight: 5 vectors of 32 numbers.
    norms = 4 * 32 * (2 * 2 + 1)
    base = whole["bytes_per_chip"]["base"]
    assert split["bytes_per_chip"]["base"] == (base - norms) // 8 + norms
    for name in ("factors", "optimizer"):
        assert split["bytes_per_chip"][name] < 0.6 * whole["bytes_per_chip"][name]
    assert split["fits"]
    assert whole["exchanges"] == []
    assert whole["flops"] == split["flops"]


def test_the_base_is_gathered_layer_by_layer_and_has_no_gradient():
    report = reported("mesh.fsdp=8")
    assert sent(report, "base") > 0
    assert report["gathers"]["layers_at_once"] == 1
    kinds = {row["kind"] for row in report["exchanges"] if row["moves"] == "base"}
    assert kinds <= {"all-gather", "collective-permute", "all-to-all"}


def test_the_head_is_not_gathered_for_every_piece_of_its_logits(monkeypatch):
    gathers = lambda report: sum(
        row["times"] for row in report["exchanges"] if row["moves"] == "base"
    )
    whole = reported(*BOTH)
    # One place of every row at a time: eight pieces.
    monkeypatch.setattr("lowrank.io.shapes.MOST_LOGITS", 1)
    pieces = rehearse(config(*BOTH))
    # Once for all logits, and once for all slopes.
    assert gathers(pieces) <= gathers(whole) + 1
    assert pieces["flops"] == whole["flops"]


def test_what_is_said_about_the_correction_grows_with_it():
    four, eight = (reported("mesh.data=8", f"delta.rank={n}") for n in (4, 8))
    assert sent(four, "base") == 0
    ratio = sent(eight, "gradients") / sent(four, "gradients")
    assert ratio == pytest.approx(2, rel=0.02)
    moved = 2 * 7 / 8 * 4 * eight["parameters"]["trained"]
    assert sent(eight, "gradients") == pytest.approx(moved, rel=0.05)


def test_full_fine_tuning_holds_and_says_more():
    lora = reported("mesh.fsdp=8", "delta.rank=1")
    full = rehearse(composed("rehearse", *SMALL[:-1], "mesh.fsdp=8", "delta=full"))
    assert full["bytes_per_chip"]["optimizer"] > 3 * lora["bytes_per_chip"]["optimizer"]
    assert sent(full, "gradients") > 3 * sent(lora, "gradients")


def test_a_pack_holds_one_base():
    one = reported("mesh.fsdp=2", "mesh.topology=cpu:2")
    pack = reported("mesh.fsdp=2", "mesh.topology=cpu:2", "rehearse.trials=3")
    assert pack["bytes_per_chip"]["base"] == one["bytes_per_chip"]["base"]
    assert pack["bytes_per_chip"]["factors"] == 3 * one["bytes_per_chip"]["factors"]
    assert pack["flops"] == pytest.approx(3 * one["flops"])


def test_an_encoder_is_rehearsed_with_its_weights(world):
    own = (f"base.source={world.base}", "base.pooling=mean", "base.remat=none")
    report = reported(*own, "mesh.data=8", "delta.targets=encoder/**/kernel")
    assert sent(report, "gradients") > 0


def test_a_search_tells_the_best_of_what_it_compiled():
    found = search(config("rehearse.tries=2", "mesh.topology=cpu:4"))
    assert found["candidates"] > 20
    assert len(found["tried"]) == 2
    assert all(one["devices"] == 4 for one in found["tried"])
    seconds = [one["estimate"]["one_after_another"] for one in found["tried"]]
    assert seconds == sorted(seconds)


def test_the_door_writes_and_prints_json(tmp_path, capsys):
    out = tmp_path / "found.json"
    own = ("rehearse.format=json", f"rehearse.out={out}", *BOTH)
    run(config(*own), ["delta.rank=8"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["command"] == "python -m experiments.rehearse delta.rank=8"
    run(config(*BOTH), [])
    # Lines break anywhere.
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("base", "optimizer", "all-gather", "an estimate, no measurement"):
        assert word in shown


def test_a_table_has_a_row_for_each_and_says_what_does_not_fit():
    report = reported(*BOTH)
    poor = {
        **report, "fits": False, "why": "Used 2G of 1G", "exchanges": None,
        "estimate": None, "remat": "none",
    }  # fmt: skip
    lines = markdown([report, poor]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    said = " ".join(advice(poor))
    assert "It does not fit. Used 2G of 1G" in said
    assert "base.remat=full" in said
    assert "optim.accumulate=2" in said
    assert advice(report) == []


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["mesh.topology=null"], BadInput, "there is none: choose a mesh with one"),
        (["mesh.topology=v5e-256"], BadInput, "names a chip and how many there are"),
        (["mesh.topology=v9:4x4"], UnknownName, "names the chip 'v9'. Nearest:"),
        (["mesh.topology=v5p:4x4"], BadInput, "topologies of v5p have 3 axes, as v5p:"),
        (["mesh.topology=cpu:64"], BadInput, "set JAX_NUM_CPU_DEVICES=64"),
        (["mesh.fsdp=16"], BadInput, "mesh.fsdp = 16, but there are 8 cpu devices"),
        (["mesh.fsdp=4"], BadInput, "has 8 devices, and the axes of mesh take 4, fsdp"),
        (
            [*BOTH, "rehearse.length=65"],
            BadInput,
            "rehearse.length = 65 is more than 64, the longest input of toy",
        ),
        (
            [*BOTH, "base.source=shape:llama"],
            UnknownName,
            "no shape is called 'llama'. Nearest",
        ),
        ([*BOTH, "rehearse.rows=0"], BadInput, "rehearse.rows must be at least 1"),
        (["mesh.fsdp=8", "mesh.small=10000000"], BadInput, "splits none of the"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(overrides, error, said):
    with pytest.raises(error, match=said):
        rehearse(config(*overrides))


def test_without_libtpu_a_slice_is_refused_with_what_to_install(monkeypatch):
    """As where it is not installed, whether it is or not."""

    def missing(**asked):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'lowrank\[rehearse\]'"):
        devices_of(*topology_of("v5e:4x4"), "v5e:4x4")


def test_a_run_is_told_that_a_shape_has_no_weights(world):
    from lowrank.run.prepare import prepare
    from lowrank.run.settings import read

    with pytest.raises(BadInput, match="is a shape without weights, to be rehearsed"):
        prepare(read(world.config("base.source=shape:toy")))
