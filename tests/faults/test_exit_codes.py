"""Every exit code is one that a command really ends with, and the page says so."""

import re
from pathlib import Path

import pytest
from lives import LONG, command
from tiny_run import SMALL

from lowrank.core import errors

pytestmark = pytest.mark.faults

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
PLUGINS = {
    "hanging": "import time\nfrom lowrank.train.pack import Pack\n"
    "Pack.__call__ = lambda *args: time.sleep(90)\n",
    "broken": "raise ZeroDivisionError('a bug')\n",
}
#: Exit code -> overrides that lead to it.
WAYS = {
    0: ("run.directory={undisturbed}",),
    errors.BUG: ("plugins=[broken]",),
    errors.BAD_INPUT: ("delta.rank=0",),
    errors.CANNOT_WRITE: ("run.directory=/proc/nowhere/run",),
    errors.PREEMPTED: ("loop.stop_after=2",),
    errors.HANG: ("plugins=[hanging]", "run.hang_seconds=1"),
    errors.NON_FINITE: ("optim.lr=1e38",),
    errors.CORRUPT: ("run.directory={undisturbed}", "delta.alpha=8"),
}


@pytest.mark.parametrize("code", WAYS)
@pytest.mark.fault(
    "each way a command can end",
    "its own exit code, and a message without a stack trace unless it is a bug",
)
def test_a_command_ends_with_its_code(world, undisturbed, tmp_path, outcomes, code):
    for name, source in PLUGINS.items():
        (tmp_path / f"{name}.py").write_text(source)
    ways = [way.format(undisturbed=undisturbed) for way in WAYS[code]]
    if not any(way.startswith("run.directory") for way in ways):
        ways.append(f"run.directory={tmp_path / 'run'}")
    arguments = [*SMALL, *world.overrides("delta.rank=4", *LONG, *ways)]
    log = tmp_path / "log"
    assert command(world, "train", arguments, log, tmp_path) == code, log.read_text()
    told = log.read_text()
    assert ("Traceback" in told) == (code == errors.BUG), told
    outcomes(f"exit {code}")


def test_the_page_lists_exactly_these_codes():
    listed = re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.M)
    assert sorted(map(int, listed)) == sorted(WAYS)
