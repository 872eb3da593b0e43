"""What the tests of faults share: the tiny world and an undisturbed run in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

import pytest
from lives import live, long_config
from tiny_run import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The world; what one child compiles, the others find compiled."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def undisturbed(world):
    """The directory of the run as it is without faults."""
    directory, log = world.runs / "undisturbed", world.runs / "undisturbed.log"
    assert live(world, long_config(world, directory), log) == 0, log.read_text()
    return directory


@pytest.fixture
def config_of(world):
    """Makes the config of the long run in a directory."""
    return lambda directory, *overrides: long_config(world, directory, *overrides)
