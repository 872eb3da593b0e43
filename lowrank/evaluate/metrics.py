"""What a classifier's logits are worth: metrics as sums over rows, and their values.

Every metric here is a function of weighted sums, S_k = sum_i w_i f_k(row_i). So its
state is a vector of sums, merging two states is an addition, and a bootstrap resample
is the same sum with other weights (`lowrank.evaluate.stats`). All arithmetic is
float64 NumPy on the host, whatever the model computed in.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from lowrank.core.errors import BadInput, NonFinite

NUM_BINS = 15
MIN_ROWS = 20
# A class counts as present above this share of all weight: differences of sums, as
# in a jackknife, leave rounding noise where there is nothing.
_NOTHING = 1e-12


@dataclasses.dataclass(frozen=True)
class Rows:
    """Classified rows: what every metric starts from. Rows of weight 0 are gone.

    Attributes:
      label: The true class of each row.
      predicted: The class of the largest logit; the first one among equals.
      confidence: Softmax probability of the predicted class.
      log_loss: -log softmax(logits)[label], in nats.
      weight: Weight of each row, positive.
      num_classes: Classes there are, present or not.
    """

    label: Int[np.ndarray, " rows"]
    predicted: Int[np.ndarray, " rows"]
    confidence: Float64[np.ndarray, " rows"]
    log_loss: Float64[np.ndarray, " rows"]
    weight: Float64[np.ndarray, " rows"]
    num_classes: int

    @classmethod
    def of(
        cls,
        logits: Float[np.ndarray, "rows classes"],
        label: Int[np.ndarray, " rows"],
        weight: (
            Float[np.ndarray, " rows"]
            | Bool[np.ndarray, " rows"]
            | Int[np.ndarray, " rows"]
            | None
        ) = None,
    ) -> "Rows":
        """Reads logits, in whatever batches they come.

        Args:
          logits: Unnormalized log-probabilities.
          label: Numbers of the true classes; not looked at where the weight is 0.
          weight: Weights or a mask of the rows; 1 for every row if None.

        Raises:
          BadInput: A weight is negative or not finite, or a label is not the number
            of a class.
          NonFinite: A logit of a row that counts is not a finite number.
        """
        weight = np.ones(len(label)) if weight is None else weight.astype(np.float64)
        if not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise BadInput("the weight of a row must be finite and at least 0")
        real = weight > 0
        label, weight = label[real], weight[real]
        logits = logits[real].astype(np.float64)
        num_classes = logits.shape[1]
        if wrong := sorted({int(c) for c in label if not 0 <= c < num_classes}):
            raise BadInput(
                f"labels {wrong[:5]} are not classes: logits have {num_classes} "
                "columns, so labels run from 0 to one less. Check the task's classes."
            )
        if not np.isfinite(logits).all():
            bad = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise NonFinite(
                f"the logits of row {bad} of {len(logits)} are not finite numbers; a "
                "metric of them would mean nothing. Look for a diverged trial."
            )
        if not len(label):
            return cls(label, label, weight, weight, weight, num_classes)
        predicted = logits.argmax(axis=1)
        # Shifted by the largest logit first, so that the exponentials cannot overflow.
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        at = np.arange(len(label))
        return cls(
            label,
            predicted,
            np.exp(log_p[at, predicted]),
            -log_p[at, label],
            weight,
            num_classes,
        )

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> Float64[np.ndarray, " rows"]:
        """1 where the prediction is the label, else 0."""
        return (self.predicted == self.label).astype(np.float64)


class Metric(abc.ABC):
    """A number that depends on the rows only through weighted sums of `terms`.

    Attributes:
      name: What reports and validation logs call it.
      higher_is_better: The direction of improvement.
    """

    name: str
    higher_is_better: bool

    @abc.abstractmethod
    def terms(self, rows: Rows) -> Float64[np.ndarray, "rows terms"]:
        """f_k of every row, without its weight."""

    @abc.abstractmethod
    def value(
        self,
        sums: Float64[np.ndarray, "*draws terms"],
        whole: Float64[np.ndarray, " terms"] | None = None,
    ) -> Float64[np.ndarray, "*draws"]:
        """The metric of some sums; nan where it is not defined.

        Args:
          sums: Weighted sums of the terms, one vector per draw.
          whole: Sums over all the data where `sums` are of resamples. What is decided
            once for the data, not anew in each resample, is decided by these.
        """

    def sums(self, rows: Rows) -> Float64[np.ndarray, " terms"]:
        """Weighted sums of the terms over `rows`."""
        return rows.weight @ self.terms(rows)

    def of(self, rows: Rows) -> float:
        """The metric of `rows`; nan where it is not defined."""
        return float(self.value(self.sums(rows)))


@dataclasses.dataclass(frozen=True)
class Accuracy(Metric):
    """Weighted share of rows whose largest logit is the label's."""

    name = "accuracy"
    higher_is_better = True

    def terms(self, rows: Rows) -> Float64[np.ndarray, "rows terms"]:
        return np.stack([rows.correct, np.ones(len(rows))], axis=1)

    def value(self, sums, whole=None):
        return _ratio(sums[..., 0], sums[..., 1])


@dataclasses.dataclass(frozen=True)
class LogLoss(Metric):
    """-sum_i w_i log p_i[label_i] / sum_i w_i, natural logarithm, from log-softmax.

    Nothing is clipped: a confident mistake costs what it costs.
    """

    name = "log_loss"
    higher_is_better = False

    def terms(self, rows: Rows) -> Float64[np.ndarray, "rows terms"]:
        return np.stack([rows.log_loss, np.ones(len(rows))], axis=1)

    def value(self, sums, whole=None):
        return _ratio(sums[..., 0], sums[..., 1])


@dataclasses.dataclass(frozen=True)
class MacroF1(Metric):
    """Mean over classes of F1_c = 2 TP_c / (rows labeled c + rows predicted c).

    The mean is over the classes that occur among the labels or the predictions, as in
    scikit-learn's ``f1_score(average="macro")``; a class that is never predicted
    counts as 0. A resample takes the mean over the classes that occur in it.
    """

    name = "macro_f1"
    higher_is_better = True

    def terms(self, rows: Rows) -> Float64[np.ndarray, "rows terms"]:
        true = _one_hot(rows.label, rows.num_classes)
        predicted = _one_hot(rows.predicted, rows.num_classes)
        return np.concatenate([true * predicted, true + predicted], axis=1)

    def value(self, sums, whole=None):
        both, either = np.split(sums, 2, axis=-1)
        present = either > _NOTHING * either.sum(axis=-1, keepdims=True)
        f1 = 2 * both / np.where(present, either, 1)
        return _ratio(np.where(present, f1, 0).sum(axis=-1), present.sum(axis=-1))


@dataclasses.dataclass(frozen=True)
class CalibrationError(Metric):
    """ECE = sum_b (W_b / W) |accuracy_b - confidence_b| over bins of confidence.

    The plug-in estimator of Guo et al. 2017 (arXiv:1706.04599, eq. 3): top-label
    confidence, absolute difference, bins (low, high], empty bins contribute nothing.
    It is biased upwards, the more so the fewer rows a bin has: compare systems on the
    same rows only.

    Attributes:
      edges: Bin edges from 0 to 1: `NUM_BINS` of equal width by default, or of equal
        weight by `equal_mass_edges`.
      name: What to call it; equal-mass bins deserve another name.
    """

    edges: tuple[float, ...] = tuple(np.linspace(0, 1, NUM_BINS + 1).tolist())
    name: str = "calibration_error"

    higher_is_better = False

    def __post_init__(self) -> None:
        steps = np.diff(self.edges)
        if len(steps) < 1 or (steps <= 0).any() or self.edges[0] or self.edges[-1] != 1:
            raise BadInput(
                f"bin edges must rise from 0 to 1, not {list(self.edges)}; leave them "
                f"out for {NUM_BINS} bins of equal width"
            )

    def terms(self, rows: Rows) -> Float64[np.ndarray, "rows terms"]:
        inner = np.array(self.edges[1:-1])
        bins = np.searchsorted(inner, rows.confidence, side="left")
        gap = (rows.correct - rows.confidence)[:, None]
        hot = _one_hot(bins, len(inner) + 1)
        return np.concatenate([hot * gap, np.ones((len(rows), 1))], axis=1)

    def value(self, sums, whole=None):
        return _ratio(np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1])


@dataclasses.dataclass(frozen=True)
class WorstClass(Metric):
    """The smallest recall of a class that has at least `min_rows` rows of weight 1.

    nan if no class has as many. Resamples keep the classes that qualify in the whole
    data, and take the minimum over those of them that they contain.

    Attributes:
      min_rows: Weight below which a class says too little to be judged.
    """

    min_rows: int = MIN_ROWS

    name = "worst_class_recall"
    higher_is_better = True

    def terms(self, rows: Rows) -> Float64[np.ndarray, "rows terms"]:
        true = _one_hot(rows.label, rows.num_classes)
        return np.concatenate([true * rows.correct[:, None], true], axis=1)

    def value(self, sums, whole=None):
        least = self._recalls(sums, whole).min(axis=-1)
        return np.where(np.isfinite(least), least, np.nan)

    def which(self, sums: Float64[np.ndarray, " terms"]) -> int | None:
        """The class with the smallest recall; None if no class qualifies."""
        recalls = self._recalls(sums, None)
        return int(recalls.argmin()) if np.isfinite(recalls).any() else None

    def _recalls(self, sums, whole):
        """Recall per class; infinite where it does not take part in the minimum."""
        correct, weight = np.split(sums, 2, axis=-1)
        size = weight if whole is None else whole[weight.shape[-1] :]
        present = weight > _NOTHING * weight.sum(axis=-1, keepdims=True)
        judged = present & np.broadcast_to(size >= self.min_rows, weight.shape)
        return np.where(judged, correct / np.where(present, weight, 1), np.inf)


#: The metrics of every report, in its order.
STANDARD: tuple[Metric, ...] = (
    Accuracy(),
    MacroF1(),
    LogLoss(),
    CalibrationError(),
    WorstClass(),
)


@dataclasses.dataclass(frozen=True)
class Tally:
    """The state of several metrics: one vector of sums for each.

    ``Tally.empty(n).merge(Tally.of(rows)).merge(...)`` over the batches of a split
    gives what one `Tally.of` all its rows gives, up to the order of summation.

    Attributes:
      num_classes: Classes there are.
      sums: Name of a metric -> its sums.
      metrics: What is being tallied.
    """

    num_classes: int
    sums: Mapping[str, Any]
    metrics: tuple[Metric, ...] = STANDARD

    @classmethod
    def empty(cls, num_classes: int, metrics: Sequence[Metric] = STANDARD) -> "Tally":
        """The state before any row: merging it changes nothing."""
        none = np.zeros(0)
        nothing = np.zeros(0, np.int64)
        return cls.of(Rows(nothing, nothing, none, none, none, num_classes), metrics)

    @classmethod
    def of(cls, rows: Rows, metrics: Sequence[Metric] = STANDARD) -> "Tally":
        """The state after exactly these rows."""
        sums = {metric.name: metric.sums(rows) for metric in metrics}
        if len(sums) != len(metrics):
            raise BadInput(
                "two metrics of one tally share a name: "
                f"{', '.join(metric.name for metric in metrics)}; rename one"
            )
        return cls(rows.num_classes, sums, tuple(metrics))

    def merge(self, other: "Tally") -> "Tally":
        """The state after the rows of both.

        Raises:
          BadInput: The two count different classes or metrics.
        """
        if self.num_classes != other.num_classes or self.metrics != other.metrics:
            raise BadInput(
                f"tallies of {self.num_classes} and {other.num_classes} classes, or of "
                "different metrics, cannot be merged; make both for the same task"
            )
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return dataclasses.replace(self, sums=sums)

    def compute(self) -> dict[str, float | None]:
        """Name -> value; None where a metric is not defined for these rows."""
        values = {m.name: float(m.value(self.sums[m.name])) for m in self.metrics}
        return {name: v if np.isfinite(v) else None for name, v in values.items()}


def equal_mass_edges(rows: Rows, num_bins: int = NUM_BINS) -> tuple[float, ...]:
    """Edges of bins of confidence that hold about equal weight.

    For the adaptive calibration error (Nixon et al. 2019, arXiv:1904.01685, in its
    top-label form), ``CalibrationError(equal_mass_edges(rows), "adaptive_...")``. The
    edges depend on the rows, so that states made with different rows do not merge.
    Rows of equal confidence share a bin; there may be fewer bins than asked for.
    """
    if num_bins < 1 or not len(rows):
        raise BadInput(f"{num_bins} bins of {len(rows)} rows: both must be at least 1")
    order = np.argsort(rows.confidence)
    share = np.cumsum(rows.weight[order]) / rows.weight.sum()
    # The last row below a quantile closes its bin: bins are (low, high].
    at = np.searchsorted(share, np.arange(1, num_bins) / num_bins - _NOTHING)
    inner = np.unique(rows.confidence[order][at])
    inner = inner[(inner > 0) & (inner < 1)]
    return (0.0, *inner.tolist(), 1.0)


def metric_values(
    logits: Float[np.ndarray, "rows classes"],
    label: Int[np.ndarray, " rows"],
    weight: Float[np.ndarray, " rows"] | None = None,
    metrics: Sequence[Metric] = STANDARD,
) -> dict[str, float | None]:
    """All metrics of saved logits; None where one is not defined."""
    return Tally.of(Rows.of(logits, label, weight), metrics).compute()


def _one_hot(index: Int[np.ndarray, " rows"], size: int):
    hot = np.zeros((len(index), size))
    hot[np.arange(len(index)), index] = 1
    return hot


def _ratio(top: Any, bottom: Any) -> np.ndarray:
    """`top` / `bottom`, nan where there is nothing to divide by."""
    some = np.asarray(bottom) > 0
    return np.where(some, top / np.where(some, bottom, 1), np.nan)
