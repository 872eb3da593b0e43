"""What a protocol does, fixed before anything is looked at: `conf/size/*.yaml`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.allocate.schedules import window
from lowrank.core.errors import BadInput
from lowrank.core.spec import check_fields, refuse_targets, spec

#: First seeds; those that rates are tuned on are never those that arms are judged on.
TUNING_SEED, JUDGED_SEED = 1000, 2000


@spec
class Wanted:
    """What is to be shown, as numbers stated beforehand.

    Log-ratios are of test errors; every number is compared with a whole interval.

    Attributes:
      oracle: Largest distance from the oracle's log error, either way.
      gain: Log-ratio to uniform ranks that a method is to stay below.
      misallocation: Largest misplaced share of the budget.
      no_gain: A control shows no gain if its log-ratio to uniform is above this.
      equivalence: Margin of equality with uniform ranks where there is nothing to gain.
      points: The margin on real text: a difference of error rates that does not matter.
    """

    oracle: float = 0.05
    gain: float = -1.5
    misallocation: float = 0.02
    no_gain: float = 0.0
    equivalence: float = 0.02
    points: float = 0.01

    def __post_init__(self) -> None:
        for name in ("oracle", "misallocation", "equivalence", "points"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise BadInput(
                    f"wanted.{name} = {value} is a margin: give a positive number"
                )


@spec
class RealPart:
    """What is done on real text; fields are those of `Protocol`.

    Attributes:
      tasks: Sources of text.
      ranks: Budgets, in components per layer on average.
      arms, rates, seeds, tuning_seeds, steps, batch_size, every: See `Protocol`.
      test_rows: Rows of a split that errors are counted on; all, if it has fewer.
    """

    tasks: Sequence[str]
    ranks: Sequence[int]
    arms: Sequence[str]
    rates: Sequence[float]
    seeds: int
    tuning_seeds: int
    steps: int
    batch_size: int
    every: int
    test_rows: int


@spec
class Protocol:
    """The size of a protocol.

    Attributes:
      tasks, arms: Names, in the order of the tables.
      rates: Learning rates that every arm may choose from.
      seeds: Judged ones, paired over arms.
      tuning_seeds: Those that choose each arm's rate.
      bases: Frozen networks that the seeds are dealt to in turn.
      steps, batch_size: Of every training.
      rows, noise, test_rows: Of the synthetic tasks.
      begin, end, every: When ranks move, as in `allocate.adaptive.Adaptive`.
      wanted: What is to be shown.
      level: Of intervals and tests.
      records: Folder of the finished trainings, for the same command to continue.
      results: Path of the results, without .json and .md.
      first_seed: The first judged one: what was seen with some seeds is confirmed with
        others.
      real: The part on real text; None: none.
      progress: A progress bar, where there is a terminal.
    """

    tasks: Sequence[str]
    arms: Sequence[str]
    rates: Sequence[float]
    seeds: int
    tuning_seeds: int
    bases: int
    steps: int
    batch_size: int
    rows: int
    noise: float
    test_rows: int
    begin: int | float
    end: int | float
    every: int
    wanted: Wanted
    level: float
    records: str
    results: str
    first_seed: int = JUDGED_SEED
    real: RealPart | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        counts = ("seeds", "tuning_seeds", "bases", "steps", "batch_size", "test_rows")
        for name in counts:
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.tuning_seeds > JUDGED_SEED - TUNING_SEED:
            raise BadInput(
                f"tuning_seeds = {self.tuning_seeds}: with more than "
                f"{JUDGED_SEED - TUNING_SEED}, arms are judged where they are tuned; "
                "give fewer"
            )
        if self.first_seed < JUDGED_SEED:
            raise BadInput(
                f"first_seed = {self.first_seed}: arms may be tuned on seeds below "
                f"{JUDGED_SEED}; give {JUDGED_SEED} or more"
            )
        if self.rows < 1 or self.rows % self.batch_size:
            raise BadInput(
                f"batch_size = {self.batch_size} does not divide rows = {self.rows}"
            )
        if not (math.isfinite(self.noise) and self.noise > 0):
            raise BadInput(
                f"noise = {self.noise}: without noise students reach the teacher to "
                "the last digit, and ratios of errors mean nothing; give a positive "
                "number"
            )
        if not self.rates or any(not 0 < rate < math.inf for rate in self.rates):
            raise BadInput(f"rates are positive numbers, not {list(self.rates)}")
        for name in ("tasks", "arms", "rates"):
            given = list(getattr(self, name))
            if not given or len({*given}) < len(given):
                raise BadInput(f"{name} = {given} is empty, or names one twice")
        if not 0 < self.level < 1:
            raise BadInput(f"level lies between 0 and 1, not at {self.level}")
        window(self.begin, self.end, self.every, self.steps)

    @property
    def parts(self) -> list["Protocol"]:
        """The protocol of the teachers, and that of real text."""
        if self.real is None:
            return [self]
        own = dataclasses.asdict(self.real)
        texts, ranks = own.pop("tasks"), own.pop("ranks")
        names = [f"{text}@{rank}" for text in texts for rank in ranks]
        apart = dataclasses.replace(
            self, **own, tasks=names, rows=self.real.batch_size, bases=1, real=None
        )
        return [dataclasses.replace(self, real=None), apart]

    @property
    def judged(self) -> list[int]:
        """The seeds that arms are judged on."""
        return [self.first_seed + number for number in range(self.seeds)]

    @property
    def tuned(self) -> list[int]:
        """The seeds that rates are chosen on."""
        return [TUNING_SEED + number for number in range(self.tuning_seeds)]

    @property
    def training(self) -> dict[str, Any]:
        """The part that decides what a training does."""
        names = ("steps", "batch_size", "rows", "noise", "test_rows", "bases")
        return {name: getattr(self, name) for name in names}


def read(config: Mapping[str, Any]) -> Protocol:
    """The protocol of a composed config.

    Raises:
      BadInput: A field is unknown, missing, or out of range.
    """
    refuse_targets(config)
    fields = dict(config)
    wanted = fields.get("wanted")
    if not isinstance(wanted, Mapping):
        raise BadInput(f"wanted is a group of fields, not {wanted!r}")
    check_fields(Wanted, wanted)
    fields["wanted"] = Wanted(**wanted)
    if fields.get("real") is not None:
        if not isinstance(fields["real"], Mapping):
            raise BadInput(
                f"real is a group of fields, or null, not {fields['real']!r}"
            )
        check_fields(RealPart, fields["real"])
        fields["real"] = RealPart(**fields["real"])
    check_fields(Protocol, fields)
    return Protocol(**fields)


def shown(protocol: Protocol) -> dict[str, Any]:
    """The protocol as JSON types."""
    return dataclasses.asdict(protocol)
