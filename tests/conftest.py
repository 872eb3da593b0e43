"""Settings every test runs under."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
# Messages are broken to the width of a terminal. Some name a folder that pytest makes,
# whose length differs between machines: with room for all, no break falls into a
# phrase that a test looks for.
os.environ["COLUMNS"] = "300"

import jax
from fault_table import (
    outcomes,
    pytest_addoption,
    pytest_configure,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_sessionstart,
    pytest_terminal_summary,
)

__all__ = [
    "outcomes",
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_logreport",
    "pytest_runtest_makereport",
    "pytest_sessionstart",
    "pytest_terminal_summary",
]

# Broadcasting across ranks is where adapter bugs hide; say it with einsum instead.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

#: Files of tests that train whole runs.
_LONG = ("tests/run/", "tests/test_readme.py", "tests/sweeps/", "tests/train/")


def pytest_collection_modifyitems(items):
    """Long files first: a worker that gets one last leaves the others idle."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
