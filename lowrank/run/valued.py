"""Texts and their numbers: an encoder with one output, and the numbers of regression.

Right numbers are taken around the mean of the train split and over its standard
deviation, so that one learning rate suits grades and prices; whatever is told is in
their own unit again.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput, UnknownName
from lowrank.data.numbers import ValueTask
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.data.tokens import Tokens
from lowrank.evaluate import values
from lowrank.evaluate.values import Estimates, score_values
from lowrank.io.bert import family_of
from lowrank.io.hub import Base
from lowrank.run.forward import Batch, Forward, inputs_of
from lowrank.run.judges import Judge, Predict
from lowrank.run.labeled import (
    batching_of,
    check_types,
    full_texts,
    load_base,
    max_length,
    text_inputs,
    tokenize_all,
)
from lowrank.run.problem import Shipping
from lowrank.run.settings import Settings
from lowrank.train.losses import Loss, squared_error

_CARD = """# {name}

LoRA adapter of `{base}` for `{task}`, one number per text, trained with `lowrank`.

* License of the base: {license}
* Fingerprint of the base: `{fingerprint}`
* Pooling of the base: {pooling}; the head gives (number - {mean:g}) / {scale:g}.
* Trial: `{name}`; its folder holds config, metrics, costs and predictions.

With `lowrank`: `lowrank.load_run("<folder of the run>")`.
"""


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
        del validation
        if name not in values.METRICS:
            raise BadInput(
                f"{field} = {name!r} is no number about values; there are "
                f"{', '.join(values.METRICS)}"
            )

    def numbers(
        self, forward: Forward, predict: Predict, validation: Sequence[Batch]
    ) -> list[dict[str, float]]:
        """See `Judge`."""
        del forward
        found = score_values(predict, validation, mean=self.mean, scale=self.scale)
        return [one.numbers() for one in found]


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


@dataclasses.dataclass(frozen=True)
class Valued:
    """Regression on an encoder; see `problem.Problem`.

    Attributes:
      settings: What was asked for.
      task: The data, checked.
      tokens: Tokenized splits.
      mean, scale: Of the right numbers that training saw.
    """

    settings: Settings
    base: Base
    task: ValueTask
    tokens: Mapping[str, Tokens]
    mean: float
    scale: float
    loss: Loss = squared_error

    @property
    def name(self) -> str:
        return self.task.task.name

    @property
    def fingerprint(self) -> str:
        return self.task.fingerprint

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
            "splits": {name: told(own) for name, own in self.task.values.items()},
        }

    @property
    def rows(self) -> Mapping[str, int]:
        return {name: len(own) for name, own in self.task.values.items()}

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"mean": self.mean, "scale": self.scale}

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return inputs_of(batch)

    def full(self, rows: int, width: int) -> Any:
        return full_texts(rows, width)

    def batches(self, seeds: Sequence[int]) -> TrainPipeline:
        return TrainPipeline(
            self.tokens["train"],
            self._targets("train"),
            batching=batching_of(self.settings),
            trial_seeds=seeds,
            num_epochs=self.settings.optim.epochs,
        )

    def evaluation(self, split: str) -> Sequence[Batch]:
        size = self.settings.evaluate.batch_size
        batching = dataclasses.replace(batching_of(self.settings), batch_size=size)
        return list(eval_batches(self.tokens[split], self._targets(split), batching))

    def ids(self, split: str) -> Sequence[str]:
        return self.task.task.splits[split].ids

    def score(self, split: str, predict: Predict, progress: bool) -> list[Numbers]:
        del progress
        found = score_values(
            predict,
            self.evaluation(split),
            mean=self.mean,
            scale=self.scale,
            groups=self.task.task.splits[split].groups,
        )
        return [Numbers(one) for one in found]

    def shipping(self, settings: Settings) -> Shipping | None:
        base = self.base
        if base.spec is None:
            return None
        family = family_of(base.hf_config or {}, base.name)
        card = _CARD.format(
            name=settings.trial_id,
            base=settings.base.source,
            task=self.name,
            license=base.provenance.get("license", "not stated"),
            fingerprint=base.fingerprint,
            pooling=settings.base.pooling,
            mean=self.mean,
            scale=self.scale,
        )
        return Shipping(
            module=functools.partial(family.module, prefix="bert."),
            kernel=lambda module, scan: family.kernel(
                module.removeprefix("bert."), scan=scan
            ),
            card=card,
            task_type="SEQ_CLS" if settings.base.pooling == "pooler" else None,
            notes={"pooling": settings.base.pooling, **self.facts},
        )

    def _targets(self, split: str) -> np.ndarray:
        return (self.task.values[split] - self.mean) / self.scale


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
    return load_base(settings, 1), text_inputs(1, 8)


def valued_again(
    settings: Settings, base: Base, facts: Mapping[str, Any], split: str
) -> Valued:
    """One split of the data that the settings name, for a finished run's model.

    Raises:
      BadInput: There is no such split.
    """
    task = settings.data.load()
    splits = task.task.splits
    if split not in splits:
        raise UnknownName(f"no split {split!r}; there are {', '.join(splits)}")
    texts = dataclasses.replace(task.task, splits={split: splits[split]})
    own = ValueTask(texts, {split: task.values[split]})
    return _valued(settings, base, own, facts["mean"], facts["scale"])


def _valued(
    settings: Settings, base: Base, task: ValueTask, mean: float, scale: float
) -> Valued:
    limit = max_length(settings.base, base)
    tokens = tokenize_all(task.task, base, limit, settings.run.cache)
    check_types(base, tokens)
    return Valued(settings, base, task, tokens, mean, scale)
