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

from lowrank.core.errors import BadInput, Corrupt
from lowrank.data.buckets import MAX_SEED, Batch

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
        self._seeds = tuple(int(seed) for seed in trial_seeds)
        if not self._seeds or any(not 0 <= seed < MAX_SEED for seed in self._seeds):
            raise BadInput(
                "trial seeds must be one or more numbers from 0 to 2**31 - 1, not "
                f"{list(trial_seeds)}"
            )
        if missing := sorted({*self._seeds} - {*rows}):
            raise BadInput(f"the trials of seed {missing[0]} have no rows")
        order = sorted({*self._seeds})
        shapes = {(rows[seed].x.shape, rows[seed].y.shape) for seed in order}
        if len(shapes) > 1:
            raise BadInput(
                f"the trials of a pack have rows of different shapes: {shapes}"
            )
        self._x = np.stack([rows[seed].x for seed in order])
        self._y = np.stack([rows[seed].y for seed in order])
        self._own = np.array([order.index(seed) for seed in self._seeds])
        self._order = order
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
        for seed in self._order:
            sequence = np.random.SeedSequence((_STREAM, seed, epoch))
            # Named, so that no default of NumPy can change the order.
            rng = np.random.Generator(np.random.PCG64(sequence))
            drawn.append(rng.permutation(count))
        return np.stack(drawn)

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, trials first.

        Raises:
          IndexError: There is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not one of {self.num_steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
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
        if not 0 <= start_step <= self.num_steps:
            raise BadInput(
                f"cannot start at step {start_step} of a run of {self.num_steps} steps"
            )
        return ((step, self.batch_at(step)) for step in range(start_step, len(self)))

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The only (rows, features) that occurs."""
        return ((self._size, self._x.shape[2]),)

    def examples(self) -> list[Batch]:
        """One batch."""
        return [self.batch_at(0)]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what gives it a meaning."""
        digest = hashlib.sha256()
        for part in (self._x, self._y):
            digest.update(np.ascontiguousarray(part, "<f4").tobytes())
        return {
            "position": step,
            "version": ORDER_VERSION,
            "rows": digest.hexdigest(),
            "batch_size": self._size,
            "trial_seeds": list(self._seeds),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a stored state whose position means another batch here.

        Raises:
          Corrupt: A field is missing or differs; names it and both values.
        """
        for name, here in self.state(0).items():
            if name != "position" and state.get(name) != here:
                raise Corrupt(
                    f"the stored run used other data: {name} was {state.get(name)!r} "
                    f"and is {here!r}; restore the old data, or start over"
                )
        if not 0 <= state.get("position", -1) <= self.num_steps:
            raise Corrupt(
                f"the stored data position {state.get('position')} is not among the "
                f"{self.num_steps} steps of this run; start over"
            )
