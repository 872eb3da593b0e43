"""Adapt one base to one task: python -m experiments.train delta.rank=8 seed=0"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.report.tables import show_preview, show_result
from lowrank.run.door import command
from lowrank.run.packs import pack_memory, run_pack
from lowrank.run.trial import run_trial
from lowrank.sweeps.plan import Packing


def train(config: Mapping[str, Any], overrides: Sequence[str]) -> float | None:
    """Runs the trial, shows it, and returns what a sweeper would maximize."""
    result = run_trial(config, overrides)
    if result.get("preview"):
        show_preview(result)
        return None
    show_result(result)
    return objective(result)


def objective(result: Mapping[str, Any]) -> float | None:
    """What a sweeper would maximize: the accuracy on the validation split, if any.

    Of numbers, R squared.
    """
    metrics = result["scores"].get("validation", {}).get("metrics", {})
    found = metrics.get("accuracy") or metrics.get("r2")
    return found and found["estimate"]


main = command(train, packing=Packing(run_pack, pack_memory, objective))

if __name__ == "__main__":
    main()
