"""The frozen probe: a linear classifier on features of the untouched base.

The cheapest alternative to adaptation, and the one to beat. It gives logits, so that
the same report judges it and an adapted model alike.
"""

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lowrank.core.errors import BadInput
from lowrank.evaluate.metrics import Accuracy, LogLoss, Rows

logger = logging.getLogger(__name__)

#: Inverse strengths of the penalty. Unit features need weak penalties.
GRID = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
MAX_ITERATIONS = 2000
#: log p given to a class that the training rows do not contain: finite, so that the
#: mistake counts in the log loss, and lower than any that the fit gives in practice.
ABSENT_LOG_P = -30.0

Select = Literal["log_loss", "accuracy"]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
      logits: log p of the rows to be predicted, ``(rows, classes)``.
      strength: The C that was chosen.
      validation: For each C tried: {"log_loss", "accuracy"} on the validation rows.
      refit: Whether the final fit has seen the validation rows.
      num_parameters: Weights and biases of the linear map.
      num_unconverged: Fits that ran out of iterations; reported, not hidden.
    """

    logits: Float32[np.ndarray, "rows classes"]
    strength: float
    validation: dict[float, dict[str, float]]
    refit: bool
    num_parameters: int
    num_unconverged: int


def fit_probe(
    train: tuple[Float[np.ndarray, "train features"], Int[np.ndarray, " train"]],
    validation: tuple[
        Float[np.ndarray, "validation features"], Int[np.ndarray, " validation"]
    ],
    test: Float[np.ndarray, "rows features"],
    num_classes: int,
    *,
    grid: Sequence[float] = GRID,
    select: Select = "log_loss",
    refit: bool = False,
) -> Probe:
    """Fits softmax(x W + b) on L2-normalized features, with C chosen on validation.

    Minimizes sum_i -log p(label_i) + |W|^2 / (2 C), the bias unpenalized, for every C
    of the grid (scikit-learn's `LogisticRegression`, L-BFGS, deterministic). The C of
    the best validation log loss or accuracy wins; the stronger penalty among equals.

    Args:
      train: Pooled features of the training rows, and their labels.
      validation: The same of the validation rows.
      test: Features of the rows to predict; they take no part in any choice.
      num_classes: Classes of the task, whether or not the training rows have all.
      grid: The values of C.
      select: Which validation number decides.
      refit: Whether to fit once more, with the chosen C, on training and validation
        rows together. Leave it off to compare with systems that have not seen them.

    Raises:
      BadInput: A feature vector is zero or not finite, the training rows are of one
        class only, or a C is not positive.
    """
    if select not in ("log_loss", "accuracy"):
        raise BadInput(f"select is 'log_loss' or 'accuracy', not {select!r}")
    if not grid or min(grid) <= 0:
        raise BadInput(f"the grid of C needs positive numbers, not {list(grid)}")
    x, y = unit(train[0], "train"), train[1]
    x_validation, y_validation = unit(validation[0], "validation"), validation[1]
    x_test = unit(test, "test")
    if len(np.unique(y)) < 2:
        raise BadInput(
            f"the {len(y)} training rows are of one class; a probe needs two or more"
        )
    fits: dict[float, LogisticRegression] = {}
    table: dict[float, dict[str, float]] = {}
    unconverged = 0
    for strength in sorted(grid):
        fits[strength], converged = _fit(x, y, strength)
        unconverged += not converged
        rows = Rows.of(_log_p(fits[strength], x_validation, num_classes), y_validation)
        table[strength] = {m.name: m.of(rows) for m in (LogLoss(), Accuracy())}
    sign = 1 if select == "log_loss" else -1
    best = min(table, key=lambda strength: (sign * table[strength][select], strength))
    if len(table) > 1 and best in (min(table), max(table)):
        logger.warning(
            "the probe's best C = %g is at the edge of its grid; widen the grid", best
        )
    fit = fits[best]
    if refit:
        both = np.concatenate([x, x_validation]), np.concatenate([y, y_validation])
        fit, converged = _fit(*both, best)
        unconverged += not converged
    if unconverged:
        logger.warning(
            "%d fits of the probe stopped after %d iterations before they converged",
            unconverged,
            MAX_ITERATIONS,
        )
    return Probe(
        logits=_log_p(fit, x_test, num_classes).astype(np.float32),
        strength=best,
        validation=table,
        refit=refit,
        num_parameters=num_classes * (x.shape[1] + 1),
        num_unconverged=unconverged,
    )


def unit(
    features: Float[np.ndarray, "rows features"], where: str
) -> Float[np.ndarray, "rows features"]:
    """Feature vectors of length 1, in float64."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0))[:, 0])
    if bad.size:
        raise BadInput(
            f"feature vector {bad[0]} of the {where} rows is zero or not finite, so it "
            "has no direction; look for an empty text or a damaged base"
        )
    return wide / length


def _fit(x: np.ndarray, y: np.ndarray, strength: float):
    """The fitted model, and whether it converged."""
    model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    for other in caught:
        if not issubclass(other.category, ConvergenceWarning):
            warnings.warn_explicit(
                other.message, other.category, other.filename, other.lineno
            )
    return model, not any(issubclass(c.category, ConvergenceWarning) for c in caught)


def _log_p(model: LogisticRegression, x: np.ndarray, num_classes: int) -> np.ndarray:
    """log p over all classes, those that the fit has not seen included."""
    full = np.full((len(x), num_classes), ABSENT_LOG_P)
    # Not predict_log_proba: its probabilities underflow to log 0 where rows are easy.
    scores = model.decision_function(x)
    if scores.ndim == 1:
        scores = np.stack([np.zeros(len(x)), scores], axis=1)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    full[:, model.classes_] = log_p
    return full
