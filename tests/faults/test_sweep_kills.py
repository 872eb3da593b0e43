"""A sweep that is killed again and again ends as if it never had been."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from lives import LONG
from tiny_run import ROOT, SMALL, metric_rows, same_outcome

pytestmark = pytest.mark.faults

SEED = 7
HALVING = ("sweep=halving", "sweep.halving.eta=2", "sweep.halving.first=8")
#: By sweep, things on disk (checkpoints, decisions, results) after which a life ends,
#: and the longest delay.
LIVES = {
    (): ((1, 0.5), (4, 0.5), (9, 0.5), (12, 1.0), (15, 1.0)),
    HALVING: ((1, 0.5), (3, 0.3), (5, 0.3), (7, 0.3), (9, 0.3)),
}
LIFETIME = 240


def line(world, folder, kind):
    where = [one for one in world.overrides() if not one.startswith("run.root")]
    grid = (
        "optim.lr=0.005,0.01",
        "seed=1,2",
        "delta.rank=4",
        "loop.checkpoint_every=8",
    )
    own = [f"hydra.sweep.dir={folder}", "optim.epochs=4"]
    launcher = ("-m", "hydra/launcher=packed")
    return ["experiments.train", *launcher, *SMALL, *LONG, *where, *grid, *own, *kind]


def start(world, folder, log, kind):
    return subprocess.Popen(
        [sys.executable, "-m", *line(world, folder, kind)],
        cwd=ROOT,
        env=world.environment,
        stdout=log,
        stderr=log,
    )


def written(folder):
    """Checkpoints, decisions and results that are whole."""
    # `os.walk` does not mind folders that go away meanwhile.
    steps = [
        name for _, names, _ in os.walk(folder) for name in names if name.isdigit()
    ]
    decisions = [*folder.glob("rungs/*.json")]
    return len(steps) + len(decisions) + 3 * len([*folder.glob("*/result.json")])


@pytest.mark.parametrize("kind", LIVES, ids=["all to the end", "halved"])
@pytest.mark.fault(
    "kill -9 at random moments of a sweep in packs, halved or not",
    "the same line continues: finished trials stand, packs go on with their own "
    "trials, and results and rungs end equal to the last bit",
)
def test_a_sweep_killed_five_times_ends_like_an_undisturbed_one(
    world, tmp_path, kind, outcomes
):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with open(tmp_path / "log", "w+") as log:
        code = start(world, whole, log, kind).wait(LIFETIME)
        assert code == 0, (log.seek(0), log.read())
        kills = 0
        for amount, longest in LIVES[kind]:
            child = start(world, killed, log, kind)
            while child.poll() is None and written(killed) < amount:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, longest))
            child.kill()
            kills += child.wait() == -signal.SIGKILL
            print(f"life after {amount}: {written(killed)} on disk at its end")
        assert kills >= 3, "most lives have to end before the sweep does"
        log.seek(0, 2)
        code = start(world, killed, log, kind).wait(LIFETIME)
        assert code == 0, (log.seek(0), log.read())
    trials = sorted(path.parent.name for path in whole.glob("*/status.json"))
    done = [name for name in trials if (whole / name / "result.json").exists()]
    assert (len(trials), len(done)) == (4, 1 if kind else 4)
    for trial in trials:
        if trial in done:
            same_outcome(whole / trial, killed / trial)
        else:
            one, two = (metric_rows(root / trial) for root in (whole, killed))
            assert one == two, trial
            assert not (killed / trial / "result.json").exists()
    decisions = [
        {path.name: path.read_bytes() for path in root.glob("rungs/*.json")}
        for root in (whole, killed)
    ]
    assert decisions[0] == decisions[1]
    assert len(decisions[0]) == (2 if kind else 0)
    for _ in range(kills):
        outcomes("halved: the same" if kind else "to the end: the same")
