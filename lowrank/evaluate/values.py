"""How near predicted numbers are to the right ones, with intervals.

Every metric is a value of sums over rows, as in `evaluate.metrics`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate import stats

#: One batch -> one output per row, (trials, batch, 1).
Predict = Callable[[Mapping[str, np.ndarray]], Any]
#: Numbers of which the smallest is the best.
LOWER_IS_BETTER: frozenset[str] = frozenset(("rmse", "mae"))
#: Numbers that have no value where all right numbers are equal.
OF_SPREAD: frozenset[str] = frozenset(("r2", "pearson", "spearman"))
Sums = Float64[np.ndarray, "*resamples terms"]


def _rmse(sums: Sums, whole: Any) -> Any:
    del whole
    return np.sqrt(sums[..., 1] / sums[..., 0])


def _mae(sums: Sums, whole: Any) -> Any:
    del whole
    return sums[..., 2] / sums[..., 0]


def _correlation(first: int) -> Callable[[Sums, Any], Any]:
    """Pearson's r of sums of x, y, xx, yy and xy, which begin at `first`."""

    def value(sums: Sums, whole: Any) -> Any:
        del whole
        count = sums[..., 0]
        x, y, xx, yy, xy = (sums[..., first + n] / count for n in range(5))
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.sqrt((xx - x**2) * (yy - y**2))
            # In units of the deviation; what is left of equal numbers is rounding.
            return np.where(spread > 1e-12, (xy - x * y) / spread, np.nan)

    return value


def _r2(sums: Sums, whole: Any) -> Any:
    r"""1 - sum (y - f)^2 / sum (y - mean y)^2."""
    del whole
    # The deviation that right numbers are told in is that of the whole split.
    count = sums[..., 0]
    around = sums[..., 6] - sums[..., 4] ** 2 / count
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(around > 1e-12, 1 - sums[..., 13] / around, np.nan)


#: Name -> value of the sums of `Estimates.terms`.
METRICS: Mapping[str, Callable[[Sums, Any], Any]] = {
    "rmse": _rmse,
    "mae": _mae,
    "r2": _r2,
    "pearson": _correlation(3),
    "spearman": _correlation(8),
}


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Predicted and right numbers of a split, in row order.

    Attributes:
      predicted, right: One per row.
      groups: Which rows are not independent of each other; None: all are.
    """

    predicted: Float64[np.ndarray, " rows"]
    right: Float64[np.ndarray, " rows"]
    groups: tuple[str, ...] | None = None

    @property
    def terms(self) -> Float64[np.ndarray, "rows 14"]:
        """What every row adds: 1, squared and absolute error, x, y, xx, yy, xy of
        the numbers in units of their deviation, the same of their ranks,
        and the squared error in units of the right numbers' deviation."""
        if not np.isfinite(self.predicted).all():
            raise NonFinite("the model gives numbers that are not finite")
        off = self.predicted - self.right
        columns = [np.ones_like(off), off**2, np.abs(off)]
        for x, y in (
            (self.predicted, self.right),
            (_ranks(self.predicted), _ranks(self.right)),
        ):
            x, y = _standard(x), _standard(y)
            columns += [x, y, x * x, y * y, x * y]
        # Squared errors in the unit of the right numbers' deviation, for r2.
        unit = self.right.std()
        columns.append((off / unit) ** 2 if unit else np.zeros_like(off))
        return np.stack(columns, axis=1)

    def numbers(self) -> dict[str, float]:
        """Every metric that is defined, without intervals.

        Raises:
          NonFinite: A prediction is not finite.
        """
        sums = self.terms.sum(axis=0)
        found = {name: float(value(sums, sums)) for name, value in METRICS.items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def report(self, **options: Any) -> dict[str, Any]:
        """Every metric with its interval, as JSON types; see `stats.bootstrap`.

        Spearman's correlation is of the ranks in the whole split, in resamples too.
        """
        names = None if self.groups is None else np.asarray(self.groups)
        terms = self.terms
        metrics = {
            name: stats.bootstrap(terms, value, groups=names, **options).json()
            for name, value in METRICS.items()
        }
        return {
            "num_rows": len(self.right),
            "clustered": names is not None,
            "metrics": metrics,
        }


def _standard(x: Float64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Around the mean, in units of the deviation; zeros if all numbers are equal."""
    around = x - x.mean()
    spread = float(np.sqrt((around**2).mean()))
    # Of equal numbers the rounding of their mean is left.
    return around / spread if spread > 1e-14 * np.abs(x).max() else np.zeros_like(x)


def _ranks(x: Float64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Ranks from 0 to 1; equal numbers have the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which] / len(x)


def score_values(
    predict: Predict,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    groups: tuple[str, ...] | None = None,
) -> list[Estimates]:
    """Predicts every row of a split once, one result per trial.

    Args:
      predict: The model; may return before the device is done.
      batches: With "y", one number per row, and "index", the number of the row, -1 for
        filling.
      mean, scale: Numbers of the model are (number - mean) / scale.
      groups: Group of each row, by row number.

    Raises:
      BadInput: A row is missing or comes twice.
    """
    index, right, found = [], [], []
    for batch in batches:
        outputs = np.asarray(jax.device_get(predict(batch)), np.float64)[..., 0]
        real = batch["index"] >= 0
        index.append(np.asarray(batch["index"])[real])
        right.append(np.asarray(batch["y"], np.float64)[real, 0])
        found.append(outputs[:, real])
    order = np.concatenate(index)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise BadInput("an evaluation runs over every row of a split exactly once")
    every = np.concatenate(found, axis=1)[:, np.argsort(order)] * scale + mean
    wanted = np.concatenate(right)[np.argsort(order)] * scale + mean
    return [Estimates(own, wanted, groups) for own in every]
