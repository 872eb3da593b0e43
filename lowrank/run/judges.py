"""How a validation in training becomes numbers: of classes, or of tokens.

The best state is chosen by one of these numbers, and halving compares trials by it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate import tokens
from lowrank.evaluate.metrics import STANDARD
from lowrank.evaluate.score import numbers, score_trials
from lowrank.run.checks import check_metric
from lowrank.run.forward import Batch, Forward

Predict = Callable[[Batch], Any]


@runtime_checkable
class Judge(Protocol):
    """Turns a pass over a split into numbers.

    Attributes:
      lower_is_better: Numbers of which the smallest is the best.
    """

    @property
    def lower_is_better(self) -> frozenset[str]: ...

    def check(self, field: str, name: str, validation: Sequence[Batch]) -> None:
        """Refuses a number that this split does not give.

        Raises:
          BadInput: There are others.
        """
        ...

    def numbers(
        self, forward: Forward, predict: Predict, validation: Sequence[Batch]
    ) -> list[dict[str, float]]:
        """One dict of numbers per trial, empty where some are not finite."""
        ...


def finite(
    found: Sequence[Any],
    told: Callable[[Any], dict[str, float]] = lambda one: one.numbers(),
) -> list[dict[str, float]]:
    """Numbers of each trial; none where they are not finite: the others go on."""
    rows = []
    for one in found:
        try:
            rows.append(told(one))
        except NonFinite:
            rows.append({})
    return rows


class OfClasses:
    """The metrics of classification, from logits."""

    lower_is_better: frozenset[str] = frozenset(
        m.name for m in STANDARD if not m.higher_is_better
    )

    def check(self, field: str, name: str, validation: Sequence[Batch]) -> None:
        """See `Judge`."""
        check_metric(field, name, validation)

    def numbers(
        self, forward: Forward, predict: Predict, validation: Sequence[Batch]
    ) -> list[dict[str, float]]:
        """See `Judge`."""
        names = [str(label) for label in range(forward.outputs.shape[-1])]
        found = score_trials(predict, validation, names, progress=False)
        return finite(found, numbers)


class OfTokens:
    """Loss, perplexity and accuracy of tokens, from `models.head.label_scores`."""

    lower_is_better: frozenset[str] = tokens.LOWER_IS_BETTER

    def check(self, field: str, name: str, validation: Sequence[Batch]) -> None:
        """See `Judge`."""
        del validation
        if name not in (known := ("accuracy", "loss", "perplexity")):
            raise BadInput(
                f"{field} = {name!r} is no number about tokens; there are "
                f"{', '.join(known)}"
            )

    def numbers(
        self, forward: Forward, predict: Predict, validation: Sequence[Batch]
    ) -> list[dict[str, float]]:
        """See `Judge`."""
        del forward
        return finite(tokens.score_tokens(predict, validation))


OF_CLASSES, OF_TOKENS = OfClasses(), OfTokens()
