"""A sweep that is killed again and again ends as if it never had been."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import LONG
from tiny_run import ROOT, SMALL, same_outcome

pytestmark = pytest.mark.faults

SEED = 7
#: Things on disk (checkpoints, results) after which a life ends, and the longest delay.
LIVES = ((1, 0.5), (4, 0.5), (9, 0.5), (12, 1.0), (15, 1.0))
LIFETIME = 240


def line(world, folder):
    where = [one for one in world.overrides() if not one.startswith("run.root")]
    grid = (
        "optim.lr=0.005,0.01",
        "seed=1,2",
        "delta.rank=4",
        "loop.checkpoint_every=8",
    )
    own = [f"hydra.sweep.dir={folder}", "optim.epochs=4"]
    launcher = ("-m", "hydra/launcher=packed")
    return ["experiments.train", *launcher, *SMALL, *LONG, *where, *grid, *own]


def start(world, folder, log):
    return subprocess.Popen(
        [sys.executable, "-m", *line(world, folder)],
        cwd=ROOT,
        env=world.environment,
        stdout=log,
        stderr=log,
    )


def written(folder):
    """Checkpoints and results that are whole."""
    # `os.walk` does not mind folders that go away meanwhile.
    steps = [
        name for _, names, _ in os.walk(folder) for name in names if name.isdigit()
    ]
    return len(steps) + 3 * len([*folder.glob("*/result.json")])


def test_a_sweep_killed_five_times_ends_like_an_undisturbed_one(world, tmp_path):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with open(tmp_path / "log", "w+") as log:
        assert start(world, whole, log).wait(LIFETIME) == 0, (log.seek(0), log.read())
        kills = 0
        for amount, longest in LIVES:
            child = start(world, killed, log)
            while child.poll() is None and written(killed) < amount:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, longest))
            child.kill()
            kills += child.wait() == -signal.SIGKILL
        assert kills >= 3, "most lives have to end before the sweep does"
        log.seek(0, 2)
        assert start(world, killed, log).wait(LIFETIME) == 0, (log.seek(0), log.read())
    trials = sorted(path.parent.name for path in whole.glob("*/result.json"))
    assert len(trials) == 4
    for trial in trials:
        same_outcome(whole / trial, killed / trial)
