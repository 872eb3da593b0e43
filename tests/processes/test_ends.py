"""However one of several processes ends, all do, and the same commands go on."""

import json
import os
import signal
import time

import pytest
from crew import ABORTED, LEFT_SECONDS
from lives import LONG, Fault
from test_together import close_runs
from tiny_run import position, wait_until

pytestmark = pytest.mark.faults


def ended(crew, began):
    """Exit codes of processes that had to end within the time they are given."""
    codes = crew.codes(LEFT_SECONDS + 60)
    assert time.monotonic() - began < LEFT_SECONDS, crew.all_said()
    return codes


def status(directory):
    return json.loads((directory / "status.json").read_text())["status"]


def test_any_of_them_may_be_asked_to_stop(crew, tmp_path, undisturbed):
    directory = tmp_path / "run"
    crew.start(2, directory, *LONG)
    wait_until(lambda: position(directory) >= 8, crew.children[1], 300)
    os.kill(crew.children[1].pid, signal.SIGTERM)
    assert crew.codes() == [75, 75], crew.all_said()
    assert status(directory) == "preempted"
    saved = position(directory)
    assert 8 <= saved < 72
    assert f"stopped by SIGTERM at step {saved} of 72" in crew.said(0)
    assert crew.run(2, directory, *LONG) == [0, 0], crew.all_said()
    close_runs(undisturbed, directory)


#: Act, place and call; which of them is struck; how it ends.
STRUCK = {
    "killed in a step": ("kill", "step", 20, 1, [-signal.SIGKILL]),
    "killed in a save": ("kill", "checkpoint", 4, 0, [-signal.SIGKILL]),
    "raises in a step": ("raise", "step", 20, 0, [1]),
    "raises in a save": ("raise", "checkpoint", 4, 1, [1, 73]),
}


@pytest.mark.parametrize("how", STRUCK)
def test_one_that_is_gone_takes_the_others_along(crew, tmp_path, undisturbed, how):
    act, place, call, index, codes = STRUCK[how]
    directory = tmp_path / "run"
    crew.start(2, directory, *LONG, faults={index: [Fault(act, place, call)]})
    crew.children[index].join(300)
    found = ended(crew, time.monotonic())
    assert found[index] in codes, crew.all_said()
    # Whichever comes first: JAX misses the other, or an exchange with it breaks.
    assert found[1 - index] in (ABORTED, 1), crew.all_said()
    assert crew.run(2, directory, *LONG) == [0, 0], crew.all_said()
    close_runs(undisturbed, directory)


def test_killed_it_goes_on_with_another_mesh(crew, tmp_path, undisturbed):
    directory = tmp_path / "run"
    crew.start(2, directory, *LONG, faults={1: [Fault("kill", "step", 20)]})
    crew.children[1].join(300)
    ended(crew, time.monotonic())
    assert 0 < position(directory) < 72
    other = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
    assert crew.run(2, directory, *LONG, *other) == [0, 0], crew.all_said()
    close_runs(undisturbed, directory)


#: Place and call; the limit; what the one that hangs says. A save takes as long as a
#: compilation may.
HANGS = {
    "in a step": ("step", 20, "run.hang_seconds=5", "training has not moved for 5 s"),
    "in a save": ("checkpoint", 4, "run.pause_seconds=40", "has not moved for 40 s"),
}


@pytest.mark.parametrize("where", HANGS)
def test_one_that_hangs_ends_all(crew, tmp_path, undisturbed, where):
    place, call, limit, words = HANGS[where]
    directory = tmp_path / "run"
    hangs = {1: [Fault("sleep", place, call, value=300)]}
    crew.start(2, directory, *LONG, limit, faults=hangs)
    wait_until(lambda: position(directory) >= 12, crew.children[0], 300)
    found = ended(crew, time.monotonic() + float(limit.partition("=")[2]))
    assert found[1] in (76, ABORTED), crew.all_said()
    # The one that waits may find its exchange broken before it ends by itself.
    assert found[0] in (76, ABORTED, 1), crew.all_said()
    assert 76 in found, crew.all_said()
    said = crew.all_said()
    assert "HANG: " in said
    assert words in said
    assert crew.run(2, directory, *LONG) == [0, 0], crew.all_said()
    close_runs(undisturbed, directory)
