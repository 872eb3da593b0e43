"""A run that is killed, again and again and anywhere, ends as if it never had been."""

import json
import random
import signal

import pytest
from lives import Fault, litter, live, same_run

from lowrank.core.errors import PREEMPTED

pytestmark = pytest.mark.faults

SEED = 20
#: What is killed in each phase: (place, calls from which one is drawn, longest delay in
#: seconds; None for right before). In the order of a run: one directory lives through
#: all of them.
MOMENTS = {
    "preparing data": [
        ("data preparation", (1,), 0.3),
        ("tokens", (1, 2, 3), 0.05),
    ],
    "starting": [("record opened", (1,), 0.05), ("compilation", (1,), 1.0)],
    "training": [("step", (1, 2, 3, 4, 5, 6), 0.02), ("metrics", (1, 2), 0.01)],
    "checkpointing": [
        ("checkpoint", (1, 2), 0.1),
        ("old checkpoint deleted", (1, 2), 0.01),
        ("restore", (1,), 0.2),
    ],
    "validating": [("validation", (1,), 0.05)],
    "judging": [("judging", (1, 2), 0.1), ("costs", (1,), 0.2)],
    "finishing": [
        ("adapter", (1,), None),
        ("adapter", (1,), 0.02),
        ("result", (1,), None),
        ("status", (2,), None),
    ],
}
KILLS_EACH = 4


@pytest.mark.fault(
    "kill -9 at random moments of a whole run",
    "the next command continues; weights, optimizer, metrics and result end equal to "
    "the last bit",
)
def test_kills_at_any_moment_leave_no_trace(
    world, undisturbed, config_of, tmp_path, outcomes
):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    directory, log = tmp_path / "killed", tmp_path / "killed.log"
    lives = 0
    for phase, moments in MOMENTS.items():
        for number in range(KILLS_EACH):
            place, calls, longest = moments[number % len(moments)]
            delay = None if longest is None else chance.uniform(0, longest)
            fault = Fault("kill", place, chance.choice(calls), delay)
            print(f"life {lives}: {fault}")
            # Data is prepared anew in each of these lives.
            fresh = [f"run.cache={tmp_path / f'cache-{number}'}"]
            cache = fresh if phase == "preparing data" else []
            code = live(world, config_of(directory, *cache), log, fault)
            assert code == -signal.SIGKILL, log.read_text()
            outcomes(f"while {phase}")
            lives += 1
    assert (directory / "result.json").exists(), "the last kill came right after it"
    assert live(world, config_of(directory), log) == 0, log.read_text()
    same_run(undisturbed, directory)
    status = json.loads((directory / "status.json").read_text())
    assert status["status"] == "done"
    assert not litter(directory)
    # A cache that lost its process in the middle serves the next one.
    cache = tmp_path / "cache-0"
    config = config_of(tmp_path / "again", f"run.cache={cache}", "loop.stop_after=1")
    assert live(world, config, log) == PREEMPTED, log.read_text()
    assert not litter(cache)
