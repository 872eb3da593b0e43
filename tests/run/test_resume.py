"""A run that was interrupted, however rudely, ends as if it never had been.

The interrupted trial and the undisturbed one run in processes of their own: a kill
must not find anything of this process.
"""

import json
import os
import signal

import pytest
from tiny_run import position, same_outcome, start_child, wait_until

from lowrank.core.errors import (
    CORRUPT,
    PREEMPTED,
    BadInput,
    CannotWrite,
    Corrupt,
    Preempted,
)
from lowrank.io.files import Lock
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

#: Long enough to be interrupted: 14 epochs, a checkpoint after every fourth step.
LONG = (
    "optim.epochs=14",
    "loop.checkpoint_every=4",
    "loop.evaluate_every=10",
    "delta.dropout=0.2",
    "optim.lr=0.005",
)
STEPS = 14 * 9


@pytest.fixture(scope="module")
def undisturbed(world):
    directory = world.runs / "undisturbed"
    config = world.config(f"run.directory={directory}", *LONG)
    child = start_child(world, config, world.runs / "undisturbed.log")
    child.join(120)
    assert child.exitcode == 0, (world.runs / "undisturbed.log").read_text()
    return directory


def status(directory):
    return json.loads((directory / "status.json").read_text())


# The fault suite kills and signals at any moment; this is for `make test-full`.
@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_starts_over(world, undisturbed):
    directory, log = world.runs / "early", world.runs / "early.log"
    config = world.config(f"run.directory={directory}", *LONG)
    child = start_child(world, config, log)
    assert wait_until(lambda: (directory / "status.json").exists(), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    # As if it had logged something that no checkpoint knows of.
    (directory / "metrics.jsonl").write_text('{"step": 2, "train/loss": 9.0}\n{"ste')
    child = start_child(world, config, log)
    child.join(120)
    assert child.exitcode == 0, log.read_text()
    same_outcome(undisturbed, directory)


# The fault suite kills and signals at any moment; this is for `make test-full`.
@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(world, undisturbed):
    directory, log = world.runs / "asked", world.runs / "asked.log"
    config = world.config(f"run.directory={directory}", *LONG)
    child = start_child(world, config, log)
    assert wait_until(lambda: position(directory) > 8, child), log.read_text()
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == PREEMPTED, log.read_text()
    assert 8 < position(directory) < STEPS
    assert status(directory)["status"] == "preempted"
    assert "SIGTERM" in status(directory)["reason"]
    # The second life is asked twice, which ends it at once.
    child = start_child(world, config, log)
    start = position(directory)
    assert wait_until(lambda: position(directory) > start, child), log.read_text()
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == PREEMPTED, log.read_text()
    assert start < position(directory) < STEPS
    child = start_child(world, config, log)
    child.join(120)
    assert child.exitcode == 0, log.read_text()
    same_outcome(undisturbed, directory)


@pytest.mark.slow
def test_a_rehearsal_that_stops_is_continued_without_the_stop(world, finished):
    directory = world.runs / "rehearsed"
    given = [f"run.directory={directory}", "seed=3"]
    with pytest.raises(Preempted, match="stop_after at step 7 of 18"):
        run_trial(world.config(*given, "loop.stop_after=7"))
    assert position(directory) == 7
    assert status(directory)["status"] == "preempted"
    # Once more with the stop: it is behind the run and stops nothing.
    run_trial(world.config(*given, "loop.stop_after=7"))
    same_outcome(finished[0], directory)


@pytest.mark.slow
def test_what_was_left_after_training_is_done_without_training(world, finished):
    directory = world.runs / "judged-again"
    given = [f"run.directory={directory}", "seed=3"]
    run_trial(world.config(*given))
    costs = (directory / "costs.json").read_text()
    for name in ("result.json", "predictions/test.npz"):
        (directory / name).unlink()
    stored = read_sealed(directory / "status.json") | {"status": "running"}
    write_sealed(directory / "status.json", stored)
    run_trial(world.config(*given))
    same_outcome(finished[0], directory)
    assert (directory / "costs.json").read_text() == costs, "this process timed nothing"


# Another run in the same place.


def changed_table(world, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(world.table.read_text())
    return table


@pytest.mark.fault(
    "resume with changed data",
    "exit 78 naming the field; nothing is changed",
)
def test_changed_data_is_refused(world, tmp_path):
    table, directory = changed_table(world, tmp_path), tmp_path / "run"
    given = [f"run.directory={directory}", f"data.path={table}"]
    with pytest.raises(Preempted):
        run_trial(world.config(*given, "loop.stop_after=4"))
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    table.write_text(table.read_text().replace("word1 ", "word2 ", 1))
    with pytest.raises(Corrupt, match="its data fingerprint") as caught:
        run_trial(world.config(*given))
    assert caught.value.exit_code == CORRUPT
    after = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    before.pop(directory / ".lock", None)
    after.pop(directory / ".lock", None)
    assert after == before, "a refusal changes nothing"


@pytest.mark.faults
@pytest.mark.fault(
    "resume on another base",
    "exit 78 unless forced; what was there is moved aside",
)
def test_another_base_is_refused_unless_forced(world, tmp_path):
    from tiny_run import write_base

    base, directory = write_base(tmp_path / "base"), tmp_path / "run"
    given = [f"run.directory={directory}", f"base.source={base}", "delta=head"]
    run_trial(world.config(*given))
    write_base(base, seed=1)
    with pytest.raises(Corrupt, match="its base fingerprint"):
        run_trial(world.config(*given))
    result = run_trial(world.config(*given, "run.force=true"))
    assert result["steps"] == 18
    assert (tmp_path / "run.old-1" / "result.json").exists()


def test_another_config_is_refused_and_named(world, finished):
    directory, _ = finished
    with pytest.raises(Corrupt, match=r"delta\.alpha: 16\.0 -> 8\)"):
        run_trial(world.config(f"run.directory={directory}", "seed=3", "delta.alpha=8"))


def test_two_runs_do_not_share_a_directory(world, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    lock = Lock(directory)
    with pytest.raises(CannotWrite, match="being written by"):
        run_trial(world.config(f"run.directory={directory}"))
    lock.release()
    assert {p.name for p in directory.iterdir()} == {".lock"}


@pytest.mark.slow
def test_a_damaged_checkpoint_makes_way_for_the_one_before(world, finished, tmp_path):
    directory = tmp_path / "run"
    given = [f"run.directory={directory}", "seed=3"]
    with pytest.raises(Preempted):
        run_trial(world.config(*given, "loop.stop_after=8"))
    newest = directory / "checkpoints" / "8"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    run_trial(world.config(*given))
    same_outcome(finished[0], directory)


def test_continuing_needs_the_same_directory_kind(world, tmp_path):
    with pytest.raises(BadInput, match="path on a file system"):
        run_trial(world.config("run.directory=gs://bucket/run"))
