"""A step for a pod, compiled here: python -m experiments.rehearse mesh=v5e_256"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank.cost.chips import topology_of
from lowrank.io.files import write_json_atomically
from lowrank.report.rehearsal import show_rehearsal, show_search
from lowrank.run.door import command
from lowrank.run.rehearsal import rehearse
from lowrank.run.rehearsal_search import search


def run(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Rehearses a step, or looks for the best way to lay it out; shows it."""
    stand_in(config["mesh"].get("topology"))
    asked = config["rehearse"]
    found = search(config) if asked["search"] else rehearse(config)
    found["command"] = " ".join(["python -m experiments.rehearse", *overrides])
    if asked["out"]:
        write_json_atomically(Path(asked["out"]), found)
    if asked["format"] == "json":
        print(json.dumps(found, indent=2, allow_nan=False))
    elif asked["search"]:
        show_search(found)
    else:
        show_rehearsal(found)


def stand_in(topology: str | None) -> None:
    """Makes this process one of CPUs, as many as chips whose compiler is not here.

    Before anything else asks JAX for devices: a machine with libtpu but no TPU would
    wait for one.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology is None:
        return
    chip, along = topology_of(topology)
    if chip.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(along))


main = command(run, config_name="rehearse")

if __name__ == "__main__":
    main()
