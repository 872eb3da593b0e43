"""How a command of several processes begins: they meet, and see that it is one."""

import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax

from lowrank.core.secrets import redact
from lowrank.core.spec import dotted
from lowrank.io.environment import code_fingerprint
from lowrank.run.settings import plain
from lowrank.sharding.processes import Processes, agree, begin, first

#: What a process has for itself beside its number: a disk, and perhaps a terminal.
_OWN = ("run.cache", "run.progress")
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


def meet(config: Mapping[str, Any]) -> None:
    """Finds the other processes that the group `processes` tells of, and compares.

    From here on the first one alone speaks: the others tell warnings and errors, and
    say of whom they are.

    Args:
      config: Resolved; without the group, or with one process, nothing is done.

    Raises:
      BadInput: They do not find each other, or were given different commands, code or
        versions; raised in all of them.
    """
    asked = plain(Processes, config.get("processes"), "processes")
    if asked.count == 1:
        return
    begin(asked)
    if not first():
        _step_back()
    # Redacted as a whole: what a field is called tells whether it is a secret.
    fields = dotted({k: v for k, v in redact(config).items() if k != "processes"})
    facts = {
        f"{name} in the config": json.dumps(value, default=str)
        for name, value in fields.items()
        if name not in _OWN
    }
    facts |= {f"the version of {n}": importlib.metadata.version(n) for n in _PACKAGES}
    facts["the code of this package"] = code_fingerprint()
    facts["the number and kind of their devices"] = (
        f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"
    )
    agree(facts, "Give all of them the same command and the same installation.")


def _step_back() -> None:
    """Leaves the terminal to the first process, but for what went wrong."""
    # Until the process ends.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    logging.getLogger("lowrank").setLevel(logging.WARNING)
    told = logging.Formatter(f"process {jax.process_index()}: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(told)
