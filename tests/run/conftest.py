"""One small world for all tests of whole runs."""

import jax
import pytest
from fake_packs import GRID, Seen, at_the_door
from tiny_run import SMALL, World

from lowrank.run.trial import run_trial


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The world; programs compiled for one test serve the next ones."""
    world = World(tmp_path_factory.mktemp("world"))
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", str(world.compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield world
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def finished(world):
    """The directory of a complete run and what it returned."""
    directory = world.runs / "finished"
    overrides = [f"run.directory={directory}", "seed=3"]
    result = run_trial(world.config(*overrides), ["seed=3", "+api_key=sk-0123456789"])
    return directory, result


@pytest.fixture
def sweep(world, tmp_path, monkeypatch, capfd):
    """Gives a multirun's line: (exit code, stderr). Sweeps live under `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    Seen.jobs.clear()
    where = [one for one in world.overrides() if not one.startswith("run.root")]
    watch = "+hydra.callbacks.seen._target_=fake_packs.Seen"
    with at_the_door(monkeypatch, capfd) as door:

        def given(pack, *arguments, grid=GRID, **more):
            line = ["hydra/launcher=packed", watch, *SMALL, *where, *grid, *arguments]
            return door(pack, *line, **more)

        yield given
