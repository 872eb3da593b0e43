"""Texts and their numbers: an encoder with one output, and the numbers of regression.

Right numbers are taken around the mean of the train split and over its standard
deviation, so that one learning rate suits grades and prices; whatever is told is in
their own unit again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.data.numbers import ValueTask
from lowrank.evaluate import values
from lowrank.evaluate.values import Estimates, score_values
from lowrank.io.hub import Base
from lowrank.run.forward import Batch, Forward
from lowrank.run.judges import Judge, Predict, finite
from lowrank.run.problem import ALL, Shipping, card_of, known_split
from lowrank.run.settings import Settings
from lowrank.run.texts import (
    TextProblem,
    load_base,
    open_base,
    shipping_of,
    text_inputs,
    tokenize_all,
)
from lowrank.train.losses import Loss, squared_error


@dataclasses.dataclass(frozen=True)
class OfValues:
    """Error and correlation of numbers, in their own unit; see `judges.Judge`.

    Attributes:
      mean, scale: Of the numbers that the model gives.
    """

    mean: float
    scale: float
    lower_is_better: frozenset[str] = values.LOWER_IS_BETTER

    def check(self, field: str, name: str, validation: Sequence[Batch]) -> None:
        """See `Judge`."""
        if name not in values.METRICS:
            raise BadInput(
                f"{field} = {name!r} is no number about values; there are "
                f"{', '.join(values.METRICS)}"
            )
        right = [y for one in validation for y in one["y"][one["index"] >= 0].flat]
        if name in values.OF_SPREAD and len({*right}) < 2:
            raise BadInput(
                f"{field} = {name!r} has no value where all right numbers are equal, "
                "as those of the validation split are: take rmse or mae, or other rows"
            )

    def numbers(
        self, forward: Forward, predict: Predict, validation: Sequence[Batch]
    ) -> list[dict[str, float]]:
        """See `Judge`."""
        del forward
        found = score_values(predict, validation, mean=self.mean, scale=self.scale)
        return finite(found)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Predicted numbers of a split; see `problem.Scored`."""

    estimates: Estimates

    def arrays(self) -> dict[str, np.ndarray]:
        """Predicted and right numbers."""
        return {"predicted": self.estimates.predicted, "right": self.estimates.right}

    def report(self, *, resamples: int, level: float) -> dict[str, Any]:
        """See `evaluate.values.Estimates.report`."""
        return self.estimates.report(resamples=resamples, level=level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Valued(TextProblem):
    """Regression on an encoder; see `problem.Problem`.

    Attributes:
      right: The texts with their right numbers.
      mean, scale: Of the right numbers that training saw.
    """

    right: ValueTask
    mean: float
    scale: float
    loss: Loss = squared_error

    @property
    def fingerprint(self) -> str:
        return self.right.fingerprint

    @property
    def judge(self) -> Judge:
        return OfValues(self.mean, self.scale)

    @property
    def checks(self) -> Mapping[str, Any]:
        told = lambda own: {
            "rows": len(own),
            "mean": float(own.mean()),
            "standard_deviation": float(own.std()),
            "smallest": float(own.min()),
            "largest": float(own.max()),
        }
        return {
            "task": self.name,
            "fingerprint": self.fingerprint,
            "splits": {name: told(own) for name, own in self.right.values.items()},
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"mean": self.mean, "scale": self.scale}

    def targets(self, split: str) -> np.ndarray:
        return (self.right.values[split] - self.mean) / self.scale

    def score(self, split: str, predict: Predict, progress: bool) -> list[Numbers]:
        del progress
        found = score_values(
            predict,
            self.evaluation(split),
            mean=self.mean,
            scale=self.scale,
            groups=self.task.splits[split].groups,
        )
        return [Numbers(one) for one in found]

    def shipping(self, settings: Settings) -> Shipping | None:
        pooling = settings.base.pooling
        card = card_of(
            self,
            settings,
            what=", one number per text",
            notes=(
                f"Pooling of the base: {pooling}; the head gives "
                f"(number - {self.mean:g}) / {self.scale:g}.",
            ),
        )
        return shipping_of(self.base, pooling, card, self.facts)


def load_valued(settings: Settings) -> Valued:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit, or all numbers of the
        train split are equal.
    """
    task = settings.data.load()
    right = task.values["train"]
    mean, scale = float(right.mean()), float(right.std())
    if not scale > 1e-12 * max(1.0, abs(mean)):
        raise BadInput(
            f"all {len(right)} numbers of the train split of {task.task.name!r} are "
            f"{mean:g}; there is nothing to learn. Is data.value the right column?"
        )
    base = load_base(settings, 1)
    return _valued(settings, base, task, mean, scale)


def reopen_valued(settings: Settings, facts: Mapping[str, Any]) -> tuple[Base, Any]:
    """The base as a finished run had it, and an example of its inputs."""
    del facts
    return open_base(settings.base, 1, settings.run.cache), text_inputs(1, 8)


def valued_again(
    settings: Settings, base: Base, facts: Mapping[str, Any], split: str
) -> Valued:
    """One split of the data that the settings name, for a finished run's model.

    Raises:
      BadInput: There is no such split.
    """
    task = settings.data.load()
    rows = known_split(task.task.splits, split)
    texts = dataclasses.replace(task.task, splits={split: rows})
    names = [*task.values] if split == ALL else [split]
    values = np.concatenate([task.values[name] for name in names])
    own = ValueTask(texts, {split: values})
    return _valued(settings, base, own, facts["mean"], facts["scale"])


def _valued(
    settings: Settings, base: Base, task: ValueTask, mean: float, scale: float
) -> Valued:
    return Valued(
        settings=settings,
        base=base,
        task=task.task,
        tokens=tokenize_all(task.task, base, settings),
        right=task,
        mean=mean,
        scale=scale,
    )
