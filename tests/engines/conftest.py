"""What the tests of engines share: the tiny world and a sweep that ran in one process.

They need the extras `ray` and `slurm` (make test-engines), and fail without them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

import pytest
from tiny_run import ROOT, SMALL, World

LIFETIME = 280
#: Four trials, two packs, 36 steps with 9 checkpoints each.
GRID = ("optim.lr=0.005,0.01", "seed=1,2")
LONG = (
    "delta.rank=4",
    "delta.dropout=0.2",
    "data.batching.buckets=[16]",
    "optim.epochs=4",
    "loop.checkpoint_every=4",
    "loop.evaluate_every=10",
    "sweep.width=2",
)


class Sweep:
    """A command that runs a sweep in a folder, as its users do."""

    def __init__(self, world, folder, *arguments):
        where = [one for one in world.overrides() if not one.startswith("run.root")]
        line = ["-m", "hydra/launcher=packed", *SMALL, *where, *LONG, *GRID]
        line += [f"hydra.sweep.dir={folder}", *arguments]
        self.folder, self.log = folder, folder.parent / f"{folder.name}.log"
        with open(self.log, "w") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *line],
                cwd=ROOT,
                env=world.environment | {"PYTHONPATH": _path()},
                stdout=log,
                stderr=log,
            )

    def wait(self):
        """Its exit code."""
        return self._child.wait(LIFETIME)

    def until(self, condition):
        """What `condition` finds, once it finds something; the sweep must be alive."""
        end = time.monotonic() + LIFETIME
        while time.monotonic() < end:
            if found := condition():
                return found
            assert self._child.poll() is None, f"it ended too early: {self.said()}"
            time.sleep(0.02)
        raise TimeoutError(self.said())

    def signal(self, number):
        self._child.send_signal(number)

    def end(self):
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def said(self):
        return self.log.read_text()


def _path():
    """Workers find the package where this process finds it."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The world; what one process compiles, the others find compiled."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def undisturbed(world, tmp_path_factory):
    """The folder of the sweep as it is in one process."""
    sweep = Sweep(world, tmp_path_factory.mktemp("sweeps") / "undisturbed")
    assert sweep.wait() == 0, sweep.said()
    return sweep.folder


@pytest.fixture
def start(world, tmp_path):
    """Starts a sweep in a fresh folder; ends it with the test."""
    begun = []

    def started(*arguments):
        begun.append(Sweep(world, tmp_path / "sweep", *arguments))
        return begun[-1]

    yield started
    for one in begun:
        one.end()
