"""Batches of rows of numbers: regression, and whatever else has no tokens.

Trials of a pack may have data of their own, of one shape: the trials of one seed share
its rows and their order. In an epoch the rows are permuted by (seed, epoch), so that a
batch is a function of the step, as in `data.pipeline`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from lowrank.core.errors import BadInput
from lowrank.data import order
from lowrank.data.buckets import Batch

#: Version of how batches are drawn; a stored position belongs to one version.
ORDER_VERSION = 1
#: A stream of its own beside those of `data.pipeline`.
_STREAM = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Inputs and targets.

    Attributes:
      x: What the model reads.
      y: What it should give.
    """

    x: Float32[np.ndarray, "rows features"]
    y: Float32[np.ndarray, "rows targets"]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise BadInput(f"{len(self.x)} rows have {len(self.y)} targets")


class RowPipeline:
    """The training batches of a pack, by global step; see `train.batches`.

    Every row is seen exactly once per epoch and trial.

    Attributes:
      num_steps, steps_per_epoch: Of the run, and of one pass over the rows.
    """

    def __init__(
        self,
        rows: Mapping[int, Rows],
        *,
        trial_seeds: Sequence[int],
        batch_size: int,
        num_steps: int,
    ):
        """Plans the batches; draws nothing yet.

        Args:
          rows: Seed -> its data, all of one shape.
          trial_seeds: One per trial.
          batch_size: Rows per batch; divides the rows.
          num_steps: How long to train.

        Raises:
          BadInput: A number is out of range, or a seed has no rows, or other ones.
        """
        self._seeds = order.checked_seeds(trial_seeds)
        if missing := sorted({*self._seeds} - {*rows}):
            raise BadInput(f"the trials of seed {missing[0]} have no rows")
        own = sorted({*self._seeds})
        shapes = {(rows[seed].x.shape, rows[seed].y.shape) for seed in own}
        if len(shapes) > 1:
            raise BadInput(
                f"the trials of a pack have rows of different shapes: {shapes}"
            )
        self._x = np.stack([rows[seed].x for seed in own])
        self._y = np.stack([rows[seed].y for seed in own])
        self._own = np.array([own.index(seed) for seed in self._seeds])
        self._distinct = own
        digest = hashlib.sha256()
        for part in (self._x, self._y):
            digest.update(np.ascontiguousarray(part, "<f4").tobytes())
        self._fingerprint = digest.hexdigest()
        num_rows = self._x.shape[1]
        if batch_size < 1 or num_rows % batch_size:
            raise BadInput(
                f"batch_size = {batch_size} does not divide the {num_rows} rows"
            )
        if num_steps < 1:
            raise BadInput(f"num_steps must be at least 1, not {num_steps}")
        self._size = batch_size
        self.num_steps = num_steps
        self.steps_per_epoch = num_rows // batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        return self.num_steps

    def _draw(self, epoch: int) -> np.ndarray:
        """(seeds, rows): the order of an epoch."""
        count = self._x.shape[1]
        drawn = []
        for seed in self._distinct:
            drawn.append(order.generator(_STREAM, seed, epoch).permutation(count))
        return np.stack(drawn)

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, trials first.

        Raises:
          IndexError: There is no such step.
        """
        epoch, within = order.place(step, self.num_steps, self.steps_per_epoch)
        taken = self._epoch(epoch)[:, within * self._size :][:, : self._size]
        index = taken[self._own]
        own = self._own[:, None]
        return {
            "x": self._x[own, index],
            "y": self._y[own, index],
            "weight": np.ones(index.shape, np.float32),
            "index": index.astype(np.int32),
        }

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from a step to the end.

        Raises:
          BadInput: `start_step` is beyond the end.
        """
        order.check_start(start_step, self.num_steps)
        return ((step, self.batch_at(step)) for step in range(start_step, len(self)))

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The only (rows, features) that occurs."""
        return ((self._size, self._x.shape[2]),)

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
