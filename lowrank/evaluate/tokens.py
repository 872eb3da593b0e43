"""How likely a language model finds what is right: loss, perplexity, accuracy.

Kept are sums of every row, so that intervals and comparisons read no token again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate import stats
from lowrank.evaluate.progress import bar

#: One batch -> "picked" and "correct" of every place, trials first.
Predict = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]
#: Numbers of which the smallest is the best.
LOWER_IS_BETTER: frozenset[str] = frozenset(("loss", "perplexity"))


@dataclasses.dataclass(frozen=True)
class TokenSums:
    """Sums over the counted tokens of every row, in row order.

    Attributes:
      terms: Negative log-probability in nats, weight, and weight of the tokens that
        were the likeliest.
    """

    terms: Float64[np.ndarray, "rows 3"]

    def check(self) -> None:
        """Raises `NonFinite` if a sum is not finite."""
        if not np.isfinite(self.terms).all():
            raise NonFinite("the model gives log-probabilities that are not finite")

    def numbers(self) -> dict[str, float]:
        """Mean loss in nats per token, perplexity, and accuracy token by token.

        Raises:
          NonFinite: A log-probability is not finite.
        """
        self.check()
        loss, weight, correct = self.terms.sum(axis=0)
        found = {"loss": loss / weight, "accuracy": correct / weight}
        return {**found, "perplexity": float(np.exp(found["loss"]))}

    def report(
        self, groups: Sequence[str] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Every number with its interval, as JSON types; see `stats.bootstrap`.

        Raises:
          NonFinite: A log-probability is not finite.
        """
        self.check()
        names = None if groups is None else np.asarray(groups)
        values = {
            "loss": _loss,
            "perplexity": lambda sums, whole: np.exp(sums[..., 0] / sums[..., 1]),
            "accuracy": lambda sums, whole: sums[..., 2] / sums[..., 1],
        }
        return {
            name: stats.bootstrap(self.terms, value, groups=names, **options).json()
            for name, value in values.items()
        }

    def rise(
        self, base: "TokenSums", groups: Sequence[str] | None = None, **options: Any
    ) -> dict[str, Any]:
        """The mean loss minus that of another model on the same rows, in nats.

        With an interval of the difference, as JSON types; see `stats.bootstrap`.
        """
        rows = np.arange(len(self.terms))
        names = None if groups is None else np.asarray(groups)
        return stats.paired_bootstrap(
            self.terms, base.terms, _loss, ids=(rows, rows), groups=names, **options
        ).json()


def _loss(sums: Any, whole: Any) -> Any:
    del whole
    return sums[..., 0] / sums[..., 1]


def score_tokens(
    predict: Predict,
    batches: Iterable[Mapping[str, np.ndarray]],
    progress: bool = False,
    text: str = "Evaluation",
) -> list[TokenSums]:
    """Sums of every row of a split, one result per trial.

    Args:
      predict: The model; may return before the device is done.
      batches: With "weight" of every place and "index", the number of every row, -1
        for filling.
      progress: Whether to show a bar; see `evaluate.progress`.
      text: What the bar says.

    Raises:
      BadInput: A row is missing or comes twice.
    """
    index, rows = [], []
    total = len(batches) if isinstance(batches, Sized) else None
    with bar(progress, text, total) as advance:
        for batch in batches:
            scores = jax.device_get(predict(batch))
            weight = np.asarray(batch["weight"], np.float64)
            # Where nothing counts there may stand anything.
            told = lambda name, s=scores, w=weight: np.where(w > 0, s[name], 0.0)
            picked, correct = told("picked"), told("correct")
            real = batch["index"] >= 0
            sums = np.stack(
                [
                    -(picked * weight).sum(axis=-1),
                    np.broadcast_to(weight.sum(axis=-1), picked.shape[:-1]),
                    (correct * weight).sum(axis=-1),
                ],
                axis=-1,
            )
            index.append(np.asarray(batch["index"])[real])
            rows.append(sums[:, real])
            advance()
    order = np.concatenate(index)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise BadInput("an evaluation runs over every row of a split exactly once")
    every = np.concatenate(rows, axis=1)[:, np.argsort(order)]
    return [TokenSums(own) for own in every]
