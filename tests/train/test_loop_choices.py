"""What the loop picks and when: smallest is best, several trials, the last step."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import NUM_STEPS, World, begun

from lowrank.core.errors import NonFinite, Preempted
from lowrank.train.guard import NonFinitePolicy


def test_of_a_loss_the_smallest_is_the_best():
    world = World(scores=[0.7, 0.2, 0.5])
    events = dataclasses.replace(
        world.events(), lower_is_better=frozenset({"accuracy"})
    )
    world.events = lambda: events
    assert int(world.run().best_step[0]) == 8


class Two(World):
    """Two trials; positions at which the second one's step is not finite."""

    def __init__(self, second=(), **given):
        super().__init__(**given)
        self.second = set(second)

    def start(self):
        return begun().replace(
            trained={"w": jnp.zeros(2)}, best={"w": jnp.zeros(2)},
            best_value=jnp.full(2, -1e9), best_step=jnp.array([-1, -1]),
            skipped=jnp.zeros(2, jnp.int32), live=jnp.ones(2, bool),
        )  # fmt: skip

    def pack(self, state, batch):
        state, _ = super().pack(state, batch)
        position = int(batch["ids"][0, 0, 0])
        finite = np.array([position not in self.bad, position not in self.second])
        return state, {"loss": np.full(2, float(position)), "finite": finite}

    def evaluate(self, state):
        return [{"accuracy": v} for v in self.scores.pop(0)]

    def events(self):
        log = lambda position, rows: self.logged.append((position, rows))
        return dataclasses.replace(super().events(), log=log)


def test_patience_stops_a_trial_and_leaves_the_others():
    world = Two(scores=[(0.5, 0.1), (0.4, 0.2), (0.4, 0.3)])
    state = world.run(world.start(), patience=1, log_every=4)
    assert len(world.seen) == NUM_STEPS
    np.testing.assert_array_equal(state.best_step, [4, 12])
    np.testing.assert_array_equal(state.best["w"], [sum(range(4)), sum(range(12))])
    # The first stands where it stopped, and nothing more is logged of it.
    np.testing.assert_array_equal(state.trained["w"], [sum(range(8)), sum(range(12))])
    first, second = world.memory["ended"]
    assert (first["step"], first["failed"], second) == (8, False, None)
    assert [bool(rows[0]) for p, rows in world.logged if p > 8] == [False, False]
    assert [bool(rows[1]) for p, rows in world.logged if p > 8] == [True, True]


def test_a_trial_that_is_not_finite_ends_alone():
    world = Two(second=[5])
    state = world.run(world.start(), log_every=4)
    assert len(world.seen) == NUM_STEPS
    assert state.live.tolist() == [True, False]
    first, second = world.memory["ended"]
    assert first is None
    assert second["failed"]
    assert "step 5" in second["why"]
    assert "trial 1" in second["why"]
    # Its neighbor is logged as if it were alone.
    alone = World()
    alone.run(log_every=4)
    assert [(p, rows[0]) for p, rows in world.logged if rows[0]] == alone.logged


def test_a_pack_without_a_trial_left_ends():
    world = Two(bad=[2], second=[5])
    with pytest.raises(NonFinite, match=r"step 5.*trial 1"):
        world.run(world.start())
    assert world.seen == list(range(7))


def test_a_trial_that_ended_well_is_kept_when_the_last_one_fails():
    world = Two(second=[9], scores=[(0.5, 0.1), (0.4, 0.2), (0.4, 0.3)])
    state = world.run(world.start(), patience=1)
    assert world.seen == list(range(11))
    assert [one["failed"] for one in world.memory["ended"]] == [False, True]
    assert state.best_step.tolist() == [4, 8]


def test_limits_count_each_trials_own_bad_steps():
    world = Two(bad=[1, 6], second=[3])
    state = world.run(world.start(), policy=NonFinitePolicy(action="skip", limit=1))
    assert world.memory["bad_steps"] == [2, 1]
    assert state.live.tolist() == [False, True]


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
    counts = {position: memory["bad_steps"][0] for position, _, memory in world.saved}
    assert counts == {4: before, 8: len(bad), 12: len(bad)}


def test_a_rehearsed_stop_at_the_end_is_an_end():
    world = World()
    world.run(stop_after=NUM_STEPS)
    assert len(world.seen) == NUM_STEPS


def test_what_was_saved_does_not_change_as_the_run_goes_on():
    world = World()
    world.run(log_every=4, checkpoint_every=2)
    lengths = {position: len(m["window"][0]) for position, _, m in world.saved}
    assert lengths == {2: 2, 4: 0, 6: 2, 8: 0, 10: 2, 12: 0}


def test_what_was_saved_does_not_change_in_a_run_that_continues_it():
    world = World()
    with pytest.raises(Preempted):
        world.run(stop_after=5, log_every=4, checkpoint_every=1000)
    _, state, memory = world.saved[-1]
    kept = [dict(row) for row in memory["window"][0]]
    assert [row["loss"] for row in kept] == [4.0]
    World().run(state, memory, log_every=4)
    assert memory["window"] == [kept]
    assert memory["position"] == 5
