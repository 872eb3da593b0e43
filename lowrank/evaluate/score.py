"""Runs a split through a model, every row exactly once, and reports what came out.

How predictions are made and where batches come from are arguments. What is kept is
logits, so that a metric thought of later needs no second run.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int

from lowrank.core.errors import BadInput
from lowrank.evaluate import stats
from lowrank.evaluate.metrics import STANDARD, Metric, Rows, Tally, WorstClass
from lowrank.evaluate.progress import bar

#: One evaluation batch -> logits; of a pack, with a leading trials axis.
Predict = Callable[[Mapping[str, np.ndarray]], Any]
Batches = Iterable[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Logits of a whole split, in row order, each row exactly once.

    Attributes:
      index: Row numbers, rising.
      logits: Model outputs, stored as float32.
      labels: True classes.
      classes: Names of the classes, in the order of the logits' columns.
      groups: Which rows are not independent of each other, or None if all are.
    """

    index: Int[np.ndarray, " rows"]
    logits: Float32[np.ndarray, "rows classes"]
    labels: Int[np.ndarray, " rows"]
    classes: tuple[str, ...]
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.logits.shape[1] != len(self.classes):
            raise BadInput(
                f"logits have {self.logits.shape[1]} columns for {len(self.classes)} "
                "class names; the head and the task do not belong together"
            )
        if (np.diff(self.index) <= 0).any():
            raise BadInput("the rows of predictions must be in rising order, each once")
        if self.groups is not None and len(self.groups) != len(self.index):
            raise BadInput(
                f"{len(self.groups)} groups for {len(self.index)} rows: give the group "
                "of every row of the split, in row order"
            )

    @property
    def rows(self) -> Rows:
        """The rows as metrics want them.

        Raises:
          NonFinite: A logit is not a finite number.
        """
        return Rows.of(self.logits, self.labels)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of them: plain arrays, no objects."""
        kept = {
            "index": self.index,
            "logits": self.logits,
            "labels": self.labels,
            "classes": np.array(self.classes, dtype=np.str_),
        }
        return kept if self.groups is None else {**kept, "groups": self.groups}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Predictions":
        """The predictions of which `arrays` gave these."""
        fields = {name: arrays[name] for name in ("index", "logits", "labels")}
        classes = tuple(str(name) for name in arrays["classes"])
        groups = arrays.get("groups")
        return cls(**fields, classes=classes, groups=groups)


def score(
    predict: Predict,
    batches: Batches,
    classes: Sequence[str],
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    num_rows: int | None = None,
    progress: bool = True,
    text: str = "scoring",
) -> Predictions:
    """Predicts every row of a split once.

    Args:
      predict: Batch -> logits ``(batch, classes)``; may return before the device is
        done, since results are fetched one batch late.
      batches: Dicts with "label", "weight" (0 marks padding) and "index" (row number
        in the split, -1 marks padding), and whatever `predict` needs.
      classes: Names of the classes.
      groups: Group of each row of the split, by row number.
      num_rows: Rows of the split; taken from `groups`, else from the largest index,
        in which case missing rows at the end cannot be noticed.
      progress: Whether to show a bar; never without a terminal, nor for short work.
      text: What the bar says.

    Raises:
      BadInput: A row is missing, comes twice or lies outside the split, "index" and
        "weight" disagree on what is padding, or shapes do not fit.
    """
    scored = _collect(predict, batches, 2, progress, text)
    return _assemble(*scored, classes, groups, num_rows)


def score_trials(
    predict: Predict,
    batches: Batches,
    classes: Sequence[str],
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    num_rows: int | None = None,
    progress: bool = True,
    text: str = "scoring",
) -> list[Predictions]:
    """As `score`, for a `predict` that gives ``(trials, batch, classes)``.

    All trials see the same batches; one `Predictions` per trial comes back.
    """
    index, labels, logits = _collect(predict, batches, 3, progress, text)
    return [
        _assemble(index, labels, one, classes, groups, num_rows)
        for one in np.moveaxis(logits, 1, 0)
    ]


def numbers(
    predictions: Predictions, metrics: Sequence[Metric] = STANDARD
) -> dict[str, float]:
    """The defined metrics without intervals: what a validation in training needs."""
    values = Tally.of(predictions.rows, metrics).compute()
    return {name: value for name, value in values.items() if value is not None}


def report(
    predictions: Predictions,
    *,
    seed: int = 0,
    resamples: int = stats.RESAMPLES,
    level: float = stats.LEVEL,
    method: stats.Method = "bca",
    metrics: Sequence[Metric] = STANDARD,
) -> dict[str, Any]:
    """All metrics with intervals, as JSON types.

    Every metric sees the same resamples. The name of the worst class is a finding on
    these rows; its interval is that of the minimum, not of the class.

    Returns:
      "num_rows", "num_classes", "clustered" (whether groups were resampled),
      "metrics" {name: fields of `stats.Interval`}, "worst_class" (its name, or None
      if no class has enough rows) and "classes" {name: {"num_rows", "recall"}}.
    """
    rows = predictions.rows
    intervals = {
        metric.name: stats.bootstrap(
            metric.terms(rows),
            metric.value,
            groups=predictions.groups,
            seed=seed,
            resamples=resamples,
            level=level,
            method=method,
        ).json()
        for metric in metrics
    }
    judge = next((m for m in metrics if isinstance(m, WorstClass)), WorstClass())
    worst = judge.which(judge.sums(rows))
    return {
        "num_rows": len(rows),
        "num_classes": rows.num_classes,
        "clustered": predictions.groups is not None,
        "metrics": intervals,
        "worst_class": None if worst is None else predictions.classes[worst],
        "classes": _recalls(rows, predictions.classes),
    }


def compare(
    first: Predictions,
    second: Predictions,
    *,
    metrics: Sequence[Metric] = STANDARD,
    **options: Any,
) -> dict[str, Any]:
    """Interval of the difference, first minus second, of every metric.

    Args:
      first: One system's predictions; its groups are resampled.
      second: Another's, on the same rows.
      metrics: What to compare.
      **options: `seed`, `resamples`, `level`, `method` of `stats.bootstrap`.

    Raises:
      BadInput: Rows, labels, classes or groups differ.
    """
    if first.classes != second.classes:
        raise BadInput("the two systems name different classes, or in another order")
    ids = (first.index, second.index)
    # Where the rows differ, the paired bootstrap says which.
    if np.array_equal(*ids):
        if not np.array_equal(first.labels, second.labels):
            row = int(first.index[first.labels != second.labels][0])
            raise BadInput(
                f"the two systems were given different labels, as in row {row}; they "
                "were not scored on the same data"
            )
        _same_groups(first.groups, second.groups)
    left, right = first.rows, second.rows
    return {
        metric.name: stats.paired_bootstrap(
            metric.terms(left),
            metric.terms(right),
            metric.value,
            ids=ids,
            groups=first.groups,
            **options,
        ).json()
        for metric in metrics
    }


def _same_groups(first: np.ndarray | None, second: np.ndarray | None) -> None:
    if first is None or second is None:
        same = first is second
    else:
        same = np.array_equal(first, second)
    if not same:
        raise BadInput(
            "the two systems' rows are grouped differently; score both with the same "
            "groups, or both without"
        )


def _recalls(rows: Rows, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    size = np.bincount(rows.label, minlength=len(classes))
    hits = np.bincount(rows.label, rows.correct, minlength=len(classes))
    return {
        name: {
            "num_rows": int(size[c]),
            "recall": float(hits[c] / size[c]) if size[c] else None,
        }
        for c, name in enumerate(classes)
    }


def _collect(predict: Predict, batches: Batches, ndim: int, progress: bool, text: str):
    """Real rows of all batches: index, labels, and logits with rows in front."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    pending: collections.deque[tuple[np.ndarray, np.ndarray, Any]] = collections.deque()

    def fetch() -> None:
        index, labels, logits = pending.popleft()
        values = np.asarray(jax.device_get(logits))
        if values.ndim != ndim or values.shape[-2] != len(index):
            wanted = "(batch, classes)" if ndim == 2 else "(trials, batch, classes)"
            raise BadInput(
                f"predict gave logits of shape {values.shape} for a batch of "
                f"{len(index)} rows; it must give {wanted}"
            )
        real = index >= 0
        values = np.moveaxis(values, -2, 0)[real].astype(np.float32)
        parts.append((index[real], labels[real], values))

    total = len(batches) if isinstance(batches, Sized) else None
    with bar(progress, text, total) as advance:
        for batch in batches:
            index, labels = np.asarray(batch["index"]), np.asarray(batch["label"])
            _check_padding(index, np.asarray(batch["weight"]))
            pending.append((index, labels, predict(batch)))
            if len(pending) > 1:
                fetch()
            advance()
        while pending:
            fetch()
    if not parts:
        raise BadInput("there are no batches to score: the split is empty")
    index, labels, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    return index, labels, logits


def _check_padding(index: np.ndarray, weight: np.ndarray) -> None:
    if index.ndim != 1 or index.shape != weight.shape:
        raise BadInput(
            f"an evaluation batch has one 'index' and one 'weight' per row, not shapes "
            f"{index.shape} and {weight.shape}; evaluation batches have no trials axis"
        )
    if wrong := np.flatnonzero((index >= 0) != (weight > 0)).tolist():
        raise BadInput(
            f"place {wrong[0]} of a batch has index {index[wrong[0]]} and weight "
            f"{weight[wrong[0]]}; padding, and only padding, has index -1 and weight 0"
        )


def _assemble(index, labels, logits, classes, groups, num_rows) -> Predictions:
    """Rows in order, after making sure that each is there once."""
    if num_rows is None:
        num_rows = len(groups) if groups is not None else int(index.max(initial=-1)) + 1
    seen = np.bincount(index, minlength=num_rows)
    if len(seen) > num_rows:
        raise BadInput(
            f"row {len(seen) - 1} was scored, but the split has {num_rows} rows; the "
            "batches come from another split"
        )
    if (seen > 1).any():
        raise BadInput(
            f"row {int(seen.argmax())} was scored {int(seen.max())} times; an "
            "evaluation runs over the split once, without repeating rows"
        )
    if (missing := np.flatnonzero(seen == 0)).size:
        raise BadInput(
            f"{missing.size} of {num_rows} rows were not scored, such as row "
            f"{missing[0]}; do not drop the last, incomplete batch: pad it"
        )
    order = np.argsort(index)
    grouped = None if groups is None else np.asarray(groups)
    return Predictions(
        index[order], logits[order], labels[order], tuple(classes), grouped
    )
