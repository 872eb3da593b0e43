"""Hydra's own promises about launchers, kept by `packed`, and how it is found."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "hydra_plugins"


@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("packed", ["hydra.job.chdir=true"])]
)
class TestPackedLauncher(LauncherTestSuite):
    """One process, one job after another: these tasks do not say how to pack."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("packed", ["hydra.job.chdir=true", "hydra.sweeper.max_batch_size=2"])],
)
class TestPackedLauncherInBatches(BatchedSweeperTestSuite):
    """The sweeper hands the jobs over in several batches."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=packed"])]
)
class TestPackedIntegration(IntegrationTestSuite):
    """Programs of others, in processes of their own."""


def test_hydra_finds_the_launcher():
    found = {cls.__name__ for cls in Plugins.instance().discover(Launcher)}
    assert "PackedLauncher" in found


def test_discovery_loads_no_jax():
    code = (
        "import sys\n"
        "from hydra.core.plugins import Plugins\n"
        "found = Plugins.instance().class_name_to_class\n"
        "assert 'hydra_plugins.lowrank_packed.packed.PackedLauncher' in found\n"
        "heavy = {'jax', 'flax', 'numpy', 'lowrank.core', 'optuna'} & {*sys.modules}\n"
        "sys.exit(f'discovery loads {heavy}' if heavy else 0)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


def test_the_plugins_can_be_scanned():
    """Others' plugins share the namespace; string annotations would break Hydra."""
    assert not (PLUGINS / "__init__.py").exists()
    for path in PLUGINS.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not any(line.startswith("from __future__") for line in lines), path


def test_every_plugin_has_an_entry_point():
    """Hydra 1.4 finds plugins by them."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["project"]["entry-points"]["hydra.plugins"]
    ours = {
        name.replace("hydra_plugins.", "", 1)
        for name in Plugins.instance().class_name_to_class
        if name.startswith("hydra_plugins.lowrank_packed.")
    }
    assert {value.replace(":", ".") for value in named.values()} == {
        f"hydra_plugins.{name}" for name in ours
    }
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert "hydra_plugins" in wheel
