"""Rungs: where trials are compared on the way, who goes on, and what was decided.

    rungs/<contest>-<number>.json   a decision, sealed before anybody acts on it

A decision that is on disk holds, whatever is measured later: packs of another width
add in another order, and two trials that lie close could then change places.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import Corrupt
from lowrank.core.spec import digest
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.run.sweep import Halving

#: The part of a sweep's directory that holds its decisions.
RUNGS = "rungs"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Rung:
    """A comparison to come.

    Attributes:
      step: Of the validation whose numbers are the last to count.
      keep: How many trials go on, at most.
    """

    step: int
    keep: int


def ladder(
    rule: Halving, num_trials: int, num_steps: int, every: int, earliest: int = 0
) -> list[Rung]:
    """The rungs of trials that compete with each other.

    Rung k (from 0) is due at first * eta^k and keeps floor(num_trials / eta^(k+1))
    trials, at least one (Li et al. 2017, Hyperband, Algorithm 1). Departures: a rung
    stands at the first validation from where it is due, so that no validation is added
    by which a trial could choose another best state; a rung that is due before
    `earliest` or `rule.min_steps` waits for it; and rungs that thereby fall on one step
    are one, which keeps as many as the last of them.

    Args:
      rule: Settings.
      num_trials: That compete.
      num_steps: Of the whole training.
      every: Steps between validations.
      earliest: No trial may be cut before this step, as when its ranks still move.

    Returns:
      Rungs by step, all before the end; empty where nothing is to be cut.
    """
    first = rule.first if rule.first >= 1 else rule.first * num_steps
    floor = max(rule.min_steps, earliest, 1)
    found: dict[int, Rung] = {}
    at, keep = 0, num_trials
    while keep > 1 and (due := first * rule.eta**at) < num_steps:
        at += 1
        # 0.1 * 30 is a little above 3: a step is not lost to that.
        step = math.ceil(round(max(due, floor) / every, 9)) * every
        keep = max(num_trials // rule.eta**at, 1)
        if step < num_steps:
            found[step] = Rung(step, keep)
    return list(found.values())


def ranked(
    values: Mapping[str, float | None], lower_is_better: bool
) -> list[tuple[str, float | None]]:
    """Trials by value, the best first; those without a value last.

    Of equal values, the smaller id comes first: it knows nothing of the settings, while
    the order of a grid would let the first learning rate win all ties.
    """
    sign = 1 if lower_is_better else -1

    def place(one: tuple[str, float | None]) -> tuple[bool, float, str]:
        trial, value = one
        missing = value is None or math.isnan(value)
        return missing, 0.0 if missing or value is None else sign * value, trial

    return sorted(values.items(), key=place)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided at a rung.

    Attributes:
      contest: A hash of what competes by which rule.
      number: Of the rung, from 0.
      step: Of the rung.
      metric: What decided.
      order: (trial, value), the best first; None of a trial that has failed.
      keep: How many of the first go on.
      failed: Why a trial has no value: (kind of error, message).
    """

    contest: str
    number: int
    step: int
    metric: str
    order: tuple[tuple[str, float | None], ...]
    keep: int
    failed: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> tuple[str, ...]:
        """Trials that go on: of the first ones, those that have a value."""
        return tuple(
            trial for trial, value in self.order[: self.keep] if value is not None
        )

    def why(self, trial: str) -> str:
        """What a trial that was cut is told."""
        place = [one for one, _ in self.order].index(trial)
        value = self.order[place][1]
        told = "no value" if value is None else f"{value:.4g}"
        return (
            f"cut at step {self.step} by halving: place {place + 1} of "
            f"{len(self.order)} by {self.metric} ({told}), {len(self.kept)} go on"
        )


@dataclasses.dataclass(frozen=True)
class Contest:
    """Who competes by which rule; equal contests have equal ids.

    Attributes:
      trials: Ids, sorted.
      rule: Settings.
      rungs: From `ladder`.
      metric: What decides.
    """

    trials: tuple[str, ...]
    rule: Halving
    rungs: tuple[Rung, ...]
    metric: str

    @property
    def id(self) -> str:
        """A hash of all of it."""
        return digest(
            {
                "trials": list(self.trials),
                "rungs": [[one.step, one.keep] for one in self.rungs],
                "metric": self.metric,
            },
            12,
        )


def store(directory: Path, decision: Decision) -> None:
    """Writes a decision; one that is there already is never replaced.

    Raises:
      CannotWrite: The file system refused.
    """
    path = directory / RUNGS / f"{decision.contest}-{decision.number}.json"
    if not path.exists():
        body = dataclasses.asdict(decision)
        body["order"] = [list(one) for one in decision.order]
        body["failed"] = {name: list(why) for name, why in decision.failed.items()}
        write_sealed(path, {"schema": SCHEMA, **body})


def decisions(directory: Path) -> list[Decision]:
    """All decisions of a sweep, those of a contest in the order of its rungs.

    Raises:
      Corrupt: A file is damaged or of another schema.
    """
    found = [_read(path) for path in sorted((directory / RUNGS).glob("*.json"))]
    return sorted(found, key=lambda one: (one.contest, one.number))


def decided(directory: Path, contest: Contest) -> list[Decision]:
    """The decisions of one contest so far.

    Raises:
      Corrupt: They are damaged, one is missing in between, or trials of this contest
        were compared in another one: with other trials or by another rule.
    """
    found = decisions(directory)
    own = [one for one in found if one.contest == contest.id]
    mine = set(contest.trials)
    for other in found:
        shared = mine & {trial for trial, _ in other.order}
        if other.contest != contest.id and shared:
            raise Corrupt(
                f"{directory / RUNGS} has a decision at step {other.step} about "
                f"{len(other.order)} trials by {other.metric}, {len(shared)} of which "
                f"this line lets compete by another rule or with other trials "
                f"({len(mine)}, rungs at {_steps(contest)}). Give the trials and "
                "sweep.halving of that time, choose another sweep.name, or train all "
                "trials to the end with sweep=default."
            )
    if [one.number for one in own] != list(range(len(own))):
        raise Corrupt(
            f"{directory / RUNGS} lacks a decision of contest {contest.id} before its "
            f"rung {own[-1].number}: restore the file from a copy"
        )
    return own


def _steps(contest: Contest) -> str:
    return ", ".join(str(one.step) for one in contest.rungs) or "none"


def _read(path: Path) -> Decision:
    stored: dict[str, Any] = read_sealed(path)
    if stored.pop("schema", None) != SCHEMA:
        raise Corrupt(
            f"{path} has another schema than {SCHEMA}, which this version reads. "
            "Install the version of lowrank that wrote it."
        )
    order: Sequence = stored.pop("order")
    failed: Mapping = stored.pop("failed")
    return Decision(
        **stored,
        order=tuple((trial, value) for trial, value in order),
        failed={name: (why[0], why[1]) for name, why in failed.items()},
    )
