"""A real adapted model under the loop: continued, poisoned, rolled back, improved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.core.errors import Preempted
from lowrank.sharding.mesh import MeshSpec, batch_shapes, place_batch, replicate
from lowrank.train import state as states
from lowrank.train.guard import NonFinitePolicy
from lowrank.train.loop import Events, Loop, LoopSpec, fresh
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import Pack
from lowrank.train.step import make_step

STEPS, TRIALS = 10, 2
OPTIMS = [AdamW(lr=0.1), AdamW(lr=0.05, label_smoothing=0.1)]


class Data:
    """The same few batches again and again; one of them may be poisoned."""

    num_steps = STEPS

    def __init__(self, bad=None):
        self.bad = bad

    def at(self, position):
        one = toy.stack([toy.batch(10 * t + position % 3) for t in range(TRIALS)])
        if position == self.bad:
            one["weight"][0, 0] = np.nan
        return one

    def iterate(self, start_step=0):
        for position in range(start_step, STEPS):
            yield position, self.at(position)


class World:
    """A compiled pack with dropout, and what is saved and logged around it."""

    def __init__(self):
        mesh = MeshSpec().build()
        self.adapted = toy.make(dropout=0.2)
        step = make_step(
            toy.model_of(self.adapted), cross_entropy, OPTIMS[0], STEPS, draws=True
        )
        dials = self.adapted.dials()
        begun = states.start(self.adapted.init_trained, dials, OPTIMS, [3, 4])
        self.begun = replicate(begun, mesh)
        self.saved, self.logged = [], []
        shapes = [batch_shapes(Data().at(0), mesh, 1)]
        self.pack = Pack(
            step, replicate(self.adapted.frozen(), mesh), self.start(), shapes,
            lambda batch: place_batch(batch, mesh, 1), TRIALS, mesh,
        )  # fmt: skip

    def start(self):
        return jax.tree.map(jnp.copy, self.begun)

    def save(self, position, state, memory):
        self.saved.append((position, jax.tree.map(jnp.copy, state), memory))

    def restore(self):
        _, state, memory = self.saved[-1]
        return jax.tree.map(jnp.copy, state), memory

    def events(self):
        return Events(
            log=lambda position, rows: self.logged.append((position, rows)),
            save=self.save,
            restore=self.restore,
            evaluate=None,
            timed=lambda shape, seconds: None,
            progress=lambda position, total, text: None,
        )

    def run(self, state=None, memory=None, bad=None, policy=None, **settings):
        self.saved, self.logged = [], []
        settings = {"log_every": 3, "checkpoint_every": 4, **settings}
        loop = Loop(
            self.pack, Data(bad), self.events(), LoopSpec(**settings),
            policy or NonFinitePolicy(), STEPS,
        )  # fmt: skip
        state = self.start() if state is None else state
        state, self.memory = loop.run(state, memory or fresh(TRIALS))
        return state


@pytest.fixture(scope="module")
def world():
    return World()


def plain(state):
    """Bits of every leaf; keys as their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    bits = lambda x: jax.random.key_data(x) if is_key(x) else x
    return [np.asarray(bits(x)) for x in jax.tree.leaves(state)]


def assert_same(one, two):
    for a, b in zip(plain(one), plain(two), strict=True):
        np.testing.assert_array_equal(a, b)


def by_hand(world, positions, bad=None):
    state = world.start()
    for position in positions:
        state, _ = world.pack(state, Data(bad).at(position))
    return state


def test_training_lowers_the_loss_of_every_trial(world):
    world.run()
    first, last = world.logged[0][1], world.logged[-1][1]
    for trial in range(TRIALS):
        assert last[trial]["train/loss"] < 0.9 * first[trial]["train/loss"]
        assert {"train/accuracy", "train/lr", "train/grad_norm"} <= set(last[trial])


@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_continued_run_is_bit_identical(world, stop_after):
    expected = world.run()
    log = world.logged
    with pytest.raises(Preempted):
        world.run(stop_after=stop_after)
    before = world.logged
    _, state, memory = world.saved[-1]
    assert_same(world.run(state, memory), expected)
    assert before + world.logged == log


def test_halt_ends_one_trial_and_harms_no_other(world):
    clean = world.run()
    log = [(position, rows[1]) for position, rows in world.logged]
    state = world.run(bad=5)
    assert [bool(one) for one in world.memory["ended"]] == [True, False]
    for mixed, alone in zip(plain(state.trained), plain(clean.trained), strict=True):
        np.testing.assert_array_equal(mixed[1], alone[1])
    assert [(p, rows[1]) for p, rows in world.logged if rows[1]] == log
    # Batch 5 was bad and 6 was on its way when that was known; then it stood still.
    expected = by_hand(world, range(7), bad=5)
    for held, moved in zip(plain(state.opt), plain(expected.opt), strict=True):
        np.testing.assert_array_equal(held[0], moved[0])
    assert state.live.tolist() == [False, True]
    np.testing.assert_array_equal(state.skipped, [1, 0])


def test_skip_harms_neither_the_trial_nor_its_neighbor(world):
    state = world.run(bad=5, policy=NonFinitePolicy(action="skip"))
    np.testing.assert_array_equal(state.skipped, [1, 0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trained))
    clean = world.run()
    for mixed, alone in zip(plain(state.trained), plain(clean.trained), strict=True):
        np.testing.assert_array_equal(mixed[1], alone[1])
        assert not np.array_equal(mixed[0], alone[0])


def test_rollback_continues_from_the_checkpoint_behind_the_bad_batch(world):
    state = world.run(bad=5, policy=NonFinitePolicy(action="rollback"))
    # Saved at 4; 5 is bad, and 6 was on its way when that was known.
    expected = by_hand(world, [0, 1, 2, 3, 7, 8, 9])
    assert_same(state.trained, expected.trained)
    assert_same(state.opt, expected.opt)
    np.testing.assert_array_equal(state.skipped, [0, 0])
    assert world.saved[-1][2]["position"] == STEPS


def test_the_state_is_donated_and_the_base_is_not(world):
    state = world.start()
    leaves = [state.trained["head"], state.best["head"], state.step]
    world.pack(state, Data().at(0))
    assert [leaf.is_deleted() for leaf in leaves] == [True, True, True]
    # A donated base would live on where no output fits its buffer: ask the program.
    for program in world.pack.compiled.values():
        (frozen, after, batch), _ = program.args_info
        donated = lambda tree: {leaf.donated for leaf in jax.tree.leaves(tree)}
        assert donated(after) == {True}
        assert donated(frozen) == donated(batch) == {False}


def test_nothing_is_compiled_while_training(world):
    state, _ = world.pack(world.start(), Data().at(0))
    compiled = []
    listen = lambda name, *rest, **more: compiled.append(name)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for position in range(1, 5):
            state, _ = world.pack(state, Data().at(position))
        jax.block_until_ready(state)
        during = [name for name in compiled if "compile" in name]
        jax.jit(lambda x: x * 17 + position)(jnp.ones(3))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not during
    assert any("compile" in name for name in compiled), "the listener must be heard"
