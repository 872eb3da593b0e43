"""The watchdog's clock: what resets it, and which limit counts."""

import threading
import time

import pytest

from lowrank.core.errors import HANG, BadInput
from lowrank.train import watchdog as module
from lowrank.train.watchdog import STEP, Watchdog


@pytest.fixture
def ended(monkeypatch):
    """The exit codes that would have ended this process."""
    codes = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    return codes


def wait(seconds=0.5):
    time.sleep(seconds)


def test_silence_ends_the_process_with_stacks_and_last_words(ended, capfd):
    said = []
    with Watchdog(0.1, None, report=said.append) as dog:
        dog.alive(STEP)
        wait()
    assert ended[0] == HANG == 76
    assert said[0] == "training has not moved for 0.1 s"
    assert "test_watchdog" in capfd.readouterr().err


def test_progress_keeps_it_quiet(ended):
    with Watchdog(0.3, None) as dog:
        for _ in range(20):
            dog.alive(STEP)
            wait(0.05)
    assert not ended


def test_the_budget_of_what_is_no_step_is_its_own(ended):
    with Watchdog(0.1, 30.0) as dog:
        dog.alive("compilation")
        wait()
        assert not ended
        dog.alive(STEP)
        wait()
    assert ended


def test_last_words_that_hang_do_not_delay_the_end(ended, monkeypatch):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.05)
    never = threading.Event()
    with Watchdog(0.1, None, report=lambda reason: never.wait(5.0)) as dog:
        dog.alive(STEP)
        wait()
        assert ended
    never.set()


@pytest.mark.parametrize("limits", [(0, None), (None, -1.0)])
def test_a_limit_that_is_not_positive_is_refused(limits):
    with pytest.raises(BadInput, match="positive"):
        Watchdog(*limits)


def test_without_limits_nothing_runs():
    before = threading.active_count()
    with Watchdog(None, None):
        assert threading.active_count() == before
