"""Bounds and ties: what patterns and names say of layers, and what they cannot."""

import pytest

from lowrank.allocate.slots import Competitor, Slots
from lowrank.core.errors import BadInput, UnknownName
from lowrank.run.bounds import Bounds, bounds

LAYERS = 3


def site(path, held=8, stack=(LAYERS,), most=None):
    names = tuple(f"{path}[{n}]" for n in range(LAYERS)) if stack else ()
    return Competitor(
        path=path, max_rank=held, cost=10, ranks=4, stack=stack, names=names, most=most
    )


SITES = [
    site("layer/query/kernel"),
    site("layer/value/kernel"),
    site("layer/up/kernel", most=(8, 0, 8)),
    site("out/kernel", stack=()),
]


def bounded(ranges=None, tied=None):
    found = bounds(ranges, tied).on(SITES)
    return {one.path.split("/")[-2]: one for one in found}, Slots(found)


def test_without_any_all_stays_as_it_is():
    assert bounds(None, None) == Bounds() == bounds({}, [])
    found, slots = bounded()
    assert [one.by_layer("least") for one in found.values()] == [(0,) * 3] * 3 + [(0,)]
    assert slots.num_groups == slots.num_layers


def test_the_first_pattern_that_covers_a_layer_counts():
    found, _ = bounded(
        {"layer[1]/query/kernel": [2, 3], "**/query/**": [1, None], "**": [None, 6]}
    )
    assert found["query"].least == (1, 2, 1)
    assert found["query"].most == (8, 3, 8)
    assert found["value"].least == (0, 0, 0)
    assert found["value"].most == (6, 6, 6)
    assert found["out"].most == (6,)


def test_a_frozen_layer_stays_frozen():
    found, _ = bounded({"**/up/**": [2, 5]})
    assert found["up"].least == (2, 0, 2)
    assert found["up"].most == (5, 0, 5)


def test_names_that_are_tied_join_layers_of_one_place():
    found, slots = bounded(tied=[["query", "value"]])
    assert found["query"].group == found["value"].group
    assert found["up"].group is None
    named = dict(zip(slots.names, slots.group.tolist(), strict=True))
    for layer in range(LAYERS):
        both = {named[f"layer/{n}/kernel[{layer}]"] for n in ("query", "value")}
        assert len(both) == 1
    assert slots.num_groups == slots.num_layers - LAYERS


@pytest.mark.parametrize(
    ("ranges", "tied", "error", "said"),
    [
        ({"**/qery/**": [1, 2]}, None, UnknownName, "query"),
        ({"**": [0, 8], "**/query/**": [1, 2]}, None, BadInput, "before it"),
        ({"**/query/**": [0, 9]}, None, BadInput, "holds 8"),
        ({"layer[3]/query/**": [1, 2]}, None, BadInput, "beyond a stack of 3"),
        ({"**/query/**": [9, None]}, None, BadInput, "holds 8"),
        (None, [["query", "vale"]], UnknownName, "value"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(ranges, tied, error, said):
    with pytest.raises(error, match=said):
        bounded(ranges, tied)


@pytest.mark.parametrize(
    ("ranges", "tied", "said"),
    [
        ([1, 2], None, "maps patterns"),
        ({"**": 3}, None, "smallest and the largest"),
        ({"**": [3, 1]}, None, "smallest and the largest"),
        ({"**": [True, 2]}, None, "smallest and the largest"),
        ({"**": [-1, 2]}, None, "smallest and the largest"),
        ({"": [1, 2]}, None, "a pattern has"),
        (None, "query,value", "list of lists"),
        (None, [["query"]], "two names or more"),
        (None, [["query", "value"], ["value", "key"]], "twice"),
    ],
)
def test_what_makes_no_sense_is_refused(ranges, tied, said):
    with pytest.raises(BadInput, match=said):
        bounds(ranges, tied)


def test_ties_and_bounds_that_contradict_are_refused():
    with pytest.raises(BadInput, match="tied layers get equal ranks"):
        bounded({"**/query/**": [5, 8], "**/value/**": [0, 4]}, [["query", "value"]])
