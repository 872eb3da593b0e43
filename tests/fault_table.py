"""The table of faults: what was done to a run, what is promised, what came of it.

A test that stands for a fault is marked ``@pytest.mark.fault(fault, promise)``. It
counts every try in the fixture `outcomes`; a marked test without that fixture counts
as one try that was kept. Tests of one fault share a row. With ``--write-fault-table
FILE`` the rows of the tests that ran replace those between the two marks in FILE.
"""

import ast
import collections
import json
from pathlib import Path

import pytest

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
_KEY = "fault"


def pytest_addoption(parser):
    parser.addoption("--write-fault-table", metavar="FILE", type=Path)


def pytest_configure(config):
    config.stash[_rows] = {}
    config.stash[_broken] = set()


_rows = pytest.StashKey()
_broken = pytest.StashKey()


class Outcomes(collections.Counter):
    """How often each outcome occurred."""

    def __call__(self, outcome):
        self[outcome] += 1


@pytest.fixture
def outcomes(request):
    """Counts the tries of a fault by outcome; a test that counts none fails."""
    counted = Outcomes()
    yield counted
    assert counted.total(), "nothing was tried"
    request.node.user_properties.append((_KEY, json.dumps(counted)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    mark = item.get_closest_marker("fault")
    if mark is not None and call.when == "call":
        item.user_properties.append((f"{_KEY} row", json.dumps(mark.args)))
    yield


def pytest_runtest_logreport(report):
    """Where workers run the tests, this is called in their parent, with the same."""
    config = _config[0]
    given = dict(getattr(report, "user_properties", ()))
    if f"{_KEY} row" not in given:
        return
    fault, promise = json.loads(given[f"{_KEY} row"])
    if report.failed:
        config.stash[_broken].add(fault)
    if report.when == "teardown":
        counted = json.loads(given.get(_KEY, '{"kept": 1}'))
        row = config.stash[_rows].setdefault(fault, (promise, Outcomes()))
        row[1].update(counted)


_config = []


def pytest_sessionstart(session):
    _config[:] = [session.config]


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows, broken = config.stash[_rows], config.stash[_broken]
    for fault, (_, counted) in rows.items():
        told = "BROKEN PROMISE" if fault in broken else _told(counted)
        terminalreporter.write_line(f"{fault}: {told}")
    if (path := _target(config)) is not None:
        good = {fault: row for fault, row in rows.items() if fault not in broken}
        write(path, good, faults_in(Path(__file__).parent))
        terminalreporter.write_line(f"wrote {len(good)} faults to {path}")


def _target(config):
    return config.getoption("--write-fault-table")


def _told(counted):
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(counted.items()))


def write(path, rows, known=None):
    """Puts `rows` between the marks.

    Rows of faults that were not tried this time stay, if they are `known` still.
    """
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    cells = {
        fault: (promise, counted.total(), _told(counted))
        for fault, (promise, counted) in rows.items()
    }
    old = faults_listed(path)
    kept = {fault: row for fault, row in old.items() if fault in (known or ())}
    lines = ["| fault | promise | tries | outcome |", "|---|---|---|---|"]
    for fault, row in sorted({**kept, **cells}.items()):
        lines.append("| " + " | ".join(map(str, (fault, *row))) + " |")
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def faults_in(folder):
    """{fault: promise} of all marks in the tests of a folder, without running them."""
    found = {}
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "pytest.mark.fault":
                fault, promise = map(ast.literal_eval, node.args)
                found[fault] = promise
    return found


def faults_listed(path):
    """{fault: (promise, tries, outcome)} of the rows between the marks of a page."""
    rows = path.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[c.strip() for c in row.strip("| ").split(" | ")] for row in rows[3:]]
    return {fault: (promise, int(n), told) for fault, promise, n, told in cells}
