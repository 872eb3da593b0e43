"""A multirun through the door: packs, outcomes, resume, refusals, the dry run.

Mostly with a pack that trains nothing, but opens and finishes real records.
"""

import dataclasses
import importlib.util
import json
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from tiny_run import SMALL

from experiments.train import objective
from lowrank.core.errors import (
    BAD_INPUT,
    BUG,
    CANNOT_WRITE,
    CORRUPT,
    NON_FINITE,
    PREEMPTED,
    BadInput,
    NonFinite,
    OutOfMemory,
    Preempted,
    WorkerLost,
)
from lowrank.io.files import Lock
from lowrank.io.record import Record
from lowrank.io.view import load_record
from lowrank.run.door import command
from lowrank.run.packs import Outcome, pack_memory, run_pack
from lowrank.run.prepare import directory_of, identity_of, load_base
from lowrank.sweeps import jobs
from lowrank.sweeps.engine import Local, work
from lowrank.sweeps.launch import Packing

GRID = ("optim.lr=0.1,0.2", "seed=1,2")
PLACES = {(lr, seed) for lr in (0.1, 0.2) for seed in (1, 2)}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def facts(settings, known={}):  # noqa: B006
    """Fingerprints of base, data and code, taken once for all tests."""
    if not known:
        task = settings.data.load(Path(settings.run.cache) / "data")
        known |= identity_of(settings, load_base(settings, len(task.classes)), task)
    return known


class FakePack:
    """Finishes trials at once; their accuracy is their learning rate.

    Attributes:
      packs: (lr, seed) of the trials of every pack that was run.
      shares: Devices that shared the trials of each.
      restored: Whether those that came so far found a checkpoint.
      widest: With more trials than this, the device is out of memory.
      fails, refuses, bugs: Seeds of trials that are not finite, or whose whole pack is
        refused or ends by a bug.
      die_after: Trials to finish, after a checkpoint, before the kill.
    """

    def __init__(self):
        self.packs, self.shares, self.restored = [], [], []
        self.widest, self.die_after = 99, None
        self.fails, self.refuses, self.bugs, self.stops = set(), set(), set(), set()

    def __call__(self, settings, overrides, *, folder, until=None, origins=()):
        self.packs.append([(one.optim.lr, one.seed) for one in settings])
        self.shares.append(settings[0].mesh.sizes()["trial"])
        seeds = {one.seed for one in settings}
        for one in settings:
            assert (directory_of(one) / ".hydra" / "config.yaml").exists()
            assert not one.run.progress
        if len(settings) > self.widest:
            raise OutOfMemory("RESOURCE_EXHAUSTED")
        if seeds & self.refuses:
            raise BadInput("one of these trials cannot be")
        if seeds & self.bugs:
            raise ZeroDivisionError("a bug")
        self.restored.append((folder / "3").exists())
        (folder / "3").mkdir(parents=True, exist_ok=True)
        if seeds & self.stops:
            raise Preempted("stopped by SIGTERM")
        return [self.finish(at, one) for at, one in enumerate(settings)]

    def finish(self, at, settings):
        if not settings.run.force and (directory_of(settings) / "result.json").exists():
            return Outcome(load_record(directory_of(settings)).result, None)
        if at == self.die_after:
            raise Killed
        if settings.seed in self.fails:
            return Outcome(None, NonFinite("loss is not finite"))
        identity = {**facts(settings), "config": settings.trial_id}
        found = {"accuracy": {"estimate": settings.optim.lr}}
        result = {"scores": {"validation": {"metrics": found}}}
        with Record.open(
            directory_of(settings),
            config=settings.config,
            identity=identity,
            force=settings.run.force,
        ) as record:
            record.result(result)
        return Outcome(result, None)


class Seen(Callback):
    """What Hydra's callbacks see."""

    jobs = []

    def on_job_end(self, config, job_return, **kwargs):
        hydra = job_return.hydra_cfg.hydra
        self.jobs.append((hydra.job.num, job_return, Path(hydra.runtime.output_dir)))


def never(config, overrides):
    raise AssertionError("a job was run outside its pack")


def few_bytes(settings, widths):
    return dict.fromkeys(widths, 1000)


@pytest.fixture
def sweep(world, tmp_path, monkeypatch, capfd):
    """Gives a multirun's line: (exit code, stderr). Sweeps live under `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    Seen.jobs.clear()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def given(pack, *arguments, memory=few_bytes, grid=GRID):
        where = [one for one in world.overrides() if not one.startswith("run.root")]
        watch = f"+hydra.callbacks.seen._target_={__name__}.Seen"
        line = ["-m", "hydra/launcher=packed", watch, *SMALL, *where, *grid, *arguments]
        monkeypatch.setattr(sys, "argv", ["train", *line])
        capfd.readouterr()
        try:
            command(never, packing=Packing(pack, memory, objective))()
            code = 0
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        return code, said.out + said.err

    yield given
    for number, handler in before.items():
        signal.signal(number, handler)


def only_sweep(tmp_path):
    (found,) = (tmp_path / "multirun").iterdir()
    return found


def test_a_grid_is_one_pack_told_as_ordinary_jobs(sweep, tmp_path):
    pack = FakePack()
    code, said = sweep(pack)
    assert code == 0, said
    assert [set(one) for one in pack.packs] == [PLACES]
    assert [number for number, _, _ in Seen.jobs] == [0, 1, 2, 3]
    for _, job, directory in Seen.jobs:
        assert job.status is JobStatus.COMPLETED
        assert job.return_value == job.cfg.optim.lr
        assert directory.parent == only_sweep(tmp_path)
        record = load_record(directory)
        assert record.result is not None
        assert record.config["optim"]["lr"] == job.cfg.optim.lr
        assert record.config["run"]["root"] == str(only_sweep(tmp_path))
    assert "4 trials: 4 done" in said


def test_the_same_line_skips_what_is_finished(sweep, tmp_path):
    pack = FakePack()
    sweep(pack)
    directories = sorted(only_sweep(tmp_path).iterdir())
    code, said = sweep(pack, "track=default", "sweep.on_failure=stop")
    assert code == 0, said
    assert len(pack.packs) == 1, "run again"
    assert said.count("finished earlier") == 4
    assert [job.return_value for _, job, _ in Seen.jobs[4:]] == [0.1, 0.1, 0.2, 0.2]
    assert sorted(only_sweep(tmp_path).iterdir()) == directories
    for _, _, directory in Seen.jobs:
        assert load_record(directory).status["status"] == "done"


def test_a_trials_failure_is_its_own_and_the_exit_code_tells(sweep):
    pack = FakePack()
    pack.fails = {2}
    code, said = sweep(pack)
    assert code == NON_FINITE
    states = [job.status for _, job, _ in Seen.jobs]
    assert states == [JobStatus.COMPLETED, JobStatus.FAILED] * 2
    assert "NonFinite: loss is not finite" in said
    assert "Traceback" not in said
    assert "2 done, 2 failed" in said


def test_on_failure_stop_runs_no_further_pack(sweep):
    pack = FakePack()
    pack.fails = {1}
    code, said = sweep(pack, "sweep.width=1", "sweep.on_failure=stop")
    assert code == NON_FINITE
    assert pack.packs == [[(0.1, 1)]]
    assert said.count("not run: on_failure=stop") == 3
    assert "stopped after NonFinite" in said
    pack.packs.clear()
    sweep(pack, "sweep.width=1")
    assert len(pack.packs) == 4, "continue is the default"


def test_a_pack_too_wide_for_the_device_is_halved_and_later_ones_with_it(sweep):
    pack = FakePack()
    pack.widest = 1
    grid = ("optim.lr=0.1,0.2", "seed=1,2,3,4")
    code, said = sweep(pack, "sweep.width=4", grid=grid)
    assert code == 0, said
    sizes = [len(one) for one in pack.packs]
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1], "the second pack tried 4 again"
    assert len({place for one in pack.packs if len(one) == 1 for place in one}) == 8
    assert "halved" in said


def test_packs_come_out_even_on_the_devices_that_share_their_trials(sweep):
    pack = FakePack()
    grid = ("optim.lr=0.1", "seed=1,2,3,4,5,6,7")
    code, said = sweep(pack, "mesh.trial=4", grid=grid)
    assert code == 0, said
    assert [len(one) for one in pack.packs] == [4, 3]
    assert pack.shares == [4, 3], "what is left over leaves a device idle"


def test_a_trial_that_makes_its_pack_refuse_is_found_and_the_rest_run(sweep):
    pack = FakePack()
    pack.refuses = {3}
    code, said = sweep(pack, grid=("optim.lr=0.1", "seed=1,2,3,4"))
    assert code == BAD_INPUT
    states = {job.cfg.seed: job.status for _, job, _ in Seen.jobs}
    assert [seed for seed, s in states.items() if s is JobStatus.FAILED] == [3]
    assert "one of these trials cannot be" in said


def test_a_bug_in_one_pack_is_shown_and_the_others_run(sweep):
    pack = FakePack()
    pack.bugs = {2}
    grid = ("seed=1,2", "data.batching.batch_size=8,16")
    code, said = sweep(pack, "sweep.width=1", grid=grid)
    assert code == BUG
    assert "ZeroDivisionError" in said
    assert "2 done, 2 failed" in said


@pytest.mark.parametrize("died_after", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_after_a_kill_packs_go_on_with_their_recorded_composition(sweep, died_after):
    pack = FakePack()
    pack.die_after = died_after
    with pytest.raises(Killed):
        sweep(pack)
    (before,) = pack.packs
    pack.die_after = None
    # Planned anew, the trials would share other packs.
    code, said = sweep(pack, "sweep.width=2")
    assert code == 0, said
    assert pack.packs[1:] == [before], "all of them, or the checkpoint means nothing"
    assert pack.restored == [False, True]
    assert f"{died_after} finished" in said or "continuing pack" in said


def test_a_pack_killed_before_its_first_checkpoint_binds_nobody(sweep, tmp_path):
    pack = FakePack()
    pack.die_after = 0
    with pytest.raises(Killed):
        sweep(pack)
    (saved,) = only_sweep(tmp_path).glob("packs/*/3")
    saved.rmdir()
    pack.die_after = None
    code, said = sweep(pack, "sweep.width=2")
    assert code == 0, said
    assert [len(one) for one in pack.packs] == [4, 2, 2]


def test_a_stop_ends_the_sweep_and_the_same_line_continues(sweep):
    pack = FakePack()
    pack.stops = {1}
    code, said = sweep(pack)
    assert code == PREEMPTED
    assert said.count("the same line continues") == 4
    assert Seen.jobs == []
    pack.stops = set()
    code, _ = sweep(pack)
    assert code == 0
    assert pack.packs[0] == pack.packs[1]


def test_damaged_and_foreign_directories_are_refused_and_the_rest_run(sweep, tmp_path):
    pack = FakePack()
    sweep(pack, "sweep.name=mine")
    one, two, *_ = sorted(path for _, _, path in Seen.jobs)
    assert one.parent == tmp_path / "multirun" / "mine"
    result = json.loads((one / "result.json").read_text())
    (one / "result.json").write_text(json.dumps(result))
    (two / "status.json").unlink()
    grid = ("optim.lr=0.1,0.2", "seed=1,2,3")
    code, said = sweep(pack, "sweep.name=mine", grid=grid)
    assert code == CORRUPT
    assert len(pack.packs[1]) == 2, "the new seed's"
    assert "result.json has sha256" in said
    assert "2 failed" in said
    assert "4 done" in said
    code, said = sweep(pack, "sweep.name=mine", "run.force=true", grid=grid)
    assert code == 0, said
    assert len(pack.packs[2]) == 2, "moved aside, and started over"
    assert pack.restored == [False, False, False]


def test_a_trial_that_another_process_writes_is_left_to_it(sweep, tmp_path):
    pack = FakePack()
    pack.stops = {1}
    sweep(pack)
    pack.stops = set()
    trial = next(p.parent for p in only_sweep(tmp_path).glob("*/.hydra"))
    lock = Lock(trial)
    code, said = sweep(pack)
    assert code == CANNOT_WRITE, "a pack goes on with all its trials or not at all"
    assert "being written by" in said
    assert "4 failed" in said
    shutil.rmtree(only_sweep(tmp_path) / "packs")
    code, said = sweep(pack)
    lock.release()
    assert code == CANNOT_WRITE
    assert len(pack.packs[-1]) < 4, "of a pack to begin, the others run"
    assert "1 failed" in said
    count = len(pack.packs)
    lock = Lock(only_sweep(tmp_path))
    code, said = sweep(pack)
    lock.release()
    assert code == CANNOT_WRITE, "two processes, one sweep"
    assert len(pack.packs) == count


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mesh=one,all"], "same trial"),
        (["run.directory=here"], "both live in"),
        (["sweep.width=0"], "sweep.width must be at least 1"),
        (["sweep.width=2,3"], "hold for all jobs"),
        (["sweep.name=a/b"], "names a directory"),
        (["sweep.on_failure=shrug"], "on_failure must be"),
        (["run.preview=true"], "sweep.dry_run=true"),
        (["optim.learning_rate=1"], "learning_rate"),
        (["data.path=nowhere.csv,elsewhere.csv", "optim.lr=-1,2"], "out of range"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(sweep, arguments, told):
    pack = FakePack()
    code, said = sweep(pack, *arguments, grid=("seed=1,2",))
    assert code == BAD_INPUT, said
    assert told in said
    assert "Traceback" not in said
    assert pack.packs == []


def test_a_pack_wider_than_memory_is_refused(sweep):
    needs = lambda settings, widths: {count: count * 2**30 for count in widths}
    arguments = ("sweep.width=4", "sweep.memory_gib=2.5")
    code, said = sweep(FakePack(), *arguments, memory=needs)
    assert code == BAD_INPUT
    assert "at most 2" in said
    pack = FakePack()
    code, said = sweep(pack, "sweep.memory_gib=2.5", memory=needs)
    assert code == 0, said
    assert [len(one) for one in pack.packs] == [2, 2]


def test_nothing_packable_runs_alone_and_says_why(sweep):
    pack = FakePack()
    code, said = sweep(pack, grid=("data.batching.batch_size=8,16",))
    assert code == 0, said
    assert [len(one) for one in pack.packs] == [1, 1]
    assert said.count("runs alone") == 2
    assert "data.batching.batch_size=16" in said


def test_several_launches_of_one_line_add_up(sweep):
    """A sweeper may hand its jobs over in batches; codes add up over them."""
    pack = FakePack()
    code, said = sweep(pack, "hydra.sweeper.max_batch_size=2")
    assert code == 0, said
    assert [len(one) for one in pack.packs] == [2, 2]
    assert [number for number, _, _ in Seen.jobs] == [0, 1, 2, 3]


def test_secrets_reach_no_file_of_a_sweep(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "canary-0123456789")
    pack = FakePack()
    pack.fails = {1, 2}
    _, said = sweep(pack, "track.group=canary-0123456789")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if path.name == "multirun.yaml"]
    for path in files:
        assert b"canary-0123456789" not in path.read_bytes(), path
    assert "canary-0123456789" not in said


def test_a_dry_run_shows_the_plan_and_runs_nothing(sweep, tmp_path):
    pack, asked = FakePack(), []

    def needs(settings, widths):
        asked.extend(widths)
        return {count: count * 3 * 2**20 for count in widths}

    grid = ("delta.rank=2,4", "seed=1,2", "data.batching.buckets=[16]")
    code, said = sweep(pack, "sweep.dry_run=true", grid=grid, memory=needs)
    assert code == 0, said
    assert pack.packs == []
    assert Seen.jobs == []
    assert not list(tmp_path.rglob("status.json"))
    assert "4 trials, 0 finished, 0 refused; 1 packs, 1 steps to compile" in said
    assert "12 MiB" in said
    assert "3,915" in said
    assert asked == [4], "one compile for each program"


def test_a_dry_run_without_the_launcher_trains_nothing(sweep):
    code, said = sweep(FakePack(), "hydra/launcher=basic", "sweep.dry_run=true")
    assert code == BAD_INPUT
    assert "-m hydra/launcher=packed" in said


def test_four_trials_trained_for_real(sweep, world):
    small = ("delta.rank=4", "optim.epochs=1", "data.batching.buckets=[16]")
    code, said = sweep(run_pack, *small, memory=pack_memory)
    assert code == 0, said
    assert [job.status for _, job, _ in Seen.jobs] == [JobStatus.COMPLETED] * 4
    for _, job, directory in Seen.jobs:
        record = load_record(directory)
        assert job.return_value == objective(record.result)
        assert record.config["optim"]["lr"] == job.cfg.optim.lr
        assert (
            f"seed={job.cfg.seed}" in (directory / ".hydra/overrides.yaml").read_text()
        )


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


def test_what_a_worker_meets_is_met_as_it_is_here(sweep, elsewhere):
    engine, pack = elsewhere(), FakePack()
    pack.widest, pack.bugs = 1, {4}
    code, said = sweep(pack, *FAR, grid=MANY)
    assert code == BUG
    assert "ZeroDivisionError: a bug" in said
    assert "in __call__" in said, "with its trace"
    assert "6 trials: 5 done, 1 failed" in said
    assert [len(seeds) for seeds in engine.begun].count(1) == 6, "halved"


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
