"""Packs in other processes end as in one, also when some of these are killed."""

import importlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from tiny_run import same_outcome

from lowrank.core.errors import PREEMPTED, BadInput
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.engines import open_engine

pytestmark = pytest.mark.faults

ENGINES = {
    "ray": ("sweep.engine=ray", "sweep.ray={num_cpus:1}"),
    "submitit": (
        "sweep.engine=submitit",
        "sweep.submitit={cluster:local,timeout_min:10}",
    ),
}


def running(folder):
    """{pid: pack} of the workers whose packs have a checkpoint and train."""
    found = {}
    for path in (folder / "packs").glob("*.json"):
        trials = json.loads(path.read_text())["trials"]
        steps = [p for p in path.with_suffix("").glob("checkpoints/*")]
        status = folder / trials[0] / "status.json"
        if any(p.name.isdigit() for p in steps) and status.exists():
            told = json.loads(status.read_text())
            if told["status"] == "running":
                found[told["pid"]] = path.stem
    return found


def gone(pid, seconds=10):
    """Whether a process has ended, or does within a moment."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def attempts(folder):
    return sorted(
        json.loads(path.read_text())["attempt"] for path in folder.glob("*/status.json")
    )


def same_sweep(first, second):
    trials = sorted(path.parent.name for path in first.glob("*/result.json"))
    assert len(trials) == 4
    for trial in trials:
        same_outcome(first / trial, second / trial)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_is_killed_loses_nothing(engine, start, undisturbed):
    importlib.import_module(engine)
    sweep = start(*ENGINES[engine])
    victim, _ = sweep.until(lambda: running(sweep.folder)).popitem()
    os.kill(victim, signal.SIGKILL)
    assert sweep.wait() == 0, sweep.said()
    assert attempts(sweep.folder) == [1, 1, 2, 2], "a worker was killed, once"
    same_sweep(undisturbed, sweep.folder)
    # A job that has ended leaves no configs, which may hold secrets, behind.
    assert not list(sweep.folder.rglob("*_submitted.pkl"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sweep_that_is_stopped_stops_its_workers_and_goes_on(
    engine, start, undisturbed
):
    importlib.import_module(engine)
    sweep = start(*ENGINES[engine], "sweep.workers=1")
    (worker,) = sweep.until(lambda: running(sweep.folder))
    sweep.signal(signal.SIGTERM)
    assert sweep.wait() == PREEMPTED, sweep.said()
    assert gone(worker)
    # The same line without the engine: where a pack runs changes no result.
    again = start()
    assert again.wait() == 0, again.said()
    same_sweep(undisturbed, again.folder)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"engine": "submitit", "submitit": {"cluster": "local"}}, "timeout_min"),
        (
            {"engine": "submitit", "submitit": {"timeout_min": 1, "cluster": "moon"}},
            "moon",
        ),
        (
            {"engine": "submitit", "submitit": {"timeout_min": 1, "elephants": 1}},
            "elephants",
        ),
        ({"engine": "ray", "ray": {"elephants": 1}}, "elephants"),
    ],
)
def test_what_an_engine_does_not_know_is_refused(told, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        open_engine(SweepSpec(**told), tmp_path)
