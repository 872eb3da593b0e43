"""Early ends: what a policy decides, what it says, and who keeps the signals."""

import os
import signal
import threading

import pytest

from lowrank.core.errors import NON_FINITE, PREEMPTED, BadInput, NonFinite, Preempted
from lowrank.train.guard import NonFinitePolicy, StopSignal


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
