"""A study that is killed again and again tells what an undisturbed one does."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import ROOT

pytestmark = pytest.mark.faults

SEED = 11
#: Records on disk after which a life ends, and the longest delay in seconds.
LIVES = ((0, 6.0), (1, 2.0), (4, 2.0), (7, 2.0))
LIFETIME = 240


def start(world, folder, log):
    line = (
        "size=smoke", "arms=[uniform,norm,random,fisher,retrain]",
        "tasks=[heterogeneous]", "rates=[0.003,0.01]",
        f"records={folder}/records", f"results={folder}/results",
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.ranks_protocol", *line],
        cwd=ROOT,
        env=world.environment,
        stdout=log,
        stderr=log,
    )


@pytest.mark.fault(
    "kill -9 at random moments of a study of allocators",
    "the same line continues, and its results are equal to the last bit",
)
def test_a_study_killed_again_and_again_has_the_same_results(world, tmp_path, outcomes):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with open(tmp_path / "log", "w+") as log:
        code = start(world, whole, log).wait(LIFETIME)
        assert code == 0, (log.seek(0), log.read())
        kills = 0
        for amount, longest in LIVES:
            child = start(world, killed, log)
            held = lambda: len([*killed.rglob("records/**/*.json")])
            while child.poll() is None and held() < amount:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, longest))
            child.kill()
            kills += child.wait() == -signal.SIGKILL
            print(f"life after {amount}: {held()} records at its end")
        assert kills >= 3, "most lives have to end before the study does"
        code = start(world, killed, log).wait(LIFETIME)
        assert code == 0, (log.seek(0), log.read())
    one, two = (
        json.loads((root / "results.json").read_text()) for root in (whole, killed)
    )
    # How long it took is the one thing that a kill may change.
    for story in (one, two):
        for task in story["tasks"].values():
            assert task.pop("seconds") > 0
    assert one["tasks"] == two["tasks"]
    assert one["outcomes"] == two["outcomes"]
    names = lambda root: sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()
    )
    assert names(whole) == names(killed), "nothing half-made is left"
    for _ in range(kills):
        outcomes("the same")
