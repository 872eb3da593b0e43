"""Batches of images, all of one size; drawn as those of `data.sequences`.

Images are held as bytes and become normalized floats batch by batch: a data set of
floats would take four times the memory.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Int, UInt8

from lowrank.core.errors import BadInput
from lowrank.core.spec import digest, spec
from lowrank.data.buckets import Batch
from lowrank.data.sequences import SequencePipeline
from lowrank.models.pixels import ImageInput


@spec
class Pictures:
    """How images become batches.

    Attributes:
      batch_size: Images per batch.
    """

    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, not {self.batch_size}")


class PicturePipeline(SequencePipeline):
    """The training batches of a pack, by global step; see `SequencePipeline`."""

    def __init__(
        self,
        pixels: UInt8[np.ndarray, "rows side side channels"],
        labels: Int[np.ndarray, " rows"],
        wants: ImageInput,
        *,
        batch_size: int,
        trial_seeds: Sequence[int],
        num_epochs: int,
    ):
        """Plans the batches; draws nothing yet.

        Args:
          pixels: The images of the train split.
          labels: Their classes.
          wants: How pixels are normalized.
          batch_size: Images per batch.
          trial_seeds: One per trial.
          num_epochs: How long to train.

        Raises:
          BadInput: A number is out of range, or there are no images.
        """
        rows = {
            "pixels": pixels,
            "label": np.asarray(labels, np.int32),
            "weight": np.ones(len(pixels), np.float32),
        }
        super().__init__(
            rows, batch_size=batch_size, trial_seeds=trial_seeds, num_epochs=num_epochs
        )
        self._wants = wants

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, trials first.

        Raises:
          IndexError: There is no such step.
        """
        batch = super().batch_at(step)
        return {**batch, "pixels": self._wants.normalized(batch["pixels"])}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what gives it a meaning."""
        return {**super().state(step), "normalized": digest(self._wants)}


class PictureBatches(Sequence[Batch]):
    """Batches for evaluation, made when asked for: fixed order, every row once.

    The last one is filled up with copies that weigh 0 and have index -1.
    """

    def __init__(
        self,
        pixels: UInt8[np.ndarray, "rows side side channels"],
        labels: Int[np.ndarray, " rows"],
        wants: ImageInput,
        batch_size: int,
    ):
        """Makes none yet.

        Args:
          pixels: The images of a split.
          labels: Their classes.
          wants: How pixels are normalized.
          batch_size: Images per batch.

        Raises:
          BadInput: There are no images, or `batch_size` is not positive.
        """
        if batch_size < 1 or not len(pixels):
            raise BadInput(
                f"batch_size = {batch_size} must be at least 1, and there must be rows "
                f"(there are {len(pixels)})"
            )
        self._pixels, self._wants, self._size = pixels, wants, batch_size
        self._labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return math.ceil(len(self._pixels) / self._size)

    @overload
    def __getitem__(self, number: int) -> Batch: ...

    @overload
    def __getitem__(self, number: slice) -> list[Batch]: ...

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"batch {number} is not one of {len(self)}")
        first = number % len(self) * self._size
        index = np.arange(first, first + self._size)
        real = index < len(self._pixels)
        taken = np.where(real, index, first)
        return {
            "pixels": self._wants.normalized(self._pixels[taken]),
            "label": self._labels[taken],
            "weight": real.astype(np.float32),
            "index": np.where(real, index, -1).astype(np.int32),
        }
