"""A multirun through the door: packs, outcomes, resume, refusals, the dry run."""

import json
import shutil

import jax
import pytest
from fake_packs import FakePack, Killed, Seen, only_sweep
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobStatus

from experiments.train import objective
from hydra_plugins.lowrank_packed.composed import Composed
from lowrank.core.errors import (
    BAD_INPUT,
    BUG,
    CANNOT_WRITE,
    CORRUPT,
    NON_FINITE,
    PREEMPTED,
)
from lowrank.io.files import Lock
from lowrank.io.view import load_record
from lowrank.run.packs import pack_memory, run_pack
from lowrank.sweeps.engine import COMPILED
from lowrank.sweeps.launch import PACKS

pytestmark = pytest.mark.long

PLACES = {(lr, seed) for lr in (0.1, 0.2) for seed in (1, 2)}


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


def test_every_job_is_composed_once(sweep, monkeypatch):
    """Sweepers do it to see that it can be, and the launcher takes what they have."""
    seen, load = [], ConfigLoaderImpl.load_sweep_config

    def counted(self, master_config, sweep_overrides):
        seen.append(tuple(sweep_overrides))
        return load(self, master_config, sweep_overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    code, said = sweep(FakePack())
    assert code == 0, said
    assert len(seen) == len({*seen}) == 4


def test_a_config_that_was_taken_is_nobody_elses():
    class Loader:
        def load_sweep_config(self, master_config, sweep_overrides):
            return [master_config, *sweep_overrides]

    loader = Loader()
    composed = Composed(loader)
    checked = [loader.load_sweep_config("m", ["a=1"]) for _ in range(2)]
    taken = [composed.take("m", ["a=1"]) for _ in range(3)]
    assert taken == [["m", "a=1"]] * 3
    assert len({*map(id, taken)}) == 3
    assert {*map(id, checked)} < {*map(id, taken)}


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


@pytest.mark.faults
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


@pytest.mark.faults
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


@pytest.mark.faults
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


@pytest.mark.faults
@pytest.mark.fault(
    "directories of trials that are damaged or another trial's",
    "refused, each with its own message; the others of the sweep are run; exit 78",
)
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


@pytest.mark.faults
@pytest.mark.parametrize("place", range(4))
def test_a_trial_that_another_process_writes_is_left_to_it(sweep, tmp_path, place):
    pack = FakePack()
    pack.stops = {1}
    sweep(pack)
    pack.stops = set()
    trials = sorted(p.parent for p in only_sweep(tmp_path).glob("*/.hydra"))
    lock = Lock(trials[place])
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


@pytest.fixture
def keeps_programs(world):
    """No place for compiled programs is named, so that a sweep has its own."""
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", str(world.compiled))


@pytest.mark.slow
def test_four_trials_trained_for_real(sweep, tmp_path, keeps_programs):
    small = ("delta.rank=4", "optim.epochs=1", "data.batching.buckets=[16]")
    code, said = sweep(run_pack, *small, memory=pack_memory)
    assert code == 0, said
    programs = [*(only_sweep(tmp_path) / PACKS / COMPILED).glob("jit_packed-*-cache")]
    assert len(programs) == 1, "the estimate of its memory has compiled the step"
    assert [job.status for _, job, _ in Seen.jobs] == [JobStatus.COMPLETED] * 4
    for _, job, directory in Seen.jobs:
        record = load_record(directory)
        assert job.return_value == objective(record.result)
        assert record.config["optim"]["lr"] == job.cfg.optim.lr
        assert (
            f"seed={job.cfg.seed}" in (directory / ".hydra/overrides.yaml").read_text()
        )
