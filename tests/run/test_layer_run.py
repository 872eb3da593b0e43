"""A rank per layer of a scanned base, from the command line to the adapter."""

import json

import numpy as np
import pytest
from tiny_hf import SPEC
from tiny_run import SMALL, composed, metric_rows

from lowrank.core.trees import flatten
from lowrank.io.peft import read_adapter
from lowrank.run.door import unquoted_keys
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

ARGUMENT = 'delta.ranks={"**/layer[0]/**": 0, "**/layer[-1]/**/{up,down}/kernel": 6}'
ATTENTION, MLP = [0, 3, 3], [0, 3, 6]
UP = "encoder/layer/mlp/up/kernel"


def config(world, *overrides):
    given = world.overrides("delta.rank=3", unquoted_keys(ARGUMENT), *overrides)
    return composed("config", *SMALL, *given)


@pytest.fixture(scope="module")
def layered(world):
    directory = world.runs / "layered"
    weights = ["penalty.frobenius=1e-4", "penalty.norm_cap=0.05"]
    return directory, run_trial(config(world, f"run.directory={directory}", *weights))


def test_the_record_tells_the_rank_of_every_layer(layered):
    directory, result = layered
    rows = {r["path"]: r for r in json.loads((directory / "sites.json").read_text())}
    assert rows[UP]["ranks"] == MLP
    assert rows[UP]["rank"] == 6
    assert rows["encoder/layer/attention/query/kernel"]["ranks"] == ATTENTION
    # Open components only, and those of every layer.
    assert rows[UP]["parameters"] == sum(MLP) * (SPEC.d_model + SPEC.d_ff)
    with np.load(directory / "ranks.npz") as ranks:
        assert ranks[UP.replace("/", ".")].tolist() == MLP
    costs = result["costs"]
    factors = sum(row["parameters"] for row in rows.values())
    head = 3 * (SPEC.d_model + 1)
    assert costs["trained_parameters"] == factors + head
    assert costs["adapter_bytes"] == 4 * (factors + head)
    held = 4 * 3 * 2 * SPEC.d_model * 3 + 2 * 3 * (SPEC.d_model + SPEC.d_ff) * 6
    assert costs["padding_parameters"] == held - factors


def test_penalties_of_a_config_are_felt_and_told(layered):
    directory, _ = layered
    rows = [row for row in metric_rows(directory) if "train/loss" in row]
    assert all(row["train/penalty/frobenius"] > 0 for row in rows)
    run = load_run(directory)
    merged, _ = flatten(run.adapted.merge(run.adapted.frozen(), run.trained, run.dials))
    before, _ = flatten(run.base.params)
    norms = lambda tree: np.linalg.norm(np.asarray(tree), axis=(-2, -1))
    ratios = [
        norms(np.asarray(merged[path]) - before[path]) / norms(before[path])
        for path in run.adapted.sites
    ]
    # What the merged weight is rounded to.
    assert np.concatenate(ratios).max() == pytest.approx(0.05, rel=1e-3)


def test_the_adapter_holds_what_is_open(layered):
    directory, result = layered
    adapter = read_adapter(directory / "adapter")
    assert not [name for name in adapter.corrections if ".layer.0." in name]
    ranks = {name: one.rank for name, one in adapter.corrections.items()}
    assert ranks["bert.encoder.layer.1.intermediate.dense"] == 3
    assert ranks["bert.encoder.layer.2.intermediate.dense"] == 6
    assert ranks["bert.encoder.layer.2.attention.self.query"] == 3
    # The scale is alpha over the usual rank: `ranks` do not change it.
    scales = [one.scale for one in adapter.corrections.values()]
    np.testing.assert_allclose(scales, 16 / 3, rtol=1e-7)
    factors = sum(one.a.size + one.b.size for one in adapter.corrections.values())
    whole = sum(array.size for array in adapter.whole.values())
    assert factors + whole == result["costs"]["trained_parameters"]


def test_the_run_opens_again_and_frozen_layers_are_the_base(layered):
    directory, _ = layered
    run = load_run(directory)
    assert predict(run, ["red word1 word2"])[0]["label"] in run.classes
    merged = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    before = run.base.params["encoder"]["layer"]["mlp"]["up"]["kernel"]
    after = merged["encoder"]["layer"]["mlp"]["up"]["kernel"]
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, True]
    assert not np.asarray(run.dials[UP]["gate"])[0].any()


def test_the_order_of_ranks_is_part_of_the_trial(world):
    def named(*overrides):
        return read(composed("config", *SMALL, *world.overrides(*overrides))).trial_id

    assert named() == named("delta.ranks={}")
    ranks = ("a:1,b:2", "b:2,a:1", "a:2,b:2")
    names = {named(f"delta.ranks={{{one}}}") for one in ranks}
    assert len({named(), *names}) == 4


def test_a_preview_shows_the_ranks(world):
    shown = run_trial(config(world, "run.preview=true"))
    rows = {row["path"]: row for row in shown["sites"]}
    assert shown["ranks"] is None
    assert rows[UP]["ranks"] == MLP
    # What is computed: every layer at the site's largest rank.
    assert rows[UP]["flops"] == pytest.approx(
        rows["encoder/layer/mlp/down/kernel"]["flops"]
    )


@pytest.mark.slow
def test_a_preview_tells_how_ranks_would_move(world):
    shown = run_trial(world.config("run.preview=true", "ranks=fisher"))["ranks"]
    assert shown["budget_at_start"] == 2 * shown["budget_at_end"] == 144
    assert shown["budget_at_end"] < shown["average_forward_budget"] < 144
    assert [*shown["signals"]] == ["gate_fisher", "norms", "spectrum"]
    assert "the step's own pass" in shown["signals"]["gate_fisher"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ('x={"a/*[0:3]/**": 4}', {"a/*[0:3]/**": 4}),
        (
            "delta.ranks={'a/{b,c}': 4, \"**/d[::2]\" : 0}",
            {"a/{b,c}": 4, "**/d[::2]": 0},
        ),
        ("x={plain: 2}", {"plain": 2}),
    ],
)
def test_patterns_are_keys_on_the_command_line(argument, expected):
    given = unquoted_keys(argument.replace("x=", "delta.ranks="))
    assert composed("config", given)["delta"]["ranks"] == expected


@pytest.mark.parametrize("argument", ["seed=1", "delta.targets='{a,b}: c'", "-m"])
def test_other_arguments_stay_as_they_are(argument):
    assert unquoted_keys(argument) == argument
