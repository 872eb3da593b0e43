"""Texts and their classes: an encoder with a head, and numbers of classification."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.data.checks import check_task
from lowrank.data.splits import Split
from lowrank.data.tasks import Task
from lowrank.evaluate.score import Predictions, report, score_trials
from lowrank.io.hub import Base
from lowrank.run.judges import OF_CLASSES, Judge, Predict
from lowrank.run.problem import Shipping, card_of, known_split
from lowrank.run.settings import Settings
from lowrank.run.texts import (
    TextProblem,
    load_base,
    open_base,
    shipping_of,
    text_inputs,
    tokenize_all,
)
from lowrank.train.losses import Loss, cross_entropy

_POOLED = """import torch
from peft import PeftModel
from transformers import AutoModel

class Classifier(torch.nn.Module):
    def __init__(self, bert, classes):
        super().__init__()
        self.bert = bert
        self.classifier = torch.nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        {pooled}
        return self.classifier(pooled)

bert = AutoModel.from_pretrained(BASE, add_pooling_layer=False)
model = PeftModel.from_pretrained(Classifier(bert, {classes}), ADAPTER)"""
_POOLS = {
    "mean": """mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)""",
    "cls": "pooled = hidden[:, 0]",
}
_POOLER = """from peft import PeftModel
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels={classes})
model = PeftModel.from_pretrained(model, ADAPTER)"""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Predictions of a split; see `problem.Scored`."""

    predictions: Predictions

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored per row; the names of the classes stand in the result."""
        arrays = self.predictions.arrays()
        return {name: array for name, array in arrays.items() if name != "classes"}

    def report(self, *, resamples: int, level: float) -> dict[str, Any]:
        """See `evaluate.score.report`."""
        return report(self.predictions, resamples=resamples, level=level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labeled(TextProblem):
    """A classification task on an encoder; see `problem.Problem`."""

    checks: Mapping[str, Any]
    loss: Loss = cross_entropy
    judge: Judge = OF_CLASSES

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"classes": list(self.task.classes)}

    def targets(self, split: str) -> np.ndarray:
        return self.task.splits[split].labels

    def score(self, split: str, predict: Predict, progress: bool) -> list[Labels]:
        rows = self.task.splits[split]
        found = score_trials(
            predict,
            self.evaluation(split),
            self.task.classes,
            rows.groups,
            num_rows=len(rows),
            progress=progress,
        )
        return [Labels(one) for one in found]

    def shipping(self, settings: Settings) -> Shipping | None:
        classes, pooling = len(self.task.classes), settings.base.pooling
        code = _POOLER if pooling == "pooler" else _POOLED
        code = code.replace("{pooled}", _POOLS.get(pooling, ""))
        if self.task.splits["train"].pairs is not None:
            code = code.replace("attention_mask)", "attention_mask, token_type_ids)")
            code = code.replace(
                "mask=attention_mask, token_type_ids)",
                "mask=attention_mask, token_type_ids=token_type_ids)",
            )
        card = card_of(
            self,
            settings,
            what=f", {classes} classes",
            code=code.replace("{classes}", str(classes)),
        )
        return shipping_of(self.base, pooling, card, self.facts)


def load_labeled(settings: Settings) -> Labeled:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    cache = settings.run.cache
    task = settings.data.load(Path(cache) / "data" if cache else None)
    checks = check_task(task)
    base = load_base(settings, len(task.classes))
    tokens = tokenize_all(task, base, settings)
    return Labeled(
        settings=settings, base=base, task=task, tokens=tokens, checks=checks
    )


def reopen_labeled(settings: Settings, facts: Mapping[str, Any]) -> tuple[Base, Any]:
    """The base as a finished run had it, and an example of its inputs.

    Args:
      settings: Of the run.
      facts: What its result says of the data.
    """
    base = open_base(settings.base, len(facts["classes"]), settings.run.cache)
    return base, text_inputs(1, 8)


def labeled_again(
    settings: Settings, base: Base, facts: Mapping[str, Any], split: str
) -> Labeled:
    """One split of the data that the settings name, for a finished run's model.

    Args:
      settings: Of the run, with the data that are wanted.
      base: As `reopen_labeled` gave it.
      facts: What the run's result says of its data: its classes, in the order of the
        logits. New data may lack some of them.
      split: Name of the split.

    Raises:
      BadInput: There is no such split, or it has a class that the run does not know.
    """
    cache = settings.run.cache
    task = settings.data.load(Path(cache) / "data" if cache else None)
    rows, classes = known_split(task.splits, split), tuple(facts["classes"])
    own = dataclasses.replace(rows, labels=renumbered(task, rows, classes))
    task = dataclasses.replace(task, classes=classes, splits={split: own})
    tokens = tokenize_all(task, base, settings)
    return Labeled(settings=settings, base=base, task=task, tokens=tokens, checks={})


def renumbered(task: Task, rows: Split, classes: Sequence[str]) -> np.ndarray:
    """Labels of rows of a task as a run numbers its classes.

    Raises:
      BadInput: They have a class that the run does not know.
    """
    known = {name: number for number, name in enumerate(classes)}
    labels = rows.labels
    if odd := [n for c in np.unique(labels) if (n := task.classes[c]) not in known]:
        raise BadInput(
            f"the rows of {task.name!r} have {len(odd)} classes that the run does not "
            f"know, as {odd[0]!r}; it knows {len(known)}, as {classes[0]!r}"
        )
    numbers = [known.get(name, -1) for name in task.classes]
    return np.asarray(numbers, np.int32)[labels]
