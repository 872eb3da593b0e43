"""Texts and their classes: an encoder with a head, and numbers of classification."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import BadInput, UnknownName
from lowrank.data.buckets import Batching
from lowrank.data.checks import check_task
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.data.tasks import Task
from lowrank.data.tokens import Tokens, tokenize
from lowrank.evaluate.score import Predictions, report, score_trials
from lowrank.io import hub
from lowrank.io.bert import family_of
from lowrank.io.hub import Base
from lowrank.run.forward import Batch, inputs_of
from lowrank.run.judges import OF_CLASSES, Judge, Predict
from lowrank.run.problem import Shipping
from lowrank.run.settings import BaseSpec, Settings
from lowrank.train.losses import Loss, cross_entropy

_CARD = """# {name}

LoRA adapter of `{base}` for `{task}`, {classes} classes, trained with `lowrank`.

* License of the base: {license}
* Fingerprint of the base: `{fingerprint}`
* Trial: `{trial}`; its folder holds config, metrics, costs and predictions.

With `lowrank`: `lowrank.load_run("<folder of the run>")`. With PEFT:

```python
{code}
```
"""
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


@dataclasses.dataclass(frozen=True)
class Labeled:
    """A classification task on an encoder; see `problem.Problem`.

    Attributes:
      settings: What was asked for.
      task: The data, checked.
      tokens: Tokenized splits.
    """

    settings: Settings
    base: Base
    task: Task
    checks: Mapping[str, Any]
    tokens: Mapping[str, Tokens]
    loss: Loss = cross_entropy
    judge: Judge = OF_CLASSES

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def fingerprint(self) -> str:
        return self.task.fingerprint

    @property
    def rows(self) -> Mapping[str, int]:
        return {name: len(split.labels) for name, split in self.task.splits.items()}

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"classes": list(self.task.classes)}

    @property
    def batching(self) -> Batching:
        """How its rows become batches."""
        return batching_of(self.settings)

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return inputs_of(batch)

    def full(self, rows: int, width: int) -> Any:
        return full_texts(rows, width)

    def batches(self, seeds: Sequence[int]) -> TrainPipeline:
        return TrainPipeline(
            self.tokens["train"],
            self.task.splits["train"].labels,
            batching=self.batching,
            trial_seeds=seeds,
            num_epochs=self.settings.optim.epochs,
        )

    def evaluation(self, split: str) -> Sequence[Batch]:
        size = self.settings.evaluate.batch_size
        batching = dataclasses.replace(self.batching, batch_size=size)
        labels = self.task.splits[split].labels
        return list(eval_batches(self.tokens[split], labels, batching))

    def ids(self, split: str) -> Sequence[str]:
        return self.task.splits[split].ids

    def score(self, split: str, predict: Predict, progress: bool) -> list[Labels]:
        rows = self.task.splits[split]
        found = score_trials(
            predict,
            self.evaluation(split),
            self.task.classes,
            rows.groups,
            num_rows=len(rows.labels),
            progress=progress,
        )
        return [Labels(one) for one in found]

    def shipping(self, settings: Settings) -> Shipping | None:
        base = self.base
        if base.spec is None:
            return None
        family = family_of(base.hf_config or {}, base.name)
        classes = len(self.task.classes)
        pooling = settings.base.pooling
        code = _POOLER if pooling == "pooler" else _POOLED
        code = code.replace("{pooled}", _POOLS.get(pooling, ""))
        if self.task.splits["train"].pairs is not None:
            code = code.replace("attention_mask)", "attention_mask, token_type_ids)")
            code = code.replace(
                "mask=attention_mask, token_type_ids)",
                "mask=attention_mask, token_type_ids=token_type_ids)",
            )
        card = _CARD.format(
            name=settings.trial_id,
            base=settings.base.source,
            task=self.task.name,
            classes=classes,
            license=base.provenance.get("license", "not stated"),
            fingerprint=base.fingerprint,
            trial=settings.trial_id,
            code=code.replace("{classes}", str(classes)),
        )
        return Shipping(
            # The card's module calls any encoder so, and BERT's own are called so.
            module=functools.partial(family.module, prefix="bert."),
            kernel=lambda module, scan: family.kernel(
                module.removeprefix("bert."), scan=scan
            ),
            card=card,
            task_type="SEQ_CLS" if pooling == "pooler" else None,
            notes={"pooling": pooling, "classes": list(self.task.classes)},
        )


def load_labeled(settings: Settings) -> Labeled:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    cache = settings.run.cache
    task = settings.data.load(Path(cache) / "data" if cache else None)
    checks = check_task(task)
    base = load_base(settings, len(task.classes))
    limit = max_length(settings.base, base)
    tokens = tokenize_all(task, base, limit, cache)
    check_types(base, tokens)
    return Labeled(settings, base, task, checks, tokens)


def reopen_labeled(settings: Settings, facts: Mapping[str, Any]) -> tuple[Base, Any]:
    """The base as a finished run had it, and an example of its inputs.

    Args:
      settings: Of the run.
      facts: What its result says of the data.
    """
    return load_base(settings, len(facts["classes"])), text_inputs(1, 8)


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
    if split not in task.splits:
        raise UnknownName(f"no split {split!r}; there are {', '.join(task.splits)}")
    classes = tuple(facts["classes"])
    rows = task.splits[split]
    own = dataclasses.replace(rows, labels=_renumbered(task, split, classes))
    task = dataclasses.replace(task, classes=classes, splits={split: own})
    tokens = tokenize_all(task, base, max_length(settings.base, base), cache)
    return Labeled(settings, base, task, {}, tokens)


def _renumbered(task: Task, split: str, classes: Sequence[str]) -> np.ndarray:
    """Labels as a run numbers its classes."""
    known = {name: number for number, name in enumerate(classes)}
    labels = task.splits[split].labels
    if odd := [n for c in np.unique(labels) if (n := task.classes[c]) not in known]:
        raise BadInput(
            f"the {split} split of {task.name!r} has {len(odd)} classes that the run "
            f"does not know, as {odd[0]!r}; it knows {len(known)}, as {classes[0]!r}"
        )
    numbers = [known.get(name, -1) for name in task.classes]
    return np.asarray(numbers, np.int32)[labels]


def check_types(base: Base, tokens: Mapping[str, Tokens]) -> None:
    """Refuses pairs that a base cannot tell apart, as its tokenizer does."""
    for split, own in tokens.items():
        if own.types is None or base.spec is None:
            continue
        if (largest := int(own.types.max())) >= base.spec.num_token_types:
            raise BadInput(
                f"the tokenizer of base {base.name!r} tells {largest + 1} types of "
                f"tokens apart in the pairs of the {split} split, and its weights know "
                f"{base.spec.num_token_types}; tokenizer and weights do not belong "
                "together"
            )


def full_texts(rows: int, width: int) -> Mapping[str, Any]:
    """A batch in which every place holds a token, so that none is skipped."""
    shape = (rows, width)
    return {"ids": jnp.ones(shape, jnp.int32), "mask": jnp.ones(shape, bool)}


def text_inputs(rows: int, width: int) -> Mapping[str, Any]:
    """Shapes of what an encoder reads."""
    shape = (rows, width)
    return {
        "ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
    }


def batching_of(settings: Settings) -> Batching:
    """How texts become batches."""
    assert isinstance(settings.batching, Batching)
    return settings.batching


def load_base(settings: Settings, num_classes: int) -> Base:
    """The base that the settings name, with a head for `num_classes`."""
    return open_base(settings.base, num_classes, settings.run.cache)


def open_base(wanted: BaseSpec, num_classes: int, cache: str | None) -> Base:
    """A base as its config group describes it."""
    return hub.load(
        wanted.source,
        num_classes=num_classes,
        pooling=wanted.pooling,
        scan=wanted.scan,
        remat=wanted.remat,
        dtype=wanted.dtype,
        cache=cache,
    )


def max_length(wanted: BaseSpec, base: Any) -> int:
    """Longest input in tokens: as asked for, at most what the base was made for.

    Raises:
      BadInput: More is asked for.
    """
    asked = wanted.max_length
    if asked is not None and not 3 <= asked <= base.max_length:
        raise BadInput(
            f"base.max_length = {asked} is not between 3 and {base.max_length}, the "
            f"longest input that {base.name} was made for"
        )
    return asked or base.max_length


def tokenize_all(task: Task, base: Base, limit: int, cache: str | None) -> dict:
    """Every split, tokenized once and cached."""
    if base.tokenizer is None:
        raise BadInput(
            f"base {base.name!r} has no tokenizer, and the task {task.name!r} is text; "
            "put a tokenizer.json beside its weights"
        )
    folder = Path(cache) / "tokens" if cache else None
    return {
        name: tokenize(
            split, base.tokenizer, max_length=limit, data=task.fingerprint, cache=folder
        )
        for name, split in task.splits.items()
    }
