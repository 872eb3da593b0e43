"""Images and their classes: a Vision Transformer with a head, and its numbers.

Images are stretched or shrunk to one square, whatever their shape; nothing is cut off.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import BadInput, Corrupt
from lowrank.core.spec import plain
from lowrank.data.checks import check_task
from lowrank.data.images import ImageTask
from lowrank.data.pictures import PictureBatches, PicturePipeline, Pictures
from lowrank.data.splits import Task
from lowrank.evaluate.score import score_trials
from lowrank.io import vit
from lowrank.io.hub import Base
from lowrank.models.pixels import ImageInput
from lowrank.models.vision import VisionSpec
from lowrank.run.forward import Batch, inputs_of
from lowrank.run.judges import OF_CLASSES, Judge, Predict
from lowrank.run.labeled import Labels, renumbered
from lowrank.run.problem import Shipping, card_of, known_split
from lowrank.run.settings import Settings
from lowrank.run.texts import load_base, open_base
from lowrank.train.losses import Loss, cross_entropy

#: Which pooling a task model of transformers has, by the kind of the base.
TASK_POOLING = {"vit": "cls", "dinov2": "both"}
_TASK_MODEL = """from peft import PeftModel
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(BASE, num_labels={classes})
model = PeftModel.from_pretrained(model, ADAPTER)
logits = model(pixels{flag}).logits"""
_CLASSIFIER = """import torch
from peft import PeftModel
from transformers import AutoModel

class Classifier(torch.nn.Module):
    def __init__(self, {kind}, classes):
        super().__init__()
        self.{kind} = {kind}
        self.classifier = torch.nn.Linear({width}, classes)

    def forward(self, pixels):
        hidden = self.{kind}(pixels{flag}).last_hidden_state
        return self.classifier({pooled})

base = AutoModel.from_pretrained(BASE)
model = PeftModel.from_pretrained(Classifier(base, {classes}), ADAPTER)"""
_POOLS = {
    "cls": "hidden[:, 0]",
    "mean": "hidden[:, 1:].mean(1)",
    "both": "torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictured:
    """A classification of images; see `problem.Problem`.

    Attributes:
      settings: What was asked for.
      base: The pretrained model.
      images: The images and their classes.
      side: Of the squares that the base gets, in pixels.
      checks: What a look at the data found.
    """

    settings: Settings
    base: Base
    images: ImageTask
    side: int
    checks: Mapping[str, Any]
    loss: Loss = cross_entropy
    judge: Judge = OF_CLASSES

    @property
    def task(self) -> Task:
        """The rows; a row's text is the hash of its image."""
        return self.images.task

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
    def wants(self) -> ImageInput:
        """What the base wants of images."""
        return wants_of(self.base)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {
            "classes": list(self.task.classes),
            "images": {"side": self.side, **plain(self.wants)},
        }

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return inputs_of(batch)

    def full(self, rows: int, width: int) -> Any:
        shape = (rows, width, width, self.wants.channels)
        return {"pixels": jnp.zeros(shape, jnp.float32)}

    def pixels(self, split: str) -> np.ndarray:
        """The images of a split as the squares that the base gets."""
        kept = self.__dict__.setdefault("_pixels", {})
        if split not in kept:
            kept[split] = self.images.fitted(split, self.wants, self.side)
        return kept[split]

    def batches(self, seeds: Sequence[int]) -> PicturePipeline:
        return PicturePipeline(
            self.pixels("train"),
            self.task.splits["train"].labels,
            self.wants,
            batch_size=self.settings.batching.batch_size,
            trial_seeds=seeds,
            num_epochs=self.settings.optim.epochs,
        )

    def evaluation(self, split: str) -> Sequence[Batch]:
        labels = self.task.splits[split].labels
        size = self.settings.evaluate.batch_size
        return PictureBatches(self.pixels(split), labels, self.wants, size)

    def ids(self, split: str) -> Sequence[str]:
        return self.task.splits[split].ids

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
        shape = self.base.spec
        if not isinstance(shape, VisionSpec):
            return None
        kind = str((self.base.hf_config or {})["model_type"])
        family, pooling = vit.KINDS[kind], settings.base.pooling
        caveat = self.base.provenance.get("caveat")
        wants = self.wants
        card = card_of(
            self,
            settings,
            what=f", {len(self.task.classes)} classes",
            notes=(
                *((f"The base: {caveat}.",) if caveat else ()),
                f"Images are stretched to {self.side} x {self.side} pixels; of each "
                f"channel, from 0 to 1, the mean {list(wants.mean)} is taken off and "
                f"the rest divided by {list(wants.std)}.",
            ),
            code=_code(kind, pooling, shape, self.side, len(self.task.classes)),
        )
        return Shipping(
            module=functools.partial(_module, family),
            kernel=lambda module, scan: family.kernel(module, scan=scan),
            card=card,
            task_type=None,
            notes={"pooling": pooling, **self.facts},
            unnamed=vit.UNNAMED,
        )


def _module(family: Any, path: str, layer: int | None) -> str:
    return family.module(path, layer)


def _code(kind: str, pooling: str, shape: VisionSpec, side: int, classes: int) -> str:
    """What opens the adapter with PEFT."""
    other = side != shape.image_size
    flag = ", interpolate_pos_encoding=True" if kind == "vit" and other else ""
    text = _TASK_MODEL if TASK_POOLING[kind] == pooling else _CLASSIFIER
    return text.format(
        kind=kind,
        classes=classes,
        flag=flag,
        width=shape.d_model * (2 if pooling == "both" else 1),
        pooled=_POOLS[pooling],
    )


def wants_of(base: Base) -> ImageInput:
    """What a base wants of images.

    Raises:
      BadInput: It reads none.
    """
    if base.images is None:
        raise BadInput(
            f"base {base.name!r} reads no images: choose base=vit, or the folder of a "
            "ViT or DINOv2 model; a base from Python says what it reads in "
            "Base(images=...)"
        )
    return base.images


def load_pictured(settings: Settings) -> Pictured:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    images = settings.data.load(_cache(settings))
    checks = check_task(images.task, what="images")
    base = load_base(settings, len(images.task.classes))
    return Pictured(
        settings=settings,
        base=base,
        images=images,
        side=_side(settings, base),
        checks=checks,
    )


def reopen_pictured(settings: Settings, facts: Mapping[str, Any]) -> tuple[Base, Any]:
    """The base as a finished run had it, and an example of its inputs.

    Raises:
      Corrupt: The base prepares its images in another way now.
    """
    base = open_base(settings.base, len(facts["classes"]), settings.run.cache)
    now, then = plain(wants_of(base)), dict(facts["images"])
    side = then.pop("side")
    if now != then:
        odd = sorted(name for name in now if now[name] != then.get(name))
        raise Corrupt(
            f"base {base.name!r} prepares images in another way than when the run was "
            f"trained: {', '.join(odd)}. Restore its {vit.PREPARATION}."
        )
    square = (1, side, side, wants_of(base).channels)
    return base, {"pixels": jax.ShapeDtypeStruct(square, jnp.float32)}


def pictured_again(
    settings: Settings, base: Base, facts: Mapping[str, Any], split: str
) -> Pictured:
    """One split of the data that the settings name, for a finished run's model.

    Args:
      settings: Of the run, with the data that are wanted; their `size` does not count.
      base: As `reopen_pictured` gave it.
      facts: What the run's result says of its data: its classes, in the order of the
        logits, and the size of its images. New data may lack some classes.
      split: Name of the split.

    Raises:
      BadInput: There is no such split, or it has a class that the run does not know.
    """
    images = settings.data.load(_cache(settings))
    task = images.task
    rows, classes = known_split(task.splits, split), tuple(facts["classes"])
    own = dataclasses.replace(rows, labels=renumbered(task, rows, classes))
    task = dataclasses.replace(task, classes=classes, splits={split: own})
    return Pictured(
        settings=settings,
        base=base,
        images=dataclasses.replace(images, task=task),
        side=facts["images"]["side"],
        checks={},
    )


def batches_of(
    settings: Settings, base: Base, facts: Mapping[str, Any], images: Sequence[Any]
) -> Sequence[Batch]:
    """New images, for a finished run's model.

    Args:
      settings: Of the run.
      base: As `reopen_pictured` gave it.
      facts: What the run's result says of its data.
      images: Arrays of bytes, each (height, width) or (height, width, channels).

    Raises:
      BadInput: One is something else.
    """
    wants, side = wants_of(base), facts["images"]["side"]
    for number, image in enumerate(images):
        shape = getattr(image, "shape", ())
        if len(shape) not in (2, 3) or not min(shape) or image.dtype != np.uint8:
            raise BadInput(
                "predict takes a list of images, arrays of uint8 of shape (height, "
                f"width) or (height, width, channels); number {number} is "
                f"{getattr(image, 'dtype', type(image).__name__)} {tuple(shape)}"
            )
    if not len(images):
        return ()
    deep = lambda image: np.asarray(image).reshape(*image.shape[:2], -1)
    pixels = np.stack([wants.fitted(deep(image), side) for image in images])
    labels = np.zeros(len(pixels), np.int32)
    size = settings.batching.batch_size
    return PictureBatches(pixels, labels, wants, size)


def _cache(settings: Settings) -> Path | None:
    cache = settings.run.cache
    return Path(cache) / "data" if cache else None


def _side(settings: Settings, base: Base) -> int:
    """The side of images, checked against the base.

    Raises:
      BadInput: It is no multiple of the patch, the base reads no images, or a setting
        is for texts.
    """
    wants = wants_of(base)
    if settings.base.max_length is not None:
        raise BadInput(
            f"base.max_length = {settings.base.max_length} is for texts; set it to "
            "null, and the size of images by data.size"
        )
    assert isinstance(settings.batching, Pictures)
    where = "data.size" if settings.data.size is not None else "the base's own size"
    return wants.side(settings.data.size, where)
