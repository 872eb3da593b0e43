"""One small made-up sweep for all tests of reading, and copies to damage."""

import shutil

import pytest

from experiments.example_sweep import Grid, write_example
from lowrank.sweeps.load import load_sweep

#: 12 trials of the grid, of which one diverges, and 3 with another weight decay.
GRID = Grid(ranks=(2, 8), rates=(1e-3, 4e-3), seeds=(0, 1, 2), decays=(0.0, 0.1))


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The directory; not to be changed."""
    return write_example(tmp_path_factory.mktemp("made") / "up", GRID)


@pytest.fixture
def directory(written, tmp_path):
    """A copy to do anything with."""
    return shutil.copytree(written, tmp_path / "up")


@pytest.fixture
def sweep(directory):
    return load_sweep(directory)
