"""Steps compiled by libtpu for slices that are not here; without it, failures."""

import functools
import itertools

import numpy as np
import pytest
from tiny_run import composed

from lowrank.core.errors import BadInput
from lowrank.cost.chips import topology_of
from lowrank.run.rehearsal import devices_of, rehearse
from lowrank.sharding.mesh import MeshSpec

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


def test_neighbors_along_an_axis_have_wires_between_them():
    devices = devices_of(*topology_of("v5e:8x8"), "v5e:8x8")
    (grid,) = MeshSpec(fsdp=8, tensor=8).build(devices).devices
    for line in (*grid, *grid.T):
        for one, other in itertools.pairwise(line):
            steps = [abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)]
            # One step along one axis, or from one end of it around to the other.
            assert sum(min(n, 8 - n) for n in steps) == 1
    first = np.array([one.coords for one in devices[:8]])
    assert (first[-1] - first[0]).sum() != 7, "they come in this order: no test"


def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(BadInput, match="v5e:3x5 is no slice that libtpu knows"):
        reported("mesh.topology=v5e:3x5", "mesh.fsdp=15")
