"""What a group `ranks` holds room for, counts, and refuses before there is a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank
from lowrank.allocate.recipes import EVA, AdaLoRA, Fisher, Growth
from lowrank.core.errors import BadInput
from lowrank.deltas.triplet import Triplet
from lowrank.run.ranks import begun, slots_of
from lowrank.run.ranks_group import Ranks

WIDE, NARROW = 6, 4


@pytest.mark.parametrize(
    ("allocator", "held"),
    [
        (Fisher(), 8),
        (Growth(), 8),
        (EVA(), 8),
        # Otherwise a layer could not have what `rho` says.
        (EVA(rho=4.0), 16),
        (EVA(rho=2.2), 9),
        (EVA(rho=1.5), 8),
        # No event ever opens more than the first budget.
        (AdaLoRA(), 6),
        (AdaLoRA(start=1.3), 6),
        (AdaLoRA(start=3.0), 8),
        (AdaLoRA(budget=10), 8),
    ],
)
def test_layers_hold_what_may_ever_be_open(allocator, held):
    assert Ranks(allocator).held(4) == held
    assert Ranks(allocator, max_rank=5).held(4) == 5
    assert Ranks().held(4) is None


def adapted(delta, apply=None, params=None):
    params = params or {
        "up": jnp.ones((WIDE, NARROW)), "down": jnp.ones((NARROW, WIDE)),
    }  # fmt: skip
    apply = apply or (lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])
    rules = [lowrank.Rule("**", delta, rank=2, max_rank=3)]
    return lowrank.attach(apply, params, jnp.ones((5, WIDE)), rules=rules)


@pytest.mark.parametrize(
    ("delta", "each"),
    [(lowrank.LoRA(), WIDE + NARROW), (Triplet(), WIDE + NARROW + 1)],
)
def test_a_component_costs_all_of_its_parameters(delta, each):
    model = adapted(delta)
    np.testing.assert_array_equal(slots_of(model).cost, [each, each])
    shapes = jax.tree.leaves(model.trained_shapes())
    assert sum(x.size for x in shapes) == 2 * 3 * each


def test_inputs_of_a_table_or_of_both_sides_cannot_be_measured():
    fisher = Fisher(importance="activation", begin=1, end=3, every=1, measure_every=1)
    begin = lambda model: begun(model, [fisher], None, None, 5, {})
    assert begin(adapted(lowrank.LoRA()))[0] is not None
    table = adapted(
        lowrank.LoRA(),
        lambda p, x: p["table"][jnp.zeros(5, int)] + 0 * x,
        {"table": jnp.ones((9, WIDE))},
    )
    with pytest.raises(BadInput, match="'table' is used by gather"):
        begin(table)
    tied = adapted(
        lowrank.LoRA(), lambda p, x: x @ p["w"] @ p["w"].T, {"w": jnp.ones((WIDE, 9))}
    )
    with pytest.raises(BadInput, match="'w' is used by products on both of its sides"):
        begin(tied)
