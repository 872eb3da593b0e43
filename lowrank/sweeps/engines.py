"""The engines by name; the packages behind them are looked at only when asked for."""

import importlib
import importlib.util
from pathlib import Path

from lowrank.core.errors import BadInput
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.engine import Engine, Local

#: Where submitit keeps its files, beside the packs.
JOBS = "jobs"
#: The extra that installs an engine.
_EXTRAS = {"ray": "ray", "submitit": "slurm"}


def check_engine(spec: SweepSpec) -> None:
    """Refuses an engine that cannot be imported, before anything is planned.

    Raises:
      BadInput: Its package is not installed.
    """
    name = spec.engine
    if name in _EXTRAS and importlib.util.find_spec(name) is None:
        raise BadInput(
            f"sweep.engine={name} needs the package {name}: install "
            f"lowrank[{_EXTRAS[name]}], or set sweep.engine=local"
        )


def open_engine(spec: SweepSpec, folder: Path) -> Engine:
    """The engine that a sweep asks for; use it in a `with` block.

    Args:
      spec: Names it and says what its workers need.
      folder: Of the sweep's packs.

    Raises:
      BadInput: It is not installed, not there, or does not know what it was told.
    """
    check_engine(spec)
    if spec.engine == "local":
        return Local()
    common = {
        "room": spec.workers,
        "retries": spec.retries,
        "grace_seconds": spec.grace_seconds,
    }
    if spec.engine == "ray":
        from lowrank.sweeps.engine_ray import RayEngine

        return RayEngine(spec.ray or {}, **common)
    from lowrank.sweeps.engine_submitit import SubmititEngine

    return SubmititEngine(spec.submitit or {}, folder / JOBS, **common)
