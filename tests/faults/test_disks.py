"""Disks that are full, directories that are none, and two writers of one."""

import json
import time

import pytest
from lives import Fault, litter, live, same_run, start

from lowrank.core.errors import CANNOT_WRITE
from lowrank.io.checkpoints import Checkpoints

pytestmark = pytest.mark.faults

#: (place, call, bytes that still fit into one file): what fails first.
FULL = {
    "before anything": ("data preparation", 1, 0),
    "tokens": ("tokens", 1, 100),
    "first status": ("record opened", 1, 10),
    "first checkpoint": ("checkpoint", 1, 2_000),
    "later checkpoint": ("checkpoint", 4, 2_000),
    "in a checkpoint's list of hashes": ("checkpoint", 3, 6_000),
    "metrics": ("step", 9, 400),
    "predictions": ("judging", 1, 100),
    "costs": ("costs", 1, 100),
    "adapter": ("adapter", 1, 1_000),
    "result": ("result", 1, 100),
}


@pytest.mark.parametrize("what", FULL)
@pytest.mark.fault(
    "disk full",
    "exit 73 with the path; every stored step and file stays whole; with space again "
    "the same command ends in the same bits",
)
def test_a_full_disk(world, undisturbed, config_of, tmp_path, outcomes, what):
    place, call, size = FULL[what]
    directory, log = tmp_path / "run", tmp_path / "log"
    fresh = [f"run.cache={tmp_path / 'cache'}"]
    config = config_of(directory, *(fresh if "data" in place or "tok" in place else []))
    code = live(world, config, log, Fault("full", place, call, None, size))
    assert code == CANNOT_WRITE, log.read_text()
    end = time.monotonic() + 10
    while str(tmp_path) not in log.read_text():
        assert time.monotonic() < end, "the message names no path"
        time.sleep(0.05)
    assert not (directory / "result.json").exists()
    if (directory / "checkpoints").exists():
        stored = Checkpoints(directory / "checkpoints", identity={})
        assert stored.good_steps() == stored.stored_steps()
    assert live(world, config, log) == 0, log.read_text()
    same_run(undisturbed, directory)
    assert not litter(tmp_path)
    outcomes(f"exit 73 ({what})")


@pytest.mark.fault(
    "run or cache directory that cannot be: a file, below a file, /proc, /dev/null, a "
    "name too long, no link's end",
    "exit 73 before anything is compiled; nothing is changed",
)
def test_an_impossible_directory(world, config_of, tmp_path, outcomes):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "nowhere")
    places = [
        tmp_path / "file", tmp_path / "file" / "run", "/proc/nowhere/run",
        "/dev/null/run", tmp_path / ("n" * 300), tmp_path / "link",
    ]  # fmt: skip
    log = tmp_path / "log"
    for place in places:
        for setting in ("run.directory", "run.cache"):
            given = {"run.directory": tmp_path / "run", setting: place}
            overrides = [f"{name}={value}" for name, value in given.items()]
            code = live(world, config_of("x", *overrides), log)
            assert code == CANNOT_WRITE, (setting, place, log.read_text())
            assert "compiled" not in log.read_text()
            outcomes("exit 73")
    assert (tmp_path / "file").read_text() == "in the way"
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(
    "several writers of one run directory at once",
    "one runs, the others end with 73 naming it; the result has the same bits",
)
def test_two_writers(world, undisturbed, config_of, tmp_path, outcomes):
    directory = tmp_path / "run"
    config = config_of(directory)
    logs = [tmp_path / f"log{number}" for number in range(3)]
    children = [start(world, config, log) for log in logs]
    try:
        for child in children:
            child.join(120)
        codes = sorted(child.exitcode for child in children)
    finally:
        for child in children:
            child.kill()
    assert codes == [0, CANNOT_WRITE, CANNOT_WRITE]
    assert sum("being written by pid" in log.read_text() for log in logs) == 2
    same_run(undisturbed, directory)
    assert json.loads((directory / "status.json").read_text())["attempt"] == 1
    outcomes["exit 73"] += 2
    outcomes("undisturbed")
