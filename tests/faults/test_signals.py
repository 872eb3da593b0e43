"""Whoever is asked to stop stops, says 75, and loses nothing, wherever it was."""

import json
import random

import pytest
from lives import Fault, litter, live, same_run

from lowrank.core.errors import PREEMPTED

pytestmark = pytest.mark.faults

SEED = 21
#: In the order of a run; one directory is stopped at all of them.
MOMENTS = {
    "data preparation": (1, 0.1),
    "compilation": (1, 0.3),
    "restore": (1, 0.05),
    "step": (3, 0.02),
    "checkpoint": (2, 0.05),
    "validation": (1, 0.02),
    "metrics": (1, 0.01),
    "judging": (1, 0.05),
    "costs": (1, 0.1),
    "adapter": (1, None),
}


def status(directory):
    return json.loads((directory / "status.json").read_text())


@pytest.mark.parametrize("act", ["term", "interrupt", "twice"])
@pytest.mark.fault(
    "SIGTERM, SIGINT, or both, at any place of a run",
    "exit 75, status preempted (the second signal ends it at once); the next command "
    "continues to the same bits",
)
def test_signals_anywhere(world, undisturbed, config_of, tmp_path, outcomes, act):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    directory, log = tmp_path / "run", tmp_path / "log"
    names = list(MOMENTS) if act == "term" else ["data preparation", "step", "judging"]
    for place in names:
        call, longest = MOMENTS[place]
        # The first life has nothing to restore.
        if place == "restore":
            assert live(world, config_of(directory, "loop.stop_after=4"), log) == 75
        delay = None if longest is None else chance.uniform(0, longest)
        fault = Fault(act, place, call, delay)
        print(fault)
        code = live(world, config_of(directory), log, fault)
        assert code == PREEMPTED, (place, code, log.read_text())
        if directory.exists() and act != "twice":
            assert status(directory)["status"] == "preempted"
        outcomes(f"{act}: exit 75")
    assert live(world, config_of(directory), log) == 0, log.read_text()
    same_run(undisturbed, directory)
    assert not litter(directory)
