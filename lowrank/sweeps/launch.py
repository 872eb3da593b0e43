"""A sweep, planned: what is finished is skipped, the rest goes into packs.

    jobs -> trials -> (finished | refused | to do) -> packs

The same line may be given again at any time: finished trials return what they left,
packs that were begun go on with the trials they were begun with, and the rest is
planned as if it were new.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import CannotWrite, Corrupt
from lowrank.core.spec import digest
from lowrank.io.files import LOCK_NAME
from lowrank.io.record import Record, stored_result
from lowrank.run.packs import Outcome
from lowrank.run.prepare import identity_of, load_base
from lowrank.run.settings import Settings
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.compositions import Compositions
from lowrank.sweeps.engine import RunPack
from lowrank.sweeps.group import (
    Trial,
    check_trials,
    deal,
    groups,
    pack_id,
    reasons_alone,
)
from lowrank.sweeps.width import Memory, share_of, width

#: The part of a sweep's directory that holds its packs.
PACKS = "packs"


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a command runs many jobs together; `run.door.command` hands it on.

    Attributes:
      run: Trains trials of one static key as one pack.
      memory: Bytes that a pack needs, by width.
      value: What a job returns to the sweeper, from a trial's result.
    """

    run: RunPack
    memory: Memory
    value: Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A pack to run.

    Attributes:
      trials: Its composition, in order.
      todo: Those of them that are not finished, in the same order.
      continued: Whether it was begun earlier.
    """

    trials: Sequence[Trial]
    todo: Sequence[Trial]
    continued: bool = False

    @property
    def id(self) -> str:
        """Of the composition."""
        return pack_id(self.trials)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
      trials: All of them, in the order of the jobs.
      known: Outcomes that are there already, by trial id: finished earlier, refused.
      packs: The others.
      alone: Why a trial has no company, by trial id.
    """

    trials: Sequence[Trial]
    known: Mapping[str, Outcome]
    packs: Sequence[Planned]
    alone: Mapping[str, str]


def make_plan(
    trials: Sequence[Trial], directory: Path, packing: Packing, spec: SweepSpec
) -> Plan:
    """Decides what is run, and with whom; writes nothing but caches.

    Args:
      trials: One per job.
      directory: The sweep's.
      packing: Says how much memory packs need.
      spec: May set the width and the memory.

    Raises:
      BadInput: Two jobs are one trial, or a pack is wider than memory.
      Corrupt: The record of a pack that was begun is damaged.
    """
    check_trials(trials)
    look = _Look()
    known = {t.id: found for t in trials if (found := look(t)) is not None}
    # A pack goes on with all its trials or not at all.
    sound = [t for t in trials if t.id not in known or known[t.id].error is None]
    packs = [
        Planned(pack, [t for t in pack if t.id not in known], continued=True)
        for pack in Compositions(directory / PACKS).begun(sound, look.forced)
    ]
    packs = [pack for pack in packs if pack.todo]
    placed = {trial.id for pack in packs for trial in pack.todo} | known.keys()
    fresh = [trial for trial in trials if trial.id not in placed]
    for group in groups(fresh):
        most = width(group, spec, packing.memory)
        for pack in deal(group, most, share_of(group[0].settings)):
            packs.append(Planned(pack, pack))
    return Plan(trials, known, packs, reasons_alone(trials))


class _Look:
    """Sees what a trial's directory holds; loads base and data only if it must.

    Trials of a sweep mostly share them, so their fingerprints are taken once.

    Attributes:
      forced: Ids of trials that start over, because run.force=true.
    """

    def __init__(self) -> None:
        self.forced: set[str] = set()
        self._identities: dict[str, Mapping[str, str]] = {}

    def __call__(self, trial: Trial) -> Outcome | None:
        """The outcome that is there already; None if the trial is to be run.

        A directory that holds something else is an outcome, too, an error; with
        run.force=true it is left to `Record.open`, which moves the content aside.
        """
        directory, settings = trial.directory, trial.settings
        # What a sweep writes before it runs says nothing of what became of the trial.
        written = set(directory.iterdir()) if directory.is_dir() else set()
        if not written - {directory / ".hydra", directory / LOCK_NAME}:
            return None
        try:
            facts = {"config": settings.config, "identity": self._identity(settings)}
            result = stored_result(directory, **facts)
            if result is None:
                return None
            # Killed between its result and its status, it still says "running".
            with Record.open(directory, **facts):
                return Outcome(result, None)
        except (Corrupt, CannotWrite) as error:
            if not settings.run.force:
                return Outcome(None, error)
            self.forced.add(trial.id)
            return None

    def _identity(self, settings: Settings) -> Mapping[str, str]:
        parts = [settings.config[name] for name in ("base", "data")]
        key = digest([*parts, settings.run.cache])
        if key not in self._identities:
            cache = settings.run.cache
            task = settings.data.load(Path(cache) / "data" if cache else None)
            base = load_base(settings, len(task.classes))
            self._identities[key] = identity_of(settings, base, task)
        return {**self._identities[key], "config": settings.trial_id}
