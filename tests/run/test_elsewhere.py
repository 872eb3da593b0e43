"""Packs that travel to an engine as bytes: order, errors, workers that are lost."""

import dataclasses
import importlib.util
import pickle

import pytest
from fake_packs import FakePack

from lowrank.core.errors import (
    BAD_INPUT,
    BUG,
    NON_FINITE,
    PREEMPTED,
    Preempted,
    WorkerLost,
)
from lowrank.run.packs import run_pack
from lowrank.sweeps import jobs
from lowrank.sweeps.engine import Local, work

pytestmark = pytest.mark.long


class Elsewhere(Local):
    """An engine of two rooms whose tasks travel as bytes, and run last in, first out.

    Attributes:
      fates: What befalls a task before it runs, by the number of its submission.
      stopped: Tasks that were asked to stop.
    """

    room, here = 2, False

    def __init__(self, fates=()):
        self.fates, self.begun, self.stopped = dict(fates), [], 0
        self.parcels = {}

    def submit(self, task):
        self.begun.append(sorted(one.seed for one in task.settings))
        self.parcels[len(self.begun)] = task.parcel()
        return len(self.begun)

    def wait(self, handles):
        return max(handles)

    def outcomes(self, handle):
        parcel = self.parcels.pop(handle)
        if fate := self.fates.get(handle):
            raise fate
        # The pack is the test's own object; everything else is what a worker gets.
        sent = pickle.loads(pickle.dumps(dataclasses.replace(parcel, run=run_pack)))
        reply = work(dataclasses.replace(sent, run=parcel.run))
        return pickle.loads(pickle.dumps(reply)).outcomes()

    def stop(self, handles):
        self.stopped += len(handles)


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes a sweep's packs run in an engine of ours."""

    def made(fates=()):
        engine = Elsewhere(fates)
        monkeypatch.setattr(jobs, "check_engine", lambda spec: None)
        monkeypatch.setattr(jobs, "open_engine", lambda spec, folder: engine)
        return engine

    return made


FAR = ("sweep.engine=ray", "sweep.width=2", "sweep.retries=1")
MANY = ("optim.lr=0.1", "seed=1,2,3,4,5,6")


def test_packs_run_elsewhere_two_at_a_time_and_come_back(sweep, elsewhere):
    engine, pack = elsewhere(), FakePack()
    pack.fails, pack.widest = {5}, 2
    code, said = sweep(pack, *FAR, grid=MANY)
    assert code == NON_FINITE, "an error comes back as what it was"
    ran = [sorted(seed for _, seed in one) for one in pack.packs]
    assert len(ran) == 3
    assert ran != engine.begun, "in an order of the engine's own"
    assert sorted(ran) == sorted(engine.begun)
    assert "NonFinite: loss is not finite" in said
    assert "6 trials: 5 done, 1 failed" in said


@pytest.mark.faults
def test_what_a_worker_meets_is_met_as_it_is_here(sweep, elsewhere):
    engine, pack = elsewhere(), FakePack()
    pack.widest, pack.bugs = 1, {4}
    code, said = sweep(pack, *FAR, grid=MANY)
    assert code == BUG
    assert "ZeroDivisionError: a bug" in said
    assert "in __call__" in said, "with its trace"
    assert "6 trials: 5 done, 1 failed" in said
    assert [len(seeds) for seeds in engine.begun].count(1) == 6, "halved"


@pytest.mark.faults
def test_a_worker_that_is_taken_away_is_replaced_as_often_as_was_said(sweep, elsewhere):
    gone = Preempted("stopped by SIGTERM")
    engine = elsewhere({2: gone})
    code, said = sweep(FakePack(), *FAR, grid=MANY)
    assert code == 0, said
    assert len(engine.begun) == 4
    assert engine.begun[-1] == engine.begun[1], "the same pack, again"
    engine = elsewhere(dict.fromkeys(range(1, 9), gone))
    code, said = sweep(FakePack(), *FAR, "sweep.name=other", grid=MANY)
    assert code == PREEMPTED
    assert engine.stopped == 1, "and the one beside it is asked to save"
    assert "stopped: saved; the same line continues" in said


@pytest.mark.faults
@pytest.mark.fault(
    "a worker of an engine that dies again and again",
    "its pack is sent out anew as often as was said; then its trials alone have failed",
)
def test_a_lost_worker_fails_its_trials_only(sweep, elsewhere):
    elsewhere({1: WorkerLost("died again and again")})
    code, said = sweep(FakePack(), *FAR, grid=MANY)
    assert code == BUG
    assert said.count("WorkerLost: died again and again") >= 2
    assert "6 trials: 2 failed, 4 done" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sweep.engine=ray",), "give sweep.width or sweep.memory_gib"),
        (("sweep.engine=submitit", "sweep.width=2", "mesh=trials"), "mesh.trial = -1"),
        (("sweep.ray={num_gpus:1}",), "sweep.ray is for sweep.engine=ray"),
        (("sweep.engine=ray", "sweep.workers=0"), "sweep.workers must be at least 1"),
        (("hydra/launcher=basic", "sweep.engine=ray"), "-m hydra/launcher=packed"),
    ],
)
def test_engines_that_cannot_be_are_refused(sweep, elsewhere, arguments, told):
    engine = elsewhere()
    code, said = sweep(FakePack(), *arguments)
    assert code == BAD_INPUT
    assert told in said
    assert engine.begun == []


def test_an_engine_that_is_not_installed_says_what_to_install(sweep, monkeypatch):
    real = importlib.util.find_spec
    gone = lambda name, *more: None if name == "submitit" else real(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    code, said = sweep(FakePack(), "sweep.engine=submitit", "sweep.width=2")
    assert code == BAD_INPUT
    assert "lowrank[slurm]" in said
