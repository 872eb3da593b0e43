"""What the tests of several processes share: the tiny world, and its runs on one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import pytest
from crew import Crew
from lives import LONG
from tiny_run import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The world; what one child compiles, the others find compiled."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def crew(world, tmp_path):
    """Starts commands of one and of several processes."""
    found = Crew(world, tmp_path)
    yield found
    found.end()


@pytest.fixture(scope="session")
def undisturbed(world, tmp_path_factory):
    """The directory of a long run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    crew = Crew(world, folder)
    assert crew.alone(folder / "run", *LONG) == 0, crew.said(0)
    return folder / "run"
