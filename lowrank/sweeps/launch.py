"""A sweep, planned: what is finished is skipped, the rest goes into packs.

    jobs -> trials -> (finished | refused | to do) -> packs

The same line may be given again at any time: finished trials return what they left,
packs that were begun go on with the trials they were begun with, and the rest is
planned as if it were new.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank.run.packs import Outcome
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.compositions import Compositions
from lowrank.sweeps.group import (
    Trial,
    check_trials,
    deal,
    groups,
    reasons_alone,
)
from lowrank.sweeps.halving import Race, races
from lowrank.sweeps.look import Look
from lowrank.sweeps.plan import Packing, Planned
from lowrank.sweeps.width import share_of, width

#: The part of a sweep's directory that holds its packs.
PACKS = "packs"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
      trials: All of them, in the order of the jobs.
      known: Outcomes that are there already, by trial id: finished earlier, refused.
      packs: The others.
      alone: Why a trial has no company, by trial id.
      races: With halving, the trials that compete; `packs` are those to the next rung.
      forced: Ids of trials that start over.
    """

    trials: Sequence[Trial]
    known: Mapping[str, Outcome]
    packs: Sequence[Planned]
    alone: Mapping[str, str]
    races: Sequence[Race] = ()
    forced: frozenset[str] = frozenset()


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
      BadInput: Two jobs are one trial, a pack is wider than memory, or trials cannot
        be halved as `spec` says.
      Corrupt: The record of a pack that was begun, or of a rung, is damaged.
    """
    check_trials(trials)
    look = Look()
    known = {t.id: found for t in trials if (found := look(t)) is not None}
    compositions = Compositions(directory / PACKS)
    found = races(trials, directory, spec)
    for race in found:
        known = {**race.ended(), **known}
    ahead = [race for race in found if race.decisions]
    there = {trial.id for race in ahead for trial in race.trials}
    first = [trial for trial in trials if trial.id not in there]
    # A pack goes on with all its trials or not at all.
    sound = [t for t in first if t.id not in known or known[t.id].error is None]
    packs = [
        Planned(pack, [t for t in pack if t.id not in known], continued=True)
        for pack in compositions.begun(sound, look.forced)
    ]
    packs = [pack for pack in packs if pack.todo]
    placed = {trial.id for pack in packs for trial in pack.todo} | known.keys()
    fresh = [trial for trial in first if trial.id not in placed]
    for group in groups(fresh):
        most = width(group, spec, packing.memory)
        for pack in deal(group, most, share_of(group[0].settings)):
            packs.append(Planned(pack, pack))
    ends = {trial.id: race.until for race in found for trial in race.trials}
    packs = [
        dataclasses.replace(pack, until=ends.get(pack.trials[0].id)) for pack in packs
    ]
    for race in ahead:
        packs += race.packs(known, look.forced, compositions, spec, packing.memory)
    alone = reasons_alone(trials)
    return Plan(trials, known, packs, alone, found, frozenset(look.forced))
