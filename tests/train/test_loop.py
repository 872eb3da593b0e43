"""The loop: late metrics, averages, best states, early stops, signals, bad numbers."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput, NonFinite, Preempted
from lowrank.train.guard import NonFinitePolicy, StopSignal
from lowrank.train.loop import Events, Loop, LoopSpec, fresh
from lowrank.train.state import TrainState

NUM_STEPS, PER_EPOCH = 12, 4


def begun():
    # Every leaf has a buffer of its own, since they are donated.
    return TrainState(
        step=jnp.int32(0),
        trained={"w": jnp.zeros(1)},
        opt=(),
        dials={},
        constants={},
        key=jnp.ones(1),
        best={"w": jnp.full(1, 2.0)},
        best_value=jnp.full(1, -1e9),
        best_step=jnp.array([-1]),
        skipped=jnp.zeros(1, jnp.int32),
        live=jnp.ones(1, bool),
        ranks={},
    )


class Data:
    """Batches whose only content is their position."""

    num_steps = NUM_STEPS

    def iterate(self, start_step=0):
        for position in range(start_step, NUM_STEPS):
            yield position, {"ids": np.full((1, 2, 3), position)}


class World:
    """A pack that adds the position to its weights, and everything around it."""

    def __init__(self, bad=(), scores=None, during=None):
        self.bad, self.scores, self.during = set(bad), scores, during
        self.logged, self.saved, self.shapes, self.seen = [], [], [], []
        self.fetched = []

    def pack(self, state, batch):
        position = int(batch["ids"][0, 0, 0])
        self.seen.append(position)
        if self.during:
            self.during(position)
        finite = position not in self.bad
        weight = state.trained["w"] + state.live * (position if finite else 0)
        state = state.replace(step=state.step + 1, trained={"w": weight})
        loss = Late(float(position) if finite else np.nan, position, self.fetched)
        return state, {"loss": loss, "finite": np.array([finite])}

    def evaluate(self, state):
        return [{"accuracy": self.scores.pop(0), "position": float(state.step)}]

    def save(self, position, state, memory):
        # As a checkpoint does: a copy, since the next step takes the buffers.
        self.saved.append((position, jax.tree.map(jnp.copy, state), memory))

    def events(self):
        return Events(
            log=lambda position, rows: self.logged.append((position, rows[0])),
            save=self.save,
            restore=lambda: self.saved[-1][1:],
            evaluate=self.evaluate if self.scores is not None else None,
            timed=lambda shape, seconds: self.shapes.append(shape),
            progress=lambda position, total, text: None,
        )  # fmt: skip

    def run(self, state=None, memory=None, policy=None, **settings):
        state = state or begun()
        loop = Loop(
            self.pack, Data(), self.events(), LoopSpec(**settings),
            policy or NonFinitePolicy(), PER_EPOCH,
        )  # fmt: skip
        state, self.memory = loop.run(state, memory or fresh(len(state.live)))
        return state


class Late:
    """A metric that notes when it is fetched."""

    def __init__(self, value, position, fetched):
        self.value, self.position, self.fetched = value, position, fetched

    def __array__(self, dtype=None, copy=None):
        self.fetched.append(self.position)
        return np.array([self.value])


def test_metrics_are_read_while_the_next_step_runs():
    world = World()
    waiting = []
    world.during = lambda position: waiting.append(position - len(world.fetched))
    world.run(checkpoint_every=1000, log_every=1000)
    # When step n starts, the metrics of n - 1 are still on the device.
    assert waiting == [0] + [1] * (NUM_STEPS - 1)


def test_logged_values_are_averages_over_their_window():
    world = World()
    world.run(log_every=4, checkpoint_every=1000)
    found = [(position, row["train/loss"]) for position, row in world.logged]
    assert found == [(4, 1.5), (8, 5.5), (12, 9.5)]


def test_the_best_validated_state_is_kept():
    world = World(scores=[0.5, 0.9, 0.7])
    state = world.run(log_every=1000)
    assert float(state.best["w"][0]) == sum(range(8))
    assert int(state.best_step[0]) == 8
    assert float(state.trained["w"][0]) == sum(range(12))
    assert [p for p, _, _ in world.saved] == [4, 8, 12]


def test_no_new_best_stops_early():
    world = World(scores=[0.5, 0.4, 0.4, 0.9])
    world.run(patience=1)
    assert world.seen == list(range(8))


def test_an_unknown_metric_to_select_by_is_refused():
    with pytest.raises(BadInput, match="accuracy"):
        World(scores=[0.5]).run(select="bleu")


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_a_run_continues_as_if_it_had_not_stopped(stop_after):
    whole = World(scores=[0.5, 0.9, 0.7])
    expected = whole.run(log_every=3)
    first = World(scores=[0.5, 0.9, 0.7])
    with pytest.raises(Preempted):
        first.run(log_every=3, stop_after=stop_after)
    _, state, memory = first.saved[-1]
    second = World(scores=first.scores)
    found = second.run(state, memory, log_every=3)
    assert first.seen + second.seen == whole.seen
    assert float(found.trained["w"][0]) == float(expected.trained["w"][0])
    assert float(found.best["w"][0]) == float(expected.best["w"][0])
    assert first.logged + second.logged == whole.logged


def test_a_finished_run_steps_no_more():
    world = World()
    state = world.run()
    again = World()
    again.run(state, world.saved[-1][2])
    assert not again.seen


def test_a_signal_saves_and_stops():
    def send(position):
        if position == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    world = World(during=send)
    with pytest.raises(Preempted, match="SIGTERM"):
        world.run(checkpoint_every=1000)
    assert world.saved[-1][0] == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import time\nfrom lowrank.train.guard import StopSignal\n"
        "with StopSignal():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 75
    child.stdout.close()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_halt_names_the_step_and_saves_nothing_bad():
    world = World(bad=[6])
    with pytest.raises(NonFinite, match="step 6"):
        world.run(checkpoint_every=4)
    assert [p for p, _, _ in world.saved] == [4]


def test_skip_goes_on_up_to_its_limit():
    world = World(bad=[2, 6])
    policy = NonFinitePolicy(action="skip", limit=2)
    state = world.run(policy=policy)
    assert float(state.trained["w"][0]) == sum(range(12)) - 8
    with pytest.raises(NonFinite, match="2 before it"):
        World(bad=[2, 6, 7]).run(policy=policy)


def test_rollback_returns_to_the_last_state_and_jumps_over_the_batches():
    world = World(bad=[6])
    policy = NonFinitePolicy(action="rollback", limit=1)
    state = world.run(policy=policy, checkpoint_every=4)
    # Steps 4 and 5 are taken back, 6 is bad; 7 had begun when that was known.
    assert float(state.trained["w"][0]) == sum([0, 1, 2, 3, *range(8, 12)])
    assert world.seen == list(range(12))


@pytest.mark.parametrize("field", ["log_every", "checkpoint_every", "patience"])
def test_intervals_out_of_range_are_refused(field):
    with pytest.raises(BadInput, match=field):
        LoopSpec(**{field: 0})
