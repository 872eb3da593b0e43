"""Batches of packed sequences; all trials of a pack share the rows, not their order.

In an epoch the rows are permuted by (trial seed, epoch), so that a batch is a function
of the step, as in `data.pipeline`.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data import order
from lowrank.data.buckets import Batch

#: Version of how batches are drawn; a stored position belongs to one version.
ORDER_VERSION = 1
#: A stream of its own beside those of `data.pipeline` and `data.rows`.
_STREAM = 4


@spec
class Sequences:
    """How questions and answers become batches.

    Attributes:
      batch_size: Rows per batch.
      length: Tokens of a row, and of the longest sequence.
      together: Whether sequences share a row where they fit; no number depends on it
        but those of the batches.
    """

    batch_size: int = 8
    length: int = 256
    together: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "length"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")


class SequencePipeline:
    """The training batches of a pack, by global step; see `train.batches`.

    Every row is seen exactly once per epoch and trial. The last batch of an epoch is
    filled up with copies of one of its rows, which weigh 0 and have index -1.

    Attributes:
      num_steps, steps_per_epoch: Of the run, and of one pass over the rows.
    """

    def __init__(
        self,
        rows: Mapping[str, Shaped[np.ndarray, "rows ..."]],
        *,
        batch_size: int,
        trial_seeds: Sequence[int],
        num_epochs: int | None = None,
        num_steps: int | None = None,
    ):
        """Plans the batches; draws nothing yet.

        Args:
          rows: "label", "weight", "ids" or "pixels", and what else the model reads;
            see `data.packing` and `data.pictures`.
          batch_size: Rows per batch.
          trial_seeds: One per trial.
          num_epochs: How long to train, or
          num_steps: how long to train, in steps.

        Raises:
          BadInput: A number is out of range, or there are no rows.
        """
        self._seeds = order.checked_seeds(trial_seeds)
        self._rows = dict(rows)
        self._count = len(rows["weight"])
        if batch_size < 1 or not self._count:
            raise BadInput(
                f"batch_size = {batch_size} must be at least 1, and there must be rows "
                f"(there are {self._count})"
            )
        if (num_epochs is None) == (num_steps is None):
            raise BadInput("give num_epochs or num_steps, and not both")
        wanted = num_epochs if num_steps is None else num_steps
        if wanted is None or wanted < 1:
            raise BadInput(f"num_epochs and num_steps must be at least 1, not {wanted}")
        self._size = batch_size
        self.steps_per_epoch = math.ceil(self._count / batch_size)
        self.num_steps = wanted if num_epochs is None else wanted * self.steps_per_epoch
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)
        digest = hashlib.sha256()
        for name in sorted(rows):
            digest.update(name.encode() + np.ascontiguousarray(rows[name]).tobytes())
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.num_steps

    def _draw(self, epoch: int) -> np.ndarray:
        """(trials, rows): the order of an epoch."""
        return np.stack(
            [
                order.generator(_STREAM, seed, epoch).permutation(self._count)
                for seed in self._seeds
            ]
        )

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, trials first.

        Raises:
          IndexError: There is no such step.
        """
        epoch, within = order.place(step, self.num_steps, self.steps_per_epoch)
        first = within * self._size
        taken = self._epoch(epoch)[:, first : first + self._size]
        short = self._size - taken.shape[1]
        filler = np.broadcast_to(taken[:, :1], (len(taken), short))
        index = np.concatenate([taken, filler], axis=1)
        real = np.arange(self._size) < taken.shape[1]
        batch = {name: value[index] for name, value in self._rows.items()}
        batch["weight"] = batch["weight"] * _on_rows(real[None], batch["weight"])
        batch["index"] = np.where(real[None], index, -1).astype(np.int32)
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from a step to the end.

        Raises:
          BadInput: `start_step` is beyond the end.
        """
        order.check_start(start_step, self.num_steps)
        return ((step, self.batch_at(step)) for step in range(start_step, len(self)))

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The only (rows, length) that occurs; of images, (rows, side)."""
        read = self._rows["ids"] if "ids" in self._rows else self._rows["pixels"]
        return ((self._size, read.shape[1]),)

    def examples(self) -> list[Batch]:
        """One batch."""
        return [self.batch_at(0)]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what gives it a meaning."""
        return {
            "position": step,
            "version": ORDER_VERSION,
            "rows": self._fingerprint,
            "batch_size": self._size,
            "trial_seeds": list(self._seeds),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a stored state whose position means another batch here.

        Raises:
          Corrupt: A field is missing or differs; names it and both values.
        """
        order.check_state(self.state(0), state, self.num_steps)


def eval_rows(
    rows: Mapping[str, Shaped[np.ndarray, "rows ..."]], batch_size: int
) -> list[Batch]:
    """Batches for evaluation: fixed order, every row exactly once.

    The last one is filled up with copies that weigh 0 and have index -1.

    Raises:
      BadInput: There are no rows, or `batch_size` is not positive.
    """
    count = len(rows["weight"])
    if batch_size < 1 or not count:
        raise BadInput(
            f"batch_size = {batch_size} must be at least 1, and there must be rows "
            f"(there are {count})"
        )
    found = []
    for first in range(0, count, batch_size):
        index = np.arange(first, first + batch_size)
        real = index < count
        taken = np.where(real, index, first)
        batch = {name: value[taken] for name, value in rows.items()}
        batch["weight"] = batch["weight"] * _on_rows(real, batch["weight"])
        batch["index"] = np.where(real, index, -1).astype(np.int32)
        found.append(batch)
    return found


def _on_rows(real: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Which rows are real, with axes for what a row may have a weight each of."""
    return real.reshape(real.shape + (1,) * (weight.ndim - real.ndim))
