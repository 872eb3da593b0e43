"""What all arms share: the shapes, the batch, the starting point, the optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

#: (rows, tokens of a row): a large batch and a small one.
SHAPES = ((32, 64), (8, 32))
#: Linear maps of a layer, in the order in which they run.
MAPS = ("query", "key", "value", "output", "up", "down")


@spec
class Setting:
    """One comparison.

    Attributes:
      base: As `lowrank.io.hub.load` takes it.
      folder: The same weights as a Hugging Face folder, for the torch arm.
      batch, seq: Rows of the batch and tokens of a row, padding included.
      rank: Components of every site.
      alpha: Numerator of the scale; the divisor is the rank.
      num_classes: Width of the head.
      lr: AdamW's learning rate, constant.
      clip: Largest global gradient norm.
      num_threads: Cores that an arm may use.
      seed: Of the batch and the starting point.
      model: Name of a shape in `shapes`, whose weights are drawn, instead of `base`.
      dtype: Of a shape's weights, and what is computed in.
      remat: "full" if layers are computed again in the backward pass.
      device: "cpu", or "gpu" for an accelerator.
    """

    base: str = "minilm"
    folder: str = ""
    batch: int = 32
    seq: int = 64
    rank: int = 8
    alpha: float = 16.0
    num_classes: int = 120
    lr: float = 1e-3
    clip: float = 1.0
    num_threads: int = 2
    seed: int = 0
    model: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"
    device: Literal["cpu", "gpu"] = "cpu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and not isinstance(value, str) and not value > 0:
                raise BadInput(f"bench: {field.name} must be positive, not {value}")

    @property
    def shape(self) -> str:
        """Batch and sequence as reports name them, as in 32x64."""
        return f"{self.batch}x{self.seq}"


class Arm(Protocol):
    """One implementation of the step, ready to run.

    Attributes:
      facts: Numbers that do not depend on the clock: "flops" of a step or None,
        "compile_seconds" or None, "num_trained" parameters.
    """

    facts: Mapping[str, Any]

    def step(self) -> float:
        """Takes one step on the batch, to its very end, and returns the loss."""
        ...


def draw_batch(setting: Setting, vocab_size: int) -> dict[str, np.ndarray]:
    """A host batch of one trial with the padding of a length bucket.

    Rows are longer than half the bucket, or they would be in the next smaller one;
    the longest fills it.
    """
    rng = np.random.default_rng(setting.seed)
    rows = setting.batch
    lengths = rng.integers(setting.seq // 2 + 1, setting.seq + 1, rows)
    lengths[0] = setting.seq
    mask = np.arange(setting.seq)[None] < lengths[:, None]
    ids = rng.integers(1, vocab_size, (rows, setting.seq), np.int32)
    batch = {
        "ids": np.where(mask, ids, 0).astype(np.int32),
        "mask": mask,
        "label": rng.integers(0, setting.num_classes, rows).astype(np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }
    return {name: value[None] for name, value in batch.items()}


def draw_start(
    setting: Setting, num_layers: int, d_model: int, d_ff: int
) -> dict[str, Any]:
    """The trained tree before the first step, as plain arrays.

    Returns:
      {map: {"a": (layers, rank, d_in), "b": (layers, rank, d_out)}} for every name in
      `MAPS`, and "head": {"kernel": (d_model, classes), "bias": (classes,)}. The
      second factors start small instead of at zero, so that every gradient differs
      from zero from the first step on and comparisons can see it.
    """
    rng = np.random.default_rng(setting.seed + 1)

    def uniform(bound: float, *shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    start: dict[str, Any] = {}
    for name in MAPS:
        d_in = d_ff if name == "down" else d_model
        d_out = d_ff if name == "up" else d_model
        start[name] = {
            "a": uniform(d_in**-0.5, num_layers, setting.rank, d_in),
            "b": uniform(1e-3, num_layers, setting.rank, d_out),
        }
    start["head"] = {
        "kernel": uniform(d_model**-0.5, d_model, setting.num_classes),
        "bias": np.zeros(setting.num_classes, np.float32),
    }
    return start
