"""Early ends: what a policy decides, what it says, and who keeps the signals."""

import gc
import os
import signal
import sys
import threading
import time

import pytest

from lowrank.core.errors import NON_FINITE, PREEMPTED, BadInput, NonFinite, Preempted
from lowrank.train.guard import NonFinitePolicy, StopSignal, interruptible


def test_halt_is_the_default_and_names_step_trial_and_remedy():
    with pytest.raises(NonFinite) as raised:
        NonFinitePolicy().decide(17, 2, 0)
    text = str(raised.value)
    for part in ("step 17", "trial 2", "optim.lr", "non_finite.action"):
        assert part in text
    assert raised.value.exit_code == NON_FINITE == 77


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_an_action_is_taken_exactly_limit_times(action):
    policy = NonFinitePolicy(action=action, limit=2)
    assert [policy.decide(5, 0, seen) for seen in (0, 1)] == [action, action]
    with pytest.raises(NonFinite, match="2 before it"):
        policy.decide(5, 0, 2)


def test_a_limit_below_one_is_refused():
    with pytest.raises(BadInput, match="limit"):
        NonFinitePolicy(limit=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_only_noted(number):
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name


def test_outside_the_main_thread_the_handlers_stay():
    before, found = signal.getsignal(signal.SIGTERM), []

    def inside():
        with StopSignal():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as raised, StopSignal():
        raise Preempted("stopped")
    assert signal.getsignal(signal.SIGTERM) == before
    assert raised.value.exit_code == PREEMPTED == 75


def in_the_collector(act):
    """Calls `act` where Python lets no exception out."""

    def callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(callback)
            act()
            time.sleep(0)  # Where a handler runs.

    gc.callbacks.append(callback)
    gc.collect()


def lose_a_stop():
    """Has the collector swallow a SIGTERM."""
    in_the_collector(lambda: os.kill(os.getpid(), signal.SIGTERM))


def lose_a_stop_and_wait():
    lose_a_stop()
    wait(lambda: False)


def wait(over):
    """Gives a repeat ten seconds to come."""
    end = time.monotonic() + 10
    while not over() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_stop_that_the_garbage_collector_swallows_comes_again():
    """jax hangs a callback on it: a signal that came there was lost for good."""
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(Preempted, match="SIGTERM"), interruptible():
        lose_a_stop_and_wait()
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_stop_lost_just_before_training_is_a_request_to_stop_there():
    with interruptible():
        lose_a_stop()
        with StopSignal() as stop:
            wait(lambda: stop.received)
    assert stop.received == "SIGTERM"


def test_what_else_is_swallowed_is_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with interruptible():
        in_the_collector(lambda: 1 / 0)
    assert [type(one.exc_value) for one in told] == [ZeroDivisionError]
