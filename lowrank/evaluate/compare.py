"""Arms against a baseline over the same seeds: differences, corrected, with a verdict.

For seeds 1..n that both arms have, d_i = arm_i - baseline_i, and

    interval     mean(d) -+ t_(n-1) s / sqrt(n)                     (Student 1908)
    p            two-sided t test of mean(d) = 0, the interval's twin
    exact p      share of the 2^n sign patterns with |mean(+-d)| >= |mean(d)|
                                       (Fisher 1935, The Design of Experiments, sec. 21)
    adjusted p   Holm's step-down over all arms   (Holm 1979, Scand. J. Stat. 6, p. 65)
    equivalence  the larger p of the two one-sided t tests of mean(d) > -margin and
                 mean(d) < margin, Holm-adjusted as well
                                     (Schuirmann 1987, doi:10.1007/BF01068419)

Where all differences are equal the t tests are not defined, and signs are flipped
instead: within the margin, each of the two one-sided tests has p = 2^-n.

With 2 to 5 seeds, as is usual, the exact p cannot fall below 2 / 2^n = 0.5 to 0.0625:
no test without a distribution can decide there. The t test can, but believes that the
differences are normal, which so few seeds cannot show. Both figures are given, with
that floor; the verdict uses the t test.
"""

import dataclasses
import gc
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats as distributions
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.evaluate.stats import LEVEL, Interval, over_seeds

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]
#: seed -> value of one arm.
Seeds = Mapping[Hashable, float]
#: Sign patterns that are all looked at (13 seeds); of more, as many are drawn.
MAX_PATTERNS = 2**13


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm beside the baseline.

    Attributes:
      arm, baseline: Their names.
      difference: Arm minus baseline with its interval, which is not widened for the
        number of arms; its `method` says why, where there is none.
      unpaired: Seeds that only one of the two has; they do not count.
      p: The two-sided p of `test`; None where there is no test.
      test: "t"; "sign flips" where all differences are equal and t is not defined; or
        "none".
      exact_p, exact_floor: The p of sign flips, and the least that so many seeds allow.
      adjusted_p: `p` after Holm's correction; an arm without a test counts as p = 1.
      margin: Differences below it do not matter; None: not stated, so not tested.
      equivalence_p, adjusted_equivalence_p: Of the two one-sided tests, of t or, as
        for `p`, of sign flips.
      verdict: "equivalent" if adjusted_equivalence_p < 1 - level, whatever the sign of
        the difference; else "better" or "worse" if adjusted_p < 1 - level; else
        "inconclusive", which is not a finding of equality.
    """

    arm: str
    baseline: str
    difference: Interval
    unpaired: tuple[Hashable, ...]
    p: float | None
    test: Literal["t", "sign flips", "none"]
    exact_p: float | None
    exact_floor: float | None
    adjusted_p: float
    margin: float | None
    equivalence_p: float | None
    adjusted_equivalence_p: float | None
    verdict: Verdict

    def json(self) -> dict[str, Any]:
        """The fields as JSON types; seeds as they are."""
        return dataclasses.asdict(self)


def compare_arms(
    arms: Mapping[str, Seeds],
    baseline: str,
    *,
    higher_is_better: bool = True,
    margin: float | None = None,
    level: float = LEVEL,
) -> list[Comparison]:
    """Compares every other arm with `baseline`, on the seeds that both have.

    Args:
      arms: Name -> seed -> value.
      baseline: One of them. If the same values chose it as the best, differences to it
        are biased in its favour; say so beside them.
      higher_is_better: What "better" means.
      margin: In the unit of the values; fixed before looking at them.
      level: Confidence level in (0, 1); tests reject below 1 - level.

    Raises:
      BadInput: A value is not finite, the margin is not positive, or the level is out
        of its range.
      UnknownName: There is no arm called `baseline`.
    """
    _check(arms, baseline, margin, level)
    others = [name for name in arms if name != baseline]
    found = [
        _compare(name, arms[name], baseline, arms[baseline], margin, level)
        for name in others
    ]
    adjusted = holm([one.p for one in found])
    equivalence: Sequence[float | None] = [None] * len(found)
    if margin is not None:
        equivalence = holm([one.equivalence_p for one in found])
    return [
        dataclasses.replace(
            one,
            adjusted_p=p,
            adjusted_equivalence_p=e,
            verdict=_verdict(one.difference, p, e, 1 - level, higher_is_better),
        )
        for one, p, e in zip(found, adjusted, equivalence, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float]:
    """Holm's adjusted p: max over j <= i of min(1, (m - j + 1) p_(j)), in their order.

    A test that was planned and could not be made (None) stays in the family as p = 1:
    to leave it out would make the others easier.
    """
    if not p_values:
        return []
    known = [1.0 if p is None else p for p in p_values]
    # It collects garbage each time, which is slow where a model is in memory; what is
    # frozen is not looked through.
    gc.freeze()
    try:
        adjusted: Any = multipletests(known, method="holm")[1]
    finally:
        gc.unfreeze()
    return [float(p) for p in adjusted]


def sign_flip_p(differences: Sequence[float]) -> float:
    """The two-sided p of mean(d) = 0 from the 2^n signs of symmetric differences.

    Exact up to 13 differences; beyond, from `MAX_PATTERNS` patterns drawn with a fixed
    seed and the observed one (Phipson & Smyth 2010), so that it is never 0.
    """
    tested = distributions.permutation_test(
        (np.asarray(differences, np.float64),),
        lambda d, axis: np.mean(d, axis=axis),
        permutation_type="samples",
        n_resamples=MAX_PATTERNS,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(tested.pvalue)


def _compare(
    arm: str,
    values: Seeds,
    baseline: str,
    others: Seeds,
    margin: float | None,
    level: float,
) -> Comparison:
    """One comparison while no other arm is known: nothing adjusted, no verdict."""
    seeds = [seed for seed in values if seed in others]
    first = np.array([values[seed] for seed in seeds], np.float64)
    second = np.array([others[seed] for seed in seeds], np.float64)
    unpaired = tuple(sorted(values.keys() ^ others.keys(), key=str))
    p = exact = floor = equivalence = None
    test: Literal["t", "sign flips", "none"] = "none"
    differences = _settled(first - second)
    if not seeds:
        how = "undefined: no seed in common"
        difference = Interval(None, None, None, level, 0, how)
    else:
        difference = over_seeds(differences, level)
    if len(seeds) > 1:
        exact = sign_flip_p(differences)
        # Of more seeds, only so many patterns are looked at.
        floor = max(2.0 ** (1 - len(seeds)), 1 / (MAX_PATTERNS + 1))
        p, test = exact, "sign flips"
        if margin is not None and difference.method != "t":
            # Of all patterns only the observed one is as far from either end.
            near = all(abs(one) < margin for one in differences)
            equivalence = 2.0 ** -len(seeds) if near else 1.0
    if difference.method == "t":
        test, p = "t", float(distributions.ttest_rel(first, second).pvalue)
        if margin is not None:
            equivalence = float(ttost_paired(first, second, -margin, margin)[0])
    return Comparison(
        arm, baseline, difference, unpaired, p, test, exact, floor,
        math.nan, margin, equivalence, None, "inconclusive",
    )  # fmt: skip


def _settled(differences: np.ndarray) -> list[float]:
    """Equal differences as equal numbers: 0.3 - 0.2 and 0.2 - 0.1 differ in a last bit,
    from which a t test would read near certainty."""
    scale = max(1.0, float(np.abs(differences).max(initial=0.0)))
    if differences.size and np.ptp(differences) <= 1e-12 * scale:
        differences = np.full_like(differences, differences.mean())
    return differences.tolist()


def _verdict(
    difference: Interval,
    p: float,
    equivalence_p: float | None,
    alpha: float,
    higher_is_better: bool,
) -> Verdict:
    if equivalence_p is not None and equivalence_p < alpha:
        return "equivalent"
    if difference.estimate is None or not p < alpha:
        return "inconclusive"
    return "better" if (difference.estimate > 0) == higher_is_better else "worse"


def _check(
    arms: Mapping[str, Seeds], baseline: str, margin: float | None, level: float
) -> None:
    if baseline not in arms:
        raise UnknownName(
            f"no arm is called {baseline!r}, to compare the others with. Nearest: "
            f"{nearest(baseline, arms)}."
        )
    for name, values in arms.items():
        for seed, value in values.items():
            if not math.isfinite(value):
                raise BadInput(
                    f"arm {name!r} has the value {value} for seed {seed!r}; a "
                    "comparison needs finite numbers. Leave the trial out, and say so."
                )
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise BadInput(
            f"a margin of equivalence is a positive number, not {margin}; leave it out "
            "to make no such test"
        )
    if not 0 < level < 1:
        raise BadInput(f"a confidence level lies between 0 and 1, not at {level}")
