"""A run that hangs is ended and says where; a run that is slow is left alone."""

import json
import os
import signal
import time

import pytest
from lives import Fault, live, same_run, start
from tiny_run import position, wait_until

from lowrank.core.errors import HANG

pytestmark = pytest.mark.faults

#: Far longer than any limit below; the child must not live to see its end.
FOREVER = 90.0
HANGS = {
    "in a step": ("step", 7, "training", ("run.hang_seconds=3",)),
    "in a validation": ("validation", 2, "validation", ("run.pause_seconds=15",)),
    "in a checkpoint": ("checkpoint", 2, "checkpoint", ("run.pause_seconds=15",)),
}


def status(directory):
    return json.loads((directory / "status.json").read_text())


@pytest.mark.parametrize("where", HANGS)
@pytest.mark.fault(
    "hang",
    "the stacks of all threads on stderr and exit 76 within the limit; the next "
    "command continues to the same bits",
)
def test_a_hang_ends_with_all_stacks_and_is_continued(
    world, undisturbed, config_of, tmp_path, outcomes, where
):
    place, call, said, limits = HANGS[where]
    directory, log = tmp_path / "run", tmp_path / "log"
    fault = Fault("sleep", place, call, None, FOREVER)
    began = time.monotonic()
    assert live(world, config_of(directory, *limits), log, fault) == HANG
    assert time.monotonic() - began < FOREVER / 2
    text = log.read_text()
    assert "in struck" in text, "the stack of the thread that sleeps"
    assert "in _watch" in text, "and those of the others"
    assert status(directory)["status"] == "failed"
    assert f"hang: {said}" in status(directory)["reason"]
    outcomes(f"exit 76 {where}")
    if where == "in a step":
        assert live(world, config_of(directory), log) == 0, log.read_text()
        same_run(undisturbed, directory)


SLOW = ("compilation", "validation", "checkpoint")


@pytest.mark.fault(
    "slow compilation, validation and checkpoint under a short limit for steps",
    "no false alarm: they have a budget of their own",
)
def test_what_is_only_slow_is_left_alone(
    world, undisturbed, config_of, tmp_path, outcomes
):
    directory, log = tmp_path / "run", tmp_path / "log"
    limits = ("run.hang_seconds=3", "run.pause_seconds=60")
    slow = [Fault("sleep", place, 1, None, 6.0) for place in SLOW]
    assert live(world, config_of(directory, *limits), log, *slow) == 0, log.read_text()
    same_run(undisturbed, directory)
    for place in SLOW:
        outcomes(f"undisturbed by a slow {place}")


@pytest.mark.fault(
    "process suspended for longer than the limit of a hang",
    "no false alarm: time in which the process could not run does not count",
)
def test_a_suspended_process_has_not_hung(
    world, undisturbed, config_of, tmp_path, outcomes
):
    directory, log = tmp_path / "run", tmp_path / "log"
    limits = ("run.hang_seconds=3", "run.pause_seconds=60")
    child = start(world, config_of(directory, *limits), log)
    try:
        assert wait_until(lambda: position(directory) > 8, child), log.read_text()
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(7.0)
        os.kill(child.pid, signal.SIGCONT)
        child.join(120)
        assert child.exitcode == 0, log.read_text()
    finally:
        child.kill()
    same_run(undisturbed, directory)
    outcomes("undisturbed")
