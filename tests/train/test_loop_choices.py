"""What the loop picks and when: smallest is best, several trials, the last step."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import NUM_STEPS, World, fresh

from lowrank.core.errors import Preempted
from lowrank.train.guard import NonFinitePolicy


def test_of_a_loss_the_smallest_is_the_best():
    world = World(scores=[0.7, 0.2, 0.5])
    events = dataclasses.replace(
        world.events(), lower_is_better=frozenset({"accuracy"})
    )
    world.events = lambda: events
    assert int(world.run().best_step[0]) == 8


def test_patience_waits_for_every_trial():
    class Two(World):
        def evaluate(self, state):
            return [{"accuracy": v} for v in self.scores.pop(0)]

    world = Two(scores=[(0.5, 0.1), (0.4, 0.2), (0.4, 0.3)])
    pair = fresh().replace(
        trained={"w": jnp.zeros(2)}, best={"w": jnp.zeros(2)},
        best_value=jnp.full(2, -1e9), best_step=jnp.array([-1, -1]),
    )  # fmt: skip
    state = world.run(pair, patience=1)
    assert len(world.seen) == NUM_STEPS
    np.testing.assert_array_equal(state.best_step, [4, 12])
    np.testing.assert_array_equal(state.best["w"], [sum(range(4)), sum(range(12))])


def test_validation_comes_as_often_as_it_was_asked_for():
    world = World(scores=[0.1, 0.2, 0.3, 0.4, 0.5])
    world.run(evaluate_every=5, checkpoint_every=1000)
    positions = [p for p, row in world.logged if "validation/accuracy" in row]
    # The end is validated too, though five does not divide it.
    assert positions == [5, 10, 12]


@pytest.mark.parametrize("bad", [NUM_STEPS - 2, NUM_STEPS - 1])
def test_a_rollback_at_the_end_still_ends_validated_and_saved(bad):
    world = World(bad=[bad], scores=[0.1, 0.2, 0.3])
    state = world.run(policy=NonFinitePolicy(action="rollback"))
    assert float(state.trained["w"][0]) == sum(range(8))
    assert not world.scores
    assert world.saved[-1][0] == NUM_STEPS
    assert world.saved[-1][2]["position"] == NUM_STEPS


@pytest.mark.parametrize(("bad", "before"), [([3], 1), ([4], 0), ([2, 3], 2)])
def test_no_checkpoint_holds_an_unread_bad_step(bad, before):
    world = World(bad=bad)
    world.run(policy=NonFinitePolicy(action="skip", limit=3), checkpoint_every=4)
    counts = {position: memory["bad_steps"] for position, _, memory in world.saved}
    assert counts == {4: before, 8: len(bad), 12: len(bad)}


def test_a_rehearsed_stop_at_the_end_is_an_end():
    world = World()
    world.run(stop_after=NUM_STEPS)
    assert len(world.seen) == NUM_STEPS


def test_what_was_saved_does_not_change_as_the_run_goes_on():
    world = World()
    world.run(log_every=4, checkpoint_every=2)
    lengths = {position: len(m["window"]) for position, _, m in world.saved}
    assert lengths == {2: 2, 4: 0, 6: 2, 8: 0, 10: 2, 12: 0}


def test_what_was_saved_does_not_change_in_a_run_that_continues_it():
    world = World()
    with pytest.raises(Preempted):
        world.run(stop_after=5, log_every=4, checkpoint_every=1000)
    _, state, memory = world.saved[-1]
    kept = [dict(row) for row in memory["window"]]
    assert [row["loss"] for row in kept] == [[4.0]]
    World().run(state, memory, log_every=4)
    assert memory["window"] == kept
    assert memory["position"] == 5
