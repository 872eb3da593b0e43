"""A run directory says whose it is, has one writer and holds no half-written file."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from lowrank.core.errors import BadInput, CannotWrite, Corrupt, NonFinite, Preempted
from lowrank.io import files
from lowrank.io.environment import describe_source, redact_command
from lowrank.io.files import Lock, write_json_atomically
from lowrank.io.record import Record
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.io.view import load_record

CONFIG = {"optim": {"rate": 1e-3, "steps": 10}, "seed": 1, "name": "a"}
IDENTITY = {"config": "c1", "base": "b1", "data": "d1", "code": "k1"}


def open_at(directory, **changes) -> Record:
    settings = {"config": CONFIG, "identity": IDENTITY} | changes
    return Record.open(directory, **settings)


def finish(directory) -> None:
    with open_at(directory) as record:
        record.result({"accuracy": 0.5})


def test_a_finished_run_can_be_read_back_whole(tmp_path):
    with open_at(tmp_path / "run") as record:
        record.write_json("costs.json", {"flops": np.int64(7), "loss/token": np.nan})
        record.save_arrays("ranks", **{"layer/0/query": np.arange(3)})
        record.save_predictions("test", ids=np.arange(2), logits=np.ones((2, 3)))
        record.path("metrics.jsonl").write_text(
            '{"step": 1, "time": 2.0, "loss": 3.0}\n'
        )
        record.result({"accuracy": np.float32(0.5), "steps": 10})
    view = load_record(tmp_path / "run")
    assert view.config == CONFIG
    assert view.status["status"] == "done"
    assert view.status["identity"] == IDENTITY
    assert view.result == {"accuracy": 0.5, "steps": 10}
    assert view.costs == {"flops": 7, "loss/token": "NaN"}
    assert view.metrics.to_dict("list") == {"step": [1], "time": [2.0], "loss": [3.0]}
    assert view.splits() == ("test",)
    np.testing.assert_array_equal(view.predictions("test")["logits"], np.ones((2, 3)))
    np.testing.assert_array_equal(view.arrays("ranks")["layer/0/query"], [0, 1, 2])
    environment = view.environment
    assert environment["packages"]["jax"]
    assert environment["backend"] == "cpu"
    assert len(environment["devices"]) == 8


def test_a_finished_run_is_skipped_and_left_as_it_is(tmp_path):
    finish(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"}
    with open_at(tmp_path) as record:
        assert record.finished == {"accuracy": 0.5}
        with pytest.raises(BadInput, match="never replaced"):
            record.result({"accuracy": 1.0})
    with pytest.raises(ValueError, match="later"), open_at(tmp_path):
        raise ValueError("a later reader fails")
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"}
    assert after == before


def test_an_unfinished_run_is_continued_with_one_more_attempt(tmp_path):
    with open_at(tmp_path) as record:
        assert (record.attempt, record.finished) == (1, None)
        started = record._status["started"]
    with open_at(tmp_path, force=True) as record:
        assert record.attempt == 2
        assert record._status["started"] == started
    assert (tmp_path / "environment-1.json").exists()
    assert (tmp_path / "environment.json").exists()


def test_a_kill_between_result_and_status_still_counts_as_done(tmp_path):
    finish(tmp_path)
    status = read_sealed(tmp_path / "status.json")
    write_sealed(tmp_path / "status.json", status | {"status": "running"})
    open_at(tmp_path).close()
    assert load_record(tmp_path).status["status"] == "done"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("broke"), "failed"),
        (NonFinite("loss is nan"), "failed"),
        (Preempted("asked to stop"), "preempted"),
        (KeyboardInterrupt(), "preempted"),
    ],
)
def test_an_exception_becomes_the_status_and_goes_on(tmp_path, error, status):
    with pytest.raises(type(error)), open_at(tmp_path):
        raise error
    found = load_record(tmp_path).status
    assert found["status"] == status
    assert found["reason"] == f"{type(error).__name__}: {error}"
    open_at(tmp_path).close()


def test_a_run_that_ends_without_a_result_has_failed(tmp_path):
    with open_at(tmp_path):
        assert load_record(tmp_path).status["status"] == "running"
    assert load_record(tmp_path).status["reason"] == "the run ended without a result"


@pytest.mark.parametrize("field", sorted(IDENTITY))
def test_a_directory_of_another_run_is_refused_by_the_field_that_differs(
    tmp_path, field
):
    finish(tmp_path)
    changed = {"identity": IDENTITY | {field: "other"}}
    with pytest.raises(
        Corrupt, match=f"{field} fingerprint.*1'.*other.*force=true"
    ) as e:
        open_at(tmp_path, **changed)
    assert e.value.exit_code == 78


def test_a_refusal_names_the_settings_that_changed(tmp_path):
    finish(tmp_path)
    config = CONFIG | {"optim": {"rate": 0.5, "steps": 10}}
    with pytest.raises(Corrupt, match=r"config: optim.rate: 0.001 -> 0.5\)"):
        open_at(tmp_path, config=config, identity=IDENTITY | {"config": "c2"})


def test_force_moves_the_old_run_aside_and_deletes_nothing(tmp_path):
    run = tmp_path / "run"
    finish(run)
    (run / ".hydra").mkdir()
    (run / "train.log").write_text("log")
    for number in (1, 2):
        identity = IDENTITY | {"base": f"b{number + 1}"}
        with open_at(run, identity=identity, force=True) as record:
            assert record.finished is None
            record.result({"number": number})
    assert (
        json.loads((tmp_path / "run.old-1/result.json").read_text())["accuracy"] == 0.5
    )
    assert json.loads((tmp_path / "run.old-2/result.json").read_text()) == {"number": 1}
    assert load_record(run).result == {"number": 2}
    assert (run / ".hydra").is_dir()
    assert (run / "train.log").exists()


@pytest.mark.parametrize("name", ["status.json", "result.json"])
def test_a_damaged_file_is_an_error_until_forced_aside(tmp_path, name):
    run = tmp_path / "run"
    finish(run)
    (run / name).write_text('{"half')
    with pytest.raises(Corrupt, match=name):
        open_at(run)
    with open_at(run, force=True) as record:
        assert record.finished is None
    assert (tmp_path / "run.old-1" / name).read_text() == '{"half'


def test_run_files_without_a_status_are_not_taken_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(Corrupt, match=r"status\.json"):
        open_at(tmp_path)


@pytest.mark.parametrize("schema", [0, 2, None])
def test_another_schema_is_named(tmp_path, schema):
    finish(tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"schema": schema}))
    for reader in (load_record, open_at):
        with pytest.raises(Corrupt, match=f"schema {schema}.*reads schema 1"):
            reader(tmp_path)


def test_a_second_writer_in_this_process_is_refused(tmp_path):
    with open_at(tmp_path):
        with pytest.raises(CannotWrite, match=f"pid {os.getpid()} on ") as e:
            open_at(tmp_path, force=True)
        assert e.value.exit_code == 73
    open_at(tmp_path).close()


def test_who_has_just_taken_a_lock_is_named_a_moment_later(tmp_path, monkeypatch):
    lock, waited = Lock(tmp_path), []
    lock.path.write_text("")

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            lock.path.write_text("pid 7 on a since then\n")

    monkeypatch.setattr(files.time, "sleep", wait)
    with pytest.raises(CannotWrite, match="being written by pid 7 on a since then"):
        Lock(tmp_path)
    assert len(waited) == 2
    lock.path.write_text("")
    with pytest.raises(CannotWrite, match="being written by an unnamed process"):
        Lock(tmp_path)
    assert sum(waited[2:]) == pytest.approx(1.0)
    lock.release()


@pytest.mark.fault(
    "a run directory whose writer was killed",
    "free at once; no stale lock",
)
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from lowrank.io.files import Lock
        lock = Lock(Path(sys.argv[1]))
        print("held", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(CannotWrite, match=f"pid {child.pid} on .* since "):
            open_at(tmp_path)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    open_at(tmp_path).close()


@pytest.mark.parametrize("where", ["file/run", "file", "/proc/nowhere/run"])
def test_an_unwritable_place_is_named_before_anything_else(tmp_path, where):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWrite, match="choose another run directory") as e:
        open_at(tmp_path / where)
    assert where.split("/")[-1] in str(e.value)


WRITER = """
import os, signal, sys
from pathlib import Path
from lowrank.io.files import unfinished_folder, write_atomically
def write(file):
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[1])
write_atomically(path if path.suffix else unfinished_folder(path) / "a.json", write)
"""


@pytest.mark.faults
@pytest.mark.parametrize("finished", [False, True])
def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path, finished):
    if finished:
        finish(tmp_path)
    else:
        open_at(tmp_path).close()
    for name in ("status.json", "predictions/test.npz", "adapter"):
        subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / name)])
    (tmp_path / ".mine.tmp").write_text("of the user")
    left = lambda: sorted(p.name[-10:] for p in tmp_path.rglob(".*.tmp"))
    own = ["a.json.tmp", "dapter.tmp", "s.json.tmp", "st.npz.tmp"]
    assert left() == [".mine.tmp", *own]
    open_at(tmp_path).close()
    assert left() == [".mine.tmp"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "x.json"
    write_json_atomically(path, {"old": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(CannotWrite, match=r"x\.json"):
            write_json_atomically(path, {"new": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "name", ["../x.json", "a/b.json", "", ".x.json", "status.json", "x"]
)
def test_a_name_that_leaves_the_directory_or_is_taken_is_refused(tmp_path, name):
    with open_at(tmp_path / "run") as record, pytest.raises(BadInput, match="name"):
        record.write_json(name, {})
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_predictions_that_need_pickle_or_differ_in_length_are_refused(tmp_path):
    import ml_dtypes

    with open_at(tmp_path) as record:
        with pytest.raises(BadInput, match="pickle"):
            record.save_predictions("test", ids=np.array([{}, None], object))
        with pytest.raises(BadInput, match="float32"):
            record.save_predictions("test", x=np.ones(2, ml_dtypes.bfloat16))
        with pytest.raises(BadInput, match="one row per example"):
            record.save_predictions("test", ids=np.ones(2), logits=np.ones((3, 2)))
        with pytest.raises(BadInput, match="JSON cannot hold"):
            record.write_json("costs.json", {"a": np.ones(2)})
    assert load_record(tmp_path).splits() == ()
    with pytest.raises(BadInput, match="no predictions"):
        load_record(tmp_path).predictions("test")


@pytest.mark.fault(
    "pickle in an array file",
    "refused",
)
def test_a_pickled_npz_is_never_loaded(tmp_path):
    open_at(tmp_path).close()
    (tmp_path / "predictions").mkdir()
    np.savez(tmp_path / "predictions/test.npz", x=np.array([{}], object))
    with pytest.raises(Corrupt, match=r"test\.npz"):
        load_record(tmp_path).predictions("test")


def test_metrics_tolerate_a_cut_last_line_and_nothing_else(tmp_path, caplog):
    open_at(tmp_path).close()
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "time": 0.5, "loss": "NaN"}\n{"time": 1, "summary": {"a": 1}}\n'
    path.write_text(good + '{"step": 2, "ti')
    metrics = load_record(tmp_path).metrics
    assert list(metrics["step"]) == [1]
    assert np.isnan(metrics["loss"][0])
    assert "cut short" in caplog.text
    path.write_text('{"step": 1, "ti\n' + good)
    with pytest.raises(Corrupt, match="line 1 of"):
        _ = load_record(tmp_path).metrics
    path.unlink()
    assert list(load_record(tmp_path).metrics.columns) == ["step", "time"]


def test_no_canary_of_config_environment_command_or_error_reaches_the_disk(
    tmp_path, monkeypatch
):
    canaries = [f"canary{i}-{'z' * 20}" for i in range(5)]
    monkeypatch.setenv("SERVICE_API_KEY", canaries[0])
    monkeypatch.setattr(
        sys, "argv", ["run.py", f"hub.token={canaries[1]}", "--password", canaries[2]]
    )
    config = CONFIG | {"hub": {"token": canaries[3], "url": f"http://{canaries[0]}@x"}}

    def run():
        with open_at(tmp_path, config=config) as record:
            record.write_json("costs.json", {"note": f"api_key={canaries[4]}"})
            raise ValueError(f"{canaries[0]} and password={canaries[4]}")

    with pytest.raises(ValueError, match="canary"):
        run()
    text = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"canary" not in text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


def test_only_secrets_are_taken_from_the_command_line():
    argv = [
        "x",
        "--token",
        "abc",
        "--steps",
        "3",
        "seed=1",
        "api_key=k",
        "--token",
        "--v",
    ]
    assert redact_command(argv) == [
        "x",
        "--token",
        "<redacted>",
        "--steps",
        "3",
        "seed=1",
        "api_key=<redacted>",
        "--token",
        "--v",
    ]


def test_the_source_hash_sees_tracked_and_untracked_changes(tmp_path):
    def git(*words):
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
        ]
        subprocess.run([*command, *words], check=True, capture_output=True)

    assert describe_source(tmp_path) is None
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    clean = describe_source(tmp_path)
    (tmp_path / "a.py").write_text("2")
    changed = describe_source(tmp_path)
    (tmp_path / "b.py").write_text("3")
    added = describe_source(tmp_path)
    (tmp_path / "b.py").write_text("4")
    edited = describe_source(tmp_path)
    assert clean["dirty"] is None
    assert len(clean["commit"]) == 40
    assert len({one["dirty"] for one in (clean, changed, added, edited)}) == 4


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomically(path, {"old": 1})
    with open(path) as reader:
        write_json_atomically(path, {"new": "x" * 1000})
        assert json.load(reader) == {"old": 1}
    assert json.loads(path.read_text()) == {"new": "x" * 1000}


def test_a_kill_while_moving_aside_leaves_the_directory_refusable(
    tmp_path, monkeypatch
):
    run = tmp_path / "run"
    finish(run)
    (run / "wandb").mkdir()
    moved, rename = [], Path.rename

    def record_rename(self, target):
        moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", record_rename)
    open_at(run, identity=IDENTITY | {"base": "b2"}, force=True).close()
    assert moved[-1] == "status.json"
    assert sorted(moved[:-1]) == [
        "SHA256SUMS",
        "config.yaml",
        "environment.json",
        "result.json",
        "wandb",
    ]
