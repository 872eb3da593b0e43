"""How far a number can be trusted: bootstrap intervals, paired and over seeds.

Rows made from one template are not independent, so groups of rows are resampled, not
rows (the cluster bootstrap; Davison & Hinkley 1997, sec. 3.8). A metric is a function
of sums over rows, so that a resample of G groups costs one row of a (resamples, G) x
(G, terms) product, and no row is ever copied.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int
from scipy import special

from lowrank.core.errors import BadInput

Method = Literal["percentile", "bca"]
#: Metric.value: (sums with any leading axes, sums of all the data) -> values.
Value = Callable[[np.ndarray, np.ndarray], np.ndarray]
RESAMPLES = 1000
LEVEL = 0.95
#: Resamples in which a metric may be undefined before its interval is.
MAX_UNDEFINED_SHARE = 0.05
#: Median bias of the resamples, in standard normal units, up to which BCa is used.
MAX_BIAS = 0.5
# Entries of the table of multiplicities that are held at once: 64 MiB of float64.
_MAX_COUNTS = 2**23


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and how far it can be trusted.

    Attributes:
      estimate: The value on all the data; None if it is not defined there.
      low, high: Ends of the interval; None where the data cannot tell. That is said
        rather than an interval of width 0, which would claim certainty.
      level: Confidence level, two-sided, equal tails.
      num_groups: Independent units that were resampled: groups, rows or seeds.
      method: "percentile", "bca", "normal", "t", or "undefined: " and the reason.
    """

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    num_groups: int
    method: str

    def json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)


def bootstrap(
    terms: Float64[np.ndarray, "rows terms"],
    value: Value,
    *,
    weight: Float64[np.ndarray, " rows"] | None = None,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    method: Method = "bca",
) -> Interval:
    """An interval for ``value(weight @ terms)`` by resampling groups of rows.

    "percentile" takes quantiles of the resampled values. "bca" moves these quantiles
    by the bias z0 and the acceleration a, the latter from leaving out one group at a
    time (Efron 1987, doi:10.1080/01621459.1987.10478410); where a is extreme,
    percentiles are taken, and named.
    Where |z0| > `MAX_BIAS` the resamples miss what the data has (a macro average over
    classes of one group each), so that none of their quantiles means much: then the
    interval is "normal", estimate -+ z sd(resampled values).

    Args:
      terms: What each row adds to the sums.
      value: Turns sums into the metric; gets the sums of all data as second argument.
      weight: Weights of the rows; 1 if None. Rows of weight 0 do not count.
      groups: Label of each row's group, of any sortable type; every row is a group of
        its own if None.
      seed: Makes the interval repeatable.
      resamples: Number of resamples, 1000 to 2000 for a 95 % interval.
      level: Confidence level in (0, 1).
      method: "percentile" or "bca".

    Raises:
      BadInput: No row has weight, or an argument is out of its range.
    """
    _check(level, resamples, method)
    weight = np.ones(len(terms)) if weight is None else weight
    real = weight > 0
    if not real.any():
        raise BadInput(
            "no row to resample: the split is empty, or all of it is padding"
        )
    sums = group_sums((terms * weight[:, None])[real], _only(groups, real))
    whole, num_groups = sums.sum(axis=0), len(sums)
    estimate = float(value(whole, whole))
    make = lambda low, high, how: Interval(
        estimate if math.isfinite(estimate) else None, low, high, level, num_groups, how
    )
    if not math.isfinite(estimate):
        return make(None, None, "undefined: no value on the data")
    if num_groups == 1:
        return make(None, None, "undefined: one group")
    draws = _draws(sums, whole, value, seed, resamples)
    undefined = np.isnan(draws)
    if undefined.mean() > MAX_UNDEFINED_SHARE:
        share = f"{100 * undefined.mean():.0f} %"
        return make(None, None, f"undefined: no value in {share} of the resamples")
    draws = draws[~undefined]
    if np.ptp(draws) <= 1e-12 * max(1.0, abs(estimate)):
        return make(None, None, "undefined: every resample gives the same value")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        jackknife = value(whole[None] - sums, whole)
        below = np.mean(draws < estimate) + np.mean(draws == estimate) / 2
        bias = float(special.ndtri(below))
        if abs(bias) > MAX_BIAS:
            reach = special.ndtri(tails[1]) * float(np.std(draws, ddof=1))
            return make(estimate - reach, estimate + reach, "normal")
        moved = _bca(tails, bias, jackknife)
        method = "percentile" if moved is None else "bca"
        tails = tails if moved is None else moved
    low, high = np.quantile(draws, tails)
    return make(float(low), float(high), method)


def paired_bootstrap(
    first: Float64[np.ndarray, "rows terms"],
    second: Float64[np.ndarray, "others terms"],
    value: Value,
    *,
    ids: tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " others"]],
    groups: np.ndarray | None = None,
    **options: Any,
) -> Interval:
    """An interval for the difference, first minus second, on the same rows.

    Both systems are judged on the same resample each time, so that what makes a row
    hard for both cancels.

    Args:
      first: Terms of the first system's rows.
      second: Terms of the second system's rows, in any order.
      value: As in `bootstrap`.
      ids: Row numbers of the first and of the second system.
      groups: Group of each row, in the order of the first system.
      **options: `seed`, `resamples`, `level`, `method` of `bootstrap`.

    Raises:
      BadInput: The two do not have exactly the same ids, each once.
    """
    order = _align(*ids)
    size = first.shape[1]

    def difference(sums: np.ndarray, whole: np.ndarray) -> np.ndarray:
        left = value(sums[..., :size], whole[:size])
        return np.asarray(left - value(sums[..., size:], whole[size:]))

    both = np.concatenate([first, second[order]], axis=1)
    return bootstrap(both, difference, groups=groups, **options)


def over_seeds(values: Sequence[float], level: float = LEVEL) -> Interval:
    """mean +- t_(n-1) s / sqrt(n): an interval over repeated runs (Student 1908).

    Args:
      values: One number per seed.
      level: Confidence level in (0, 1).

    Raises:
      BadInput: There is no value, or one is not finite.
    """
    _check(level, 1, "percentile")
    data = np.asarray(values, np.float64)
    if not data.size or not np.isfinite(data).all():
        raise BadInput(
            f"an interval over seeds needs finite numbers, not {list(values)}; leave "
            "out failed runs, and say how many there were"
        )
    mean, num_seeds = float(data.mean()), data.size
    if num_seeds == 1:
        return Interval(mean, None, None, level, 1, "undefined: one seed")
    if np.ptp(data) == 0:
        how = "undefined: every seed gives the same value"
        return Interval(mean, None, None, level, num_seeds, how)
    t = float(special.stdtrit(num_seeds - 1, (1 + level) / 2))
    half = t * float(data.std(ddof=1)) / math.sqrt(num_seeds)
    return Interval(mean, mean - half, mean + half, level, num_seeds, "t")


def group_sums(
    terms: Float64[np.ndarray, "rows terms"], groups: np.ndarray | None
) -> Float64[np.ndarray, "groups terms"]:
    """The terms summed within each group, groups in sorted order."""
    if groups is None:
        return terms
    if len(groups) != len(terms):
        raise BadInput(
            f"{len(groups)} group labels for {len(terms)} rows: give one for each row"
        )
    names, at = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), terms.shape[1]))
    np.add.at(sums, at.reshape(-1), terms)
    return sums


def multiplicities(
    num_groups: int, resamples: int, rng: np.random.Generator
) -> Int[np.ndarray, "resamples groups"]:
    """How often each group occurs in each resample of as many groups."""
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), resamples)


def _draws(sums, whole, value, seed, resamples):
    """The metric of every resample, in pieces that fit in memory."""
    rng = np.random.default_rng(seed)
    piece = max(1, _MAX_COUNTS // len(sums))
    parts = []
    for start in range(0, resamples, piece):
        counts = multiplicities(len(sums), min(piece, resamples - start), rng)
        parts.append(value(counts.astype(np.float64) @ sums, whole))
    return np.concatenate(parts)


def _bca(tails, bias, jackknife):
    """The tails moved by bias and acceleration; None where the formula breaks down."""
    gaps = np.nanmean(jackknife) - jackknife[~np.isnan(jackknife)]
    spread = np.sum(gaps**2) ** 1.5
    acceleration = np.sum(gaps**3) / (6 * spread) if spread > 0 else 0.0
    z = bias + special.ndtri(tails)
    if (acceleration * z >= 1).any():
        return None
    return special.ndtr(bias + z / (1 - acceleration * z))


def _align(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The order in which the rows of `second` are those of `first`."""
    for name, ids in (("first", first), ("second", second)):
        unique, count = np.unique(ids, return_counts=True)
        if (count > 1).any():
            raise BadInput(
                f"row {unique[count > 1][0]} occurs twice in the {name} system; a "
                "paired comparison needs every row exactly once"
            )
    if not np.array_equal(np.sort(first), np.sort(second)):
        only = np.setxor1d(first, second)
        raise BadInput(
            f"{len(only)} rows were scored by one system only, such as row {only[0]}; "
            "score both on the same rows of the same split"
        )
    where = np.argsort(second)
    return where[np.searchsorted(second[where], first)]


def _only(groups: np.ndarray | None, real: np.ndarray) -> np.ndarray | None:
    if groups is None:
        return None
    if len(groups) != len(real):
        raise BadInput(
            f"{len(groups)} group labels for {len(real)} rows: give one for each row"
        )
    return groups[real]


def _check(level: float, resamples: int, method: str) -> None:
    if not 0 < level < 1:
        raise BadInput(f"a confidence level lies between 0 and 1, not at {level}")
    if resamples < 1:
        raise BadInput(f"resamples must be at least 1, not {resamples}")
    if method not in ("percentile", "bca"):
        raise BadInput(f"method is 'percentile' or 'bca', not {method!r}")
