"""What a study shows: paired log-ratios, corrected, and whether the wanted is met.

With e the error of an arm and of a baseline for one seed, d = log e_arm - log e_base;
where errors are shares of rows, d = e_arm - e_base: negative where the arm is better.
Intervals and tests are those of `evaluate.compare`. Holm's correction of differences
is over all arms and tasks together, since all were looked at; that of equivalence, over
the arms of a task.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

from experiments.ranks_protocol.arms import (
    BASELINE,
    BLIND,
    CLAIMED,
    METHODS,
    ORACLE,
)
from experiments.ranks_protocol.settings import Protocol, Wanted
from experiments.ranks_protocol.tasks import find
from lowrank.evaluate.compare import Comparison, compare_arms, holm
from lowrank.evaluate.stats import Interval, over_seeds

Answer = Literal["met", "not met", "inconclusive"]
Records = Sequence[Mapping[str, Any]]
Study = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One wanted outcome.

    Attributes:
      task, arm: Of whom.
      wanted: In words, with its number.
      found: In numbers.
      answer: "met" if the whole interval is where it is wanted, "not met" if none of it
        is, else "inconclusive", which says neither.
    """

    task: str
    arm: str
    wanted: str
    found: str
    answer: Answer


def errors(records: Records, in_points: bool = False) -> dict[Hashable, float]:
    """Seed -> log error, or error, of the seeds that were trained to their end."""
    return {
        one["seed"]: one["error"] if in_points else math.log(one["error"])
        for one in records
        if one["error"] is not None
    }


def comparisons(
    judged: Mapping[str, Records],
    baseline: str,
    protocol: Protocol,
    in_points: bool = False,
) -> dict[str, Comparison]:
    """Every arm beside a baseline; empty where the task has no such arm."""
    if baseline not in judged:
        return {}
    found = compare_arms(
        {arm: errors(records, in_points) for arm, records in judged.items()},
        baseline,
        higher_is_better=False,
        margin=protocol.wanted.points if in_points else protocol.wanted.equivalence,
        level=protocol.level,
    )
    return {one.arm: one for one in found}


def corrected(study: Mapping[str, Mapping[str, Comparison]]) -> dict[str, Any]:
    """Task -> arm -> p after Holm's correction over all of them."""
    each = [(task, arm) for task, own in study.items() for arm in own]
    p = holm([study[task][arm].p for task, arm in each])
    found: dict[str, dict[str, float]] = {task: {} for task in study}
    for (task, arm), value in zip(each, p, strict=True):
        found[task][arm] = value
    return found


def inside(interval: Interval, low: float, high: float) -> Answer:
    """Whether an interval lies within bounds.

    One that is undefined says nothing, except where all seeds agree: then its estimate
    is all there is to say.
    """
    low_end, high_end = interval.low, interval.high
    if low_end is None or high_end is None:
        if interval.estimate is None or interval.num_groups < 2:
            return "inconclusive"
        low_end = high_end = interval.estimate
    if low <= low_end and high_end <= high:
        return "met"
    return "not met" if high_end < low or low_end > high else "inconclusive"


def shown(interval: Interval, digits: int = 3) -> str:
    """An interval as text."""
    one = lambda x: "-" if x is None else f"{x:+.{digits}f}"
    if interval.low is None:
        return one(interval.estimate)
    return f"{one(interval.estimate)} [{one(interval.low)}, {one(interval.high)}]"


def averaged(records: Records, name: str, level: float) -> Interval:
    """A number of the records over the seeds that have it."""
    values = [one[name] for one in records if one[name] is not None]
    if not values:
        return Interval(None, None, None, level, 0, "undefined: no seed has it")
    return over_seeds(values, level)


def outcomes(study: Study, protocol: Protocol) -> list[Outcome]:
    """The wanted outcomes of the tasks that were run, and what became of them."""
    found = []
    for task, own in study.items():
        claim, judged = find(task).claim, own["judged"]
        if claim is None:
            continue
        ratio = comparisons(judged, BASELINE, protocol)
        if claim == "gain":
            far = comparisons(judged, ORACLE, protocol)
            found += _gains(task, judged, ratio, far, protocol)
        elif claim == "equal":
            found += _equals(task, ratio, protocol.wanted)
    return found


def _gains(
    task: str,
    judged: Mapping[str, Records],
    ratio: Mapping[str, Comparison],
    far: Mapping[str, Comparison],
    protocol: Protocol,
) -> list[Outcome]:
    wanted, level = protocol.wanted, protocol.level
    found = []
    for arm in (arm for arm in CLAIMED if arm in judged):
        if arm in far:
            text = f"log-ratio to the oracle within +-{wanted.oracle:g}"
            own = far[arm].difference
            answer = inside(own, -wanted.oracle, wanted.oracle)
            found.append(Outcome(task, arm, text, shown(own), answer))
        text = f"log-ratio to uniform below {wanted.gain:g}"
        own = ratio[arm].difference
        answer = inside(own, -math.inf, wanted.gain)
        found.append(Outcome(task, arm, text, shown(own), answer))
        text = f"misallocation at most {wanted.misallocation:g}"
        own = averaged(judged[arm], "misallocation", level)
        answer = inside(own, -math.inf, wanted.misallocation)
        found.append(Outcome(task, arm, text, shown(own), answer))
    for arm in (arm for arm in BLIND if arm in judged):
        text = f"no gain: log-ratio to uniform above {wanted.no_gain:g}"
        own = ratio[arm].difference
        answer = inside(own, wanted.no_gain, math.inf)
        found.append(Outcome(task, arm, text, shown(own), answer))
    return found


def _equals(
    task: str, ratio: Mapping[str, Comparison], wanted: Wanted
) -> list[Outcome]:
    """Equality by the two one-sided tests, corrected over the methods asked about."""
    asked = [arm for arm in METHODS if arm in ratio]
    adjusted = holm([ratio[arm].equivalence_p for arm in asked])
    margin, found = wanted.equivalence, []
    for arm, p in zip(asked, adjusted, strict=True):
        own = ratio[arm].difference
        text = f"equal to uniform within {margin:g}"
        apart = inside(own, -margin, margin) == "not met"
        alpha = 1 - own.level
        answer: Answer = "not met" if apart else "inconclusive"
        if not apart and p < alpha:
            answer = "met"
        found.append(Outcome(task, arm, text, f"{shown(own)}, p = {p:.2g}", answer))
    return found
