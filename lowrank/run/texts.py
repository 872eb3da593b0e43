"""Texts for an encoder: how a base is opened, what it reads, how its adapter leaves.

`run.labeled` and `run.valued` say what is right about a text, and what is told of it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import BadInput
from lowrank.data.buckets import Batching
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.data.splits import Task
from lowrank.data.tokens import Tokens, tokenize
from lowrank.io import hub
from lowrank.io.bert import family_of
from lowrank.io.hub import Base
from lowrank.models.encoder import EncoderSpec
from lowrank.run.forward import Batch, inputs_of
from lowrank.run.problem import Shipping
from lowrank.run.settings import BaseSpec, Settings
from lowrank.sharding.partition import Place, placing


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextProblem:
    """Texts and what is right about each; see `problem.Problem`.

    Attributes:
      settings: What was asked for.
      task: The texts, checked.
      tokens: The same, tokenized.
    """

    settings: Settings
    base: Base
    task: Task
    tokens: Mapping[str, Tokens]

    def targets(self, split: str) -> np.ndarray:
        """What a model is to say of each text: a class or a number."""
        raise NotImplementedError(f"{type(self).__name__} has no targets")

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def fingerprint(self) -> str:
        return self.task.fingerprint

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.task.provenance

    @property
    def rows(self) -> Mapping[str, int]:
        return {name: len(split) for name, split in self.task.splits.items()}

    @property
    def batching(self) -> Batching:
        """How its rows become batches."""
        return batching_of(self.settings)

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return inputs_of(batch)

    def full(self, rows: int, width: int) -> Any:
        shape = (rows, width)
        return {"ids": jnp.ones(shape, jnp.int32), "mask": jnp.ones(shape, bool)}

    def batches(self, seeds: Sequence[int]) -> TrainPipeline:
        return TrainPipeline(
            self.tokens["train"],
            self.targets("train"),
            batching=self.batching,
            trial_seeds=seeds,
            num_epochs=self.settings.optim.epochs,
        )

    def evaluation(self, split: str) -> Sequence[Batch]:
        size = self.settings.evaluate.batch_size
        batching = dataclasses.replace(self.batching, batch_size=size)
        return list(eval_batches(self.tokens[split], self.targets(split), batching))

    def ids(self, split: str) -> Sequence[str]:
        return self.task.splits[split].ids


def shipping_of(
    base: Base, pooling: str, card: str, notes: Mapping[str, Any]
) -> Shipping | None:
    """How an encoder's adapter leaves; None for a base that PEFT cannot name.

    Args:
      base: The encoder.
      pooling: Its `base.pooling`.
      card: Text of the adapter's README.md.
      notes: Facts about its head.
    """
    if base.spec is None:
        return None
    family = family_of(base.hf_config or {}, base.name)
    return Shipping(
        # The card's module calls any encoder so, and BERT's own are called so.
        module=functools.partial(family.module, prefix="bert."),
        kernel=lambda module, scan: family.kernel(
            module.removeprefix("bert."), scan=scan
        ),
        card=card,
        task_type="SEQ_CLS" if pooling == "pooler" else None,
        notes={"pooling": pooling, **notes},
    )


def _check_types(base: Base, tokens: Mapping[str, Tokens]) -> None:
    """Refuses pairs that a base cannot tell apart, as its tokenizer does."""
    for split, own in tokens.items():
        if own.types is None or not isinstance(base.spec, EncoderSpec):
            continue
        if (largest := int(own.types.max())) >= base.spec.num_token_types:
            raise BadInput(
                f"the tokenizer of base {base.name!r} tells {largest + 1} types of "
                f"tokens apart in the pairs of the {split} split, and its weights know "
                f"{base.spec.num_token_types}; tokenizer and weights do not belong "
                "together"
            )


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
    """The base that the settings name, with a head for `num_classes`, to be trained."""
    place = placing(settings.mesh)
    return open_base(settings.base, num_classes, settings.run.cache, place)


def open_base(
    wanted: BaseSpec, num_classes: int, cache: str | None, place: Place | None = None
) -> Base:
    """A base as its config group describes it."""
    return hub.load(
        wanted.source,
        num_classes=num_classes,
        pooling=wanted.pooling,
        scan=wanted.scan,
        remat=wanted.remat,
        dtype=wanted.dtype,
        cache=cache,
        place=place,
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


def tokenize_all(task: Task, base: Base, settings: Settings) -> Mapping[str, Tokens]:
    """Every split, tokenized once and cached.

    Raises:
      BadInput: The base has no tokenizer, or one that its weights do not go with, or
        `base.max_length` is more than it was made for.
    """
    if base.images is not None:
        raise BadInput(
            f"base {base.name!r} reads images, and the task {task.name!r} is text; "
            "choose data of images, as data=digits, or a base of texts, as base=minilm"
        )
    if base.tokenizer is None:
        raise BadInput(
            f"base {base.name!r} has no tokenizer, and the task {task.name!r} is text; "
            "put a tokenizer.json beside its weights"
        )
    limit, cache = max_length(settings.base, base), settings.run.cache
    folder = Path(cache) / "tokens" if cache else None
    tokens = {
        name: tokenize(
            split, base.tokenizer, max_length=limit, data=task.fingerprint, cache=folder
        )
        for name, split in task.splits.items()
    }
    _check_types(base, tokens)
    return tokens
