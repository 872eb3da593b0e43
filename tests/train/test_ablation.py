"""Leaving components out one by one: by hand, in a run, and what it may choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_probes import CONSTANTS, disturbed
from test_ranks import HELD, LAYERS, RANK, WINDOW, World, best, make

from lowrank.allocate.adaptive import Adaptive
from lowrank.train.ablation import ablation
from lowrank.train.losses import cross_entropy

pytestmark = pytest.mark.long

TOTAL = LAYERS * HELD + HELD


def by_hand(adapted, frozen, trained, dials, batch):
    """The rise of the mean loss without each component, one call each."""
    model = toy.model_of(adapted)

    def loss(gates):
        own = {p: {**dials[p], "gate": jnp.array(gate)} for p, gate in gates.items()}
        sums = cross_entropy(
            model(frozen, trained, batch, dials=own, key=None), batch, CONSTANTS
        )
        return float(sums.loss / sums.weight)

    gates = {path: np.array(own["gate"]) for path, own in dials.items()}
    whole, found = loss(gates), []
    for path in ("stack", "up"):
        for at in np.ndindex(gates[path].shape):
            less = {name: gate.copy() for name, gate in gates.items()}
            less[path][at] = 0
            found.append(loss(less) - whole)
    return np.array(found)


def test_it_is_what_the_loss_would_be_without():
    adapted = make()
    frozen, trained = adapted.init(jax.random.key(0))
    trained, batch = disturbed(trained), toy.on_device(toy.batch(3))
    dials = adapted.dials()
    run = jax.jit(ablation(toy.model_of(adapted), cross_entropy))
    found = run(frozen, trained, dials, CONSTANTS, batch)["ablation"]
    flat = np.concatenate([np.asarray(found[p]).reshape(-1) for p in ("stack", "up")])
    expected = by_hand(adapted, frozen, trained, dials, batch)
    # Differences of losses near one, in float32: six digits of the loss.
    np.testing.assert_allclose(flat, expected, atol=3e-6)
    is_open = expected != 0
    assert is_open.sum() == RANK * (LAYERS + 1), "the shut ones cost nothing"
    assert np.abs(expected[is_open]).min() > 3e-5, "far above what is tolerated"


@pytest.mark.slow
def test_a_run_keeps_what_the_loss_needs():
    # Every second step is measured, and an event goes by the latest measurement.
    fields = {**WINDOW, "importance": "ablation"}
    world = World(Adaptive(**fields), Adaptive(**{**fields, "begin": 4}))
    adapted = world.adapted
    gates, latest = np.ones((2, TOTAL)), np.zeros((2, TOTAL))
    alone = jax.jit(ablation(toy.model_of(adapted), cross_entropy))
    for at, before, after, _ in world.states():
        for trial in range(2):
            constants = world.constants(trial)
            if constants["due"][at]:
                budget = int(constants["budget"][at])
                gates[trial] = best(np.maximum(latest[trial], 0), gates[trial], budget)
            np.testing.assert_array_equal(world.flat(after, trial), gates[trial])
            if at % 2 == 0 and at < 17:
                one = lambda tree, t=trial: jax.tree.map(lambda x: x[t], tree)
                found = alone(
                    world.frozen, one(before.trained), one(after.dials),
                    one(before.constants), one(world.batch(at)),
                )["ablation"]  # fmt: skip
                latest[trial] = np.concatenate(
                    [np.asarray(found[p]).reshape(-1) for p in ("stack", "up")]
                )
    assert gates.sum(axis=1).tolist() == [RANK * (LAYERS + 1)] * 2
    assert world.traced == 1
