"""The flat vector is the gates, laid end to end, and bad layouts are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import equal, layout

from lowrank.allocate.slots import Competitor, Slots
from lowrank.core.errors import BadInput, UnknownName


def gates_of(slots, rng):
    return {
        one.path: jnp.asarray(rng.normal(size=(*one.stack, one.max_rank)), jnp.float32)
        for one in slots.competitors
    }


def test_parts_undo_flat_and_every_layer_is_one():
    slots = layout()
    parts = gates_of(slots, np.random.default_rng(0))
    flat = jax.jit(slots.flat)(parts)
    assert flat.shape == (3 * 4 + 3 + 0 + 4 * 2,) == (slots.num_components,)
    back = jax.jit(slots.parts)(flat)
    assert {*back} == {*parts}
    for path, part in parts.items():
        np.testing.assert_array_equal(back[path], part)
    # Layer 1 of the stack is the second row of its gates.
    np.testing.assert_array_equal(flat[slots.layer == 1], parts["enc/q"][1])
    assert slots.names == (
        "enc/q[0]", "enc/q[1]", "enc/q[2]", "head", "off[0]", "off[1]",
        "moe[0,0]", "moe[0,1]", "moe[1,0]", "moe[1,1]",
    )  # fmt: skip
    np.testing.assert_array_equal(slots.position[:5], [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(slots.cost, [10] * 3 + [7] + [5] * 2 + [4] * 4)


def test_ranks_are_counted_layer_by_layer_under_vmap():
    slots = layout()
    gates = np.random.default_rng(1).integers(0, 2, (5, slots.num_components))
    found = jax.vmap(slots.open_ranks)(jnp.asarray(gates, jnp.float32))
    for own, row in zip(found, gates, strict=True):
        by_hand = [row[slots.layer == i].sum() for i in range(slots.num_layers)]
        np.testing.assert_array_equal(own, by_hand)
    np.testing.assert_array_equal(
        slots.open_ranks(slots.prefix(slots.ranks)), slots.ranks
    )
    assert slots.spent(slots.ranks, "components") == 6 + 1 + 4
    assert slots.spent(slots.ranks, "parameters") == 60 + 7 + 16


def test_a_shape_that_does_not_fit_is_named():
    slots = layout()
    parts = gates_of(slots, np.random.default_rng(0))
    with pytest.raises(BadInput, match="'head' has 3 components"):
        slots.flat({**parts, "head": jnp.zeros(4)})
    with pytest.raises(BadInput, match="'head' competes"):
        slots.flat({path: x for path, x in parts.items() if path != "head"})


def test_ranks_by_name_are_complete_and_known():
    slots = layout()
    given = {"enc/q[0]": 4, "enc/q[1]": 0, "enc/q[2]": 1, "head": 3, "off": 0, "moe": 2}
    ranks = slots.from_names(given)
    np.testing.assert_array_equal(ranks, [4, 0, 1, 3, 0, 0, 2, 2, 2, 2])
    assert slots.from_names(slots.named(ranks)).tolist() == ranks.tolist()
    with pytest.raises(UnknownName, match=r"'enc/q\[3\]'.*Nearest: 'enc/q\["):
        slots.from_names({**given, "enc/q[3]": 1})
    with pytest.raises(BadInput, match="no rank is given for 'head'"):
        slots.from_names({k: v for k, v in given.items() if k != "head"})
    with pytest.raises(BadInput, match=r"'moe\[0,1\]' is given twice"):
        slots.from_names({**given, "moe[0,1]": 1})
    with pytest.raises(BadInput, match="'head' has rank 4, which is not between"):
        slots.from_names({**given, "head": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least": 3, "most": 2}, "minimum 3, maximum 2"),
        ({"most": 5}, "maximum 5"),
        ({"least": -1}, "minimum -1"),
        ({"most": 5}, "maximum 5 and max_rank 4, .* 0 <= minimum <= maximum <= max_r"),
        ({"ranks": 5}, "rank 5"),
        ({"ranks": (1, 2)}, "ranks holds 2 numbers"),
        ({"names": ("a", "b")}, "2 names"),
        ({"max_rank": -1, "ranks": 0, "most": 0}, "max_rank -1"),
        ({"cost": 0}, "cost 0"),
        ({"stack": (0,)}, "stack"),
    ],
)
def test_numbers_of_a_site_are_checked(changes, message):
    with pytest.raises(BadInput, match=message):
        Slots(
            [
                Competitor(
                    **{"path": "w", "max_rank": 4, "cost": 8, "ranks": 2} | changes
                )
            ]
        )


def test_names_are_unique():
    one = Competitor(path="w", max_rank=4, cost=8, ranks=2)
    with pytest.raises(BadInput, match="two layers that compete are called 'w'"):
        Slots([one, one])


def tied(*leasts, most=4):
    return Slots(
        [
            Competitor(
                path=f"t{i}", max_rank=4, cost=8, ranks=2, stack=(2,), group="g",
                least=low, most=most,
            )
            for i, low in enumerate(leasts)
        ]
    )  # fmt: skip


def test_layers_of_equal_place_are_tied():
    slots = tied(0, 1)
    assert slots.group.tolist() == [0, 1, 0, 1]
    assert slots.price("components").tolist() == [2, 2]
    assert slots.price("parameters").tolist() == [16, 16]
    least, most = slots.group_bounds(slots.least, slots.most)
    assert (least.tolist(), most.tolist()) == ([1, 1], [4, 4])
    with pytest.raises(BadInput, match=r"t0\[0\], t1\[0\] are tied"):
        slots.from_names({"t0[0]": 1, "t0[1]": 2, "t1[0]": 2, "t1[1]": 2})


def test_ties_that_cannot_hold_are_refused():
    sites = [
        Competitor(path="a", max_rank=4, cost=8, ranks=2, group="g", most=2),
        Competitor(path="b", max_rank=4, cost=8, ranks=3, group="g", least=3),
    ]
    with pytest.raises(BadInput, match="a, b cannot: the largest minimum is 3"):
        Slots(sites)


@pytest.mark.parametrize("budget", [2, 13])
def test_a_budget_out_of_reach_is_refused(budget):
    slots = equal(3, least=1)
    with pytest.raises(BadInput, match=rf"= {budget} components.* take 3, .* 12"):
        slots.check_budget(budget, "components", "ranks.budget")
