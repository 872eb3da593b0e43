"""Steps compiled by libtpu for slices that are not here; without it, failures."""

import functools

import pytest
from tiny_run import composed

from lowrank.core.errors import BadInput
from lowrank.run.rehearsal import rehearse

pytestmark = pytest.mark.rehearsal

SMALL = (
    "base.source=shape:toy",
    "base.name=toy",
    "mesh=one",
    "mesh.small=0",
    "rehearse.rows=16",
    "rehearse.length=64",
    "delta.targets=decoder/**/kernel",
)


@functools.cache
def reported(*overrides):
    return rehearse(composed("rehearse", *SMALL, *overrides))


def sent(report, what):
    return sum(row["bytes"] for row in report["exchanges"] if row["moves"] == what)


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5e:2x4", ("mesh.fsdp=8",)),
        ("v5e:4x4", ("mesh.fsdp=4", "mesh.tensor=4")),
        ("v5p:2x2x2", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")),
        ("v6e:2x4", ("mesh.fsdp=8",)),
    ],
)
def test_a_step_is_compiled_for_a_slice(topology, axes):
    report = reported(f"mesh.topology={topology}", *axes)
    assert report["fits"]
    assert "libtpu" in report["versions"]["compiler"]
    assert sent(report, "base") > 0
    assert report["gathers"]["layers_at_once"] == 1
    assert report["unbounded_loops"] == 0


def test_what_is_said_about_the_correction_grows_with_it():
    rows = ("mesh.topology=v5e:2x4", "mesh.data=8")
    four, eight = (reported(*rows, f"delta.rank={n}") for n in (4, 8))
    assert sent(four, "base") == 0
    ratio = sent(eight, "gradients") / sent(four, "gradients")
    assert ratio == pytest.approx(2, rel=0.1)


def test_full_fine_tuning_holds_and_says_more():
    own = ("mesh.topology=v5e:2x4", "mesh.fsdp=8")
    lora = reported(*own, "delta.rank=1")
    full = rehearse(composed("rehearse", *SMALL[:-1], *own, "delta=full"))
    assert full["bytes_per_chip"]["optimizer"] > 3 * lora["bytes_per_chip"]["optimizer"]
    assert sent(full, "gradients") > 3 * sent(lora, "gradients")


def test_a_step_that_does_not_fit_says_so():
    # 2**22 rows of 64 tokens of 32 numbers: more than a chip holds.
    report = reported(
        "mesh.topology=v5e:2x2", "mesh.data=4", f"rehearse.rows={2**22}",
        "base.remat=none",
    )  # fmt: skip
    assert report["fits"] is False


def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(BadInput, match="v5e:3x5 is no slice that libtpu knows"):
        reported("mesh.topology=v5e:3x5", "mesh.fsdp=15")
