"""Published figures of chips, and the names of slices of them."""

import math

import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.cost.chips import CHIPS, topology_of


def test_a_topology_names_a_chip_and_how_many():
    chip, along = topology_of("v5e:16x16")
    assert (chip.name, along, chip.platform) == ("v5e", (16, 16), "tpu")
    assert topology_of("v5p:4x4x8")[1] == (4, 4, 8)
    chip, along = topology_of("h100:8")
    assert (chip.platform, math.prod(along)) == ("cpu", 8)


@pytest.mark.parametrize("name", CHIPS)
def test_no_figure_is_off_by_a_unit(name):
    chip = CHIPS[name]
    assert 1e11 < chip.flops < 1e16
    assert 2**33 < chip.memory < 2**38
    # Memory is faster than links, and products than memory.
    assert chip.links < chip.bandwidth < chip.flops
    assert 0.9 * chip.memory < chip.usable < chip.memory


@pytest.mark.parametrize(
    ("text", "error"),
    [("v5e", BadInput), ("v5e:16", BadInput), ("v5e:0x4", BadInput),
     ("v5e:4x4x4x4", BadInput), ("v5x:4x4", UnknownName), ("V5E:4x4", BadInput)],
)  # fmt: skip
def test_what_is_no_topology_is_refused(text, error):
    with pytest.raises(error, match=f"mesh.topology = '{text}'"):
        topology_of(text)
