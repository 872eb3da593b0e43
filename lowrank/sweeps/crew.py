"""A sweep of several processes: the first one decides, and all run every pack.

    first:   plan -> order, pack -> order, pack -> ... -> end
    others:          order, pack -> order, pack -> ... -> end

Plans, records and tables are the first one's alone. An order is what a pack is made of
as plain values, or a width whose memory is asked for, since to compile a program of
several processes may be a matter of them all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank.core.errors import BadInput, LowrankError, Preempted
from lowrank.run.packs import Origin, Outcome
from lowrank.run.settings import Settings, read
from lowrank.sharding.processes import agree, first, told
from lowrank.sweeps.engine import Task
from lowrank.sweeps.group import Trial
from lowrank.sweeps.plan import Packing


def check_crew(trials: Sequence[Trial]) -> None:
    """Refuses processes that were given different sweeps. Called by all.

    Raises:
      BadInput: Their trials differ, as those of a sweeper that draws them do; or packs
        are to run elsewhere.
    """
    engine = trials[0].settings.sweep.engine
    if jax.process_count() > 1 and engine != "local":
        raise BadInput(
            f"sweep.engine={engine} sends packs to other processes, and this sweep has "
            f"{jax.process_count()} of its own: give sweep.engine=local, or "
            "processes=one"
        )
    agree(
        {f"trial {trial.number}": trial.id for trial in trials},
        "Give all of them the same line, of a sweeper that lists its trials: one that "
        "learns from results (hydra/sweeper=optuna) needs processes=one.",
    )


def leading(packing: Packing) -> Packing:
    """How the first process runs packs: all others are ordered to run them, too."""
    if jax.process_count() == 1:
        return packing

    def memory(settings: Settings, widths: Sequence[int]) -> Mapping[int, int | None]:
        told({"settings": settings.config, "widths": list(widths)})
        return packing.memory(settings, widths)

    def run(
        trials: Sequence[Settings],
        overrides: Sequence[Sequence[str]],
        /,
        *,
        folder: Path,
        until: int | None = None,
        origins: Sequence[Origin] = (),
    ) -> list[Outcome]:
        told(
            {
                "configs": [one.config for one in trials],
                "folder": str(folder),
                "until": until,
                "origins": [
                    {**vars(one), "folder": str(one.folder)} for one in origins
                ],
            }
        )
        return packing.run(
            trials, overrides, folder=folder, until=until, origins=origins
        )

    return dataclasses.replace(packing, memory=memory, run=run)


def follow(packing: Packing) -> int:
    """What the others do: runs what is ordered; returns the sweep's exit code.

    Raises:
      Preempted: All were asked to stop, and have saved.
    """
    while "end" not in (order := told(None)):
        if "widths" in order:
            packing.memory(read(order["settings"]), order["widths"])
            continue
        try:
            _task(packing, order).do()
        except Preempted:
            raise
        except LowrankError:
            # What ends a pack ends it in the first process as well, which tells of it.
            continue
    return int(order["end"])


def dismiss(code: int) -> None:
    """Tells the others, if there are any, that the sweep has ended, and how."""
    if jax.process_count() > 1 and first():
        told({"end": code})


def _task(packing: Packing, order: Mapping[str, Any]) -> Task:
    settings = [read(config) for config in order["configs"]]
    origins = [
        Origin(Path(one["folder"]), tuple(one["trials"]), one["step"], one["row"])
        for one in order["origins"]
    ]
    overrides = [[]] * len(settings)
    folder, until = Path(order["folder"]), order["until"]
    return Task(packing.run, settings, overrides, folder, until, tuple(origins))
