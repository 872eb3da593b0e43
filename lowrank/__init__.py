"""Low-rank adaptation of any JAX model: trained, measured and proven.

The public names below are loaded on first use (PEP 562), so that ``import lowrank``
costs milliseconds and does not load JAX: Hydra imports plugin packages at every
start, and a command-line ``--help`` must not wait for a compiler.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank.adapt.attach import Adapted, attach
    from lowrank.adapt.nnx import from_nnx
    from lowrank.adapt.rules import Freeze, Rule, Train
    from lowrank.adapt.sites import discover
    from lowrank.deltas.lora import LoRA
    from lowrank.io.history import load_ranks
    from lowrank.run.fit import fit
    from lowrank.run.stored import load_run, predict
    from lowrank.sweeps.load import load_sweep

_HOMES = {
    "Adapted": "lowrank.adapt.attach",
    "Freeze": "lowrank.adapt.rules",
    "LoRA": "lowrank.deltas.lora",
    "Rule": "lowrank.adapt.rules",
    "Train": "lowrank.adapt.rules",
    "attach": "lowrank.adapt.attach",
    "discover": "lowrank.adapt.sites",
    "fit": "lowrank.run.fit",
    "from_nnx": "lowrank.adapt.nnx",
    "load_ranks": "lowrank.io.history",
    "load_run": "lowrank.run.stored",
    "load_sweep": "lowrank.sweeps.load",
    "predict": "lowrank.run.stored",
}

__all__ = [
    "Adapted",
    "Freeze",
    "LoRA",
    "Rule",
    "Train",
    "attach",
    "discover",
    "fit",
    "from_nnx",
    "load_ranks",
    "load_run",
    "load_sweep",
    "predict",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
