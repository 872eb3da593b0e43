"""Which trials share a pack: by what cannot differ inside one, and by width.

All of this is decided from settings alone, before a base or a row of data is read.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import BadInput
from lowrank.core.spec import digest
from lowrank.run.prepare import directory_of
from lowrank.run.settings import Settings
from lowrank.run.sweep import PACKABLE

#: Version of a pack's id; raised when equal trials would no longer continue it.
PACK_VERSION = 1
#: Leaves that say nothing about the compiled step, though trials may differ in them.
_ASIDE = ("run.directory", "base.name", "ranks.from")
#: Mappings that are one leaf each.
_WHOLE = ("delta.ranks", "ranks.ranks", "ranks.bounds")
#: Packable leaves that ranks which are dealt out once follow from.
_DEALT = ("delta.rank", "ranks.budget")
_MAX_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """One job of a sweep.

    Attributes:
      number: Of the job.
      settings: Checked.
      overrides: The arguments it was composed with.
      label: The arguments that tell it from the other jobs.
    """

    number: int
    settings: Settings
    overrides: tuple[str, ...]
    label: str = ""

    @functools.cached_property
    def id(self) -> str:
        """Of the trial, whatever sweep it is in."""
        return self.settings.trial_id

    @functools.cached_property
    def directory(self) -> Path:
        """Where its record is."""
        return directory_of(self.settings)

    @functools.cached_property
    def key(self) -> str:
        """A hash of the static key: trials that agree in it may share a pack."""
        return digest(static_key(self.settings), 12)

    @property
    def rank(self) -> int:
        """Components that a layer holds for the usual rank; 0 where there is none."""
        rank = self.settings.delta.get("rank") or 0
        return self.settings.ranks.held(rank) or rank


def static_key(settings: Settings) -> dict[str, Any]:
    """What all trials of a pack must have in common: leaves by dotted name.

    Everything but `PACKABLE`: base, data, batches, schedule, targets, and whatever
    else decides shapes or branches of the program, or what the pack does as a whole.
    Ranks that an allocator deals out once say which weights are corrected at all, so
    there nothing that they follow from may differ.
    """
    chosen = settings.ranks
    dealt = () if chosen.usual or chosen.move else _DEALT
    # As before there were others, ranks of the rules are not mentioned.
    unsaid = ("sweep", "ranks") if chosen.usual else ("sweep",)
    config = {n: part for n, part in settings.config.items() if n not in unsaid}
    found = {}
    for name, value in leaves(config).items():
        if name == "optim.clip":
            # No clipping is another program; any norm is a number to one program.
            found[name] = "none" if value is None else "a norm"
        elif name not in _ASIDE and (not is_packable(name) or name in dealt):
            found[name] = value
    return found


def is_packable(name: str) -> bool:
    """Whether trials of one pack may differ in the leaf of this dotted name."""
    return name in PACKABLE or f"{name.split('.')[0]}.*" in PACKABLE


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a config by dotted name.

    `delta.ranks` and `ranks.bounds` are one leaf each: their keys are patterns, whose
    order counts. So is `ranks.ranks`, whose keys are names of layers.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in _WHOLE and isinstance(value, Mapping):
            found[name] = [list(pair) for pair in value.items()]
        elif isinstance(value, Mapping) and value:
            found |= leaves(value, f"{name}.")
        else:
            found[name] = value
    return found


def check_trials(trials: Sequence[Trial]) -> None:
    """Refuses jobs that would be the same trial or would share a directory.

    Raises:
      BadInput: Two jobs have one id, or one directory.
    """
    ids: dict[str, Trial] = {}
    directories: dict[Path, Trial] = {}
    for trial in trials:
        twin = ids.setdefault(trial.id, trial)
        if twin is not trial:
            differ = differences([twin, trial])
            why = (
                f"they differ only in {', '.join(differ)}, which changes no result"
                if differ
                else "they do not differ; repeat a trial with another seed"
            )
            raise BadInput(
                f"jobs {twin.number} ({twin.label or 'no overrides'}) and "
                f"{trial.number} ({trial.label or 'no overrides'}) are the same trial "
                f"{trial.id}: {why}. Take one of them out of the sweep."
            )
        housemate = directories.setdefault(trial.directory, trial)
        if housemate is not trial:
            raise BadInput(
                f"jobs {housemate.number} and {trial.number} would both live in "
                f"{trial.directory}: in a sweep leave run.directory=null, and trials "
                "are named by their ids"
            )


def differences(trials: Sequence[Trial]) -> list[str]:
    """Names of the leaves in which trials differ, sorted."""
    tables = [leaves(trial.settings.config) for trial in trials]
    names = sorted(set().union(*tables))
    missing = object()
    return [
        name
        for name in names
        if any(
            table.get(name, missing) != tables[0].get(name, missing) for table in tables
        )
    ]


def labelled(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with labels: `optim.lr=0.001 seed=1`, naming only what differs."""
    names = differences(trials)
    found = []
    for trial in trials:
        own = leaves(trial.settings.config)
        label = " ".join(f"{name}={own[name]}" for name in names if name in own)
        found.append(dataclasses.replace(trial, label=label))
    return found


def groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials by static key, in the order in which keys first occur."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.key, []).append(trial)
    return list(found.values())


def reasons_alone(trials: Sequence[Trial]) -> dict[str, str]:
    """For every trial that has no company, by id: in what it differs from the nearest.

    A sweep of one trial has no reason to give.
    """
    found: dict[str, str] = {}
    tables = {trial.id: static_key(trial.settings) for trial in trials}
    for group in groups(trials):
        if len(group) > 1 or len(trials) == 1:
            continue
        (alone,) = group
        mine = tables[alone.id]
        odd = min(
            (
                [n for n in sorted(mine | other) if mine.get(n) != other.get(n)]
                for id, other in tables.items()
                if id != alone.id
            ),
            key=len,
        )
        named = ", ".join(f"{n}={mine.get(n)!r}" for n in odd[:_MAX_NAMED])
        more = f" and {len(odd) - _MAX_NAMED} more" if len(odd) > _MAX_NAMED else ""
        found[alone.id] = (
            f"no other trial has its {named}{more}, which a pack cannot vary"
        )
    return found


def pack_id(trials: Sequence[Trial]) -> str:
    """A hash of a pack's composition, order included."""
    return digest({"version": PACK_VERSION, "trials": [t.id for t in trials]}, 12)


def deal(trials: Sequence[Trial], width: int, share: int = 1) -> list[list[Trial]]:
    """Trials of one static key as packs of at most `width`.

    A pack's program depends on its number of trials and its largest rank, so both are
    made as equal as may be: every pack gets as many trials as the others, one more or
    less, where a few more packs come out even they are taken; and trials go round by
    falling rank, which gives every pack one of the largest as long as there are enough.
    A short last pack, which would compile once more for little work, does not occur.

    Devices that share a pack's trials must come out even, so there trials go round by
    so many at a time; those of the lowest rank, fewer than `share`, that are left over
    are a pack of their own.

    Args:
      trials: With one static key.
      width: At least 1; a multiple of `share` unless there are fewer trials than that.
      share: Devices that share a pack's trials.
    """
    falling = sorted(trials, key=lambda trial: -trial.rank)
    num_shares = len(trials) // share
    whole, left = falling[: num_shares * share], falling[num_shares * share :]
    packs = [left] if left else []
    if num_shares:
        most = max(width // share, 1)
        least = -(-num_shares // most)
        # Half as many packs again, at most: narrower packs share the base among fewer.
        choices = range(least, least * 3 // 2 + 1)
        even = [count for count in choices if num_shares % count == 0]
        count = even[0] if even else least
        each = lambda start: range(start, num_shares, count)
        packs[:0] = [
            [trial for one in each(start) for trial in whole[one::num_shares]]
            for start in range(count)
        ]
    return [sorted(pack, key=lambda trial: trial.number) for pack in packs]


def half_of(width: int, share: int = 1) -> int:
    """The width of the halves of a pack: whole shares, where it has two or more."""
    half = -(-width // 2)
    return half // share * share or half


def halves(trials: Sequence[Trial], share: int = 1) -> list[list[Trial]]:
    """A pack that was too wide in parts, again with equal programs where possible."""
    width = half_of(len(trials), share)
    return deal(trials, width, share if width >= share else 1)


def program(trials: Sequence[Trial]) -> tuple[str, int, int]:
    """What decides a pack's compiled step beside the shapes of its batches."""
    return trials[0].key, len(trials), max(trial.rank for trial in trials)
