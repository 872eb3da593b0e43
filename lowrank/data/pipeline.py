"""Batches as a pure function of the global step: nothing to rewind, nothing to drift.

Rows are put into length buckets, and a batch holds rows of one bucket, so that few
shapes are compiled. In an epoch

  the sequence of buckets   is drawn from (data seed, epoch), equal for all trials;
  the rows of each bucket   are permuted by (trial seed, epoch, bucket length).

So the trials of a pack meet equal shapes at every step and each in its own order, and
a run that continues at step n sees exactly what it would have seen.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int

from lowrank.core.errors import BadInput
from lowrank.core.spec import digest
from lowrank.data import order
from lowrank.data.buckets import Batch, Batching, Buckets
from lowrank.data.tokens import Tokens

#: Version of how batches are drawn; a stored position belongs to one version.
ORDER_VERSION = 1
#: Separate streams of the same seeds.
_SEQUENCE, _ROWS = 1, 2
#: Batches are a few gathers; more threads would only compete with the compute.
_READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class TrainPipeline:
    """The training batches of a pack, by global step.

    Every row is seen exactly once per epoch and trial. The last batch of a bucket is
    filled up with copies of one of its rows, which weigh 0 and have index -1.
    """

    def __init__(
        self,
        tokens: Tokens,
        labels: Int[np.ndarray, " rows"] | Float[np.ndarray, " rows"],
        *,
        batching: Batching,
        trial_seeds: Sequence[int],
        num_epochs: int | None = None,
        num_steps: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Plans the batches; draws nothing yet.

        Args:
          tokens: The train split.
          labels: Its labels: classes, or numbers ("y" in batches).
          batching: Batch size, buckets and data seed.
          trial_seeds: One per trial.
          num_epochs: How long to train, or
          num_steps: how long to train, in steps.
          process_index: Which part of each batch this process gets.
          process_count: Parts of a batch.

        Raises:
          BadInput: A number is out of range, or the batch size cannot be shared out.
        """
        self._buckets = Buckets(tokens, labels, batching)
        self._batching = batching
        self._seeds = order.checked_seeds(trial_seeds)
        if not 0 <= process_index < process_count:
            raise BadInput(f"process {process_index} of {process_count} does not exist")
        if batching.batch_size % process_count:
            raise BadInput(
                f"batch_size = {batching.batch_size} cannot be shared out to "
                f"{process_count} processes; make it a multiple"
            )
        share = batching.batch_size // process_count
        self._local = slice(process_index * share, (process_index + 1) * share)
        self._num_processes = process_count
        # One entry per step of an epoch, in the order before shuffling.
        plan = [
            (bucket, number)
            for bucket, rows in self._buckets.rows.items()
            for number in range(math.ceil(len(rows) / batching.batch_size))
        ]
        self._plan = np.array(plan, np.int64)
        self.steps_per_epoch = len(plan)
        self.num_steps = self._total(num_epochs, num_steps)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)
        integer = np.issubdtype(labels.dtype, np.integer)
        self._labels_digest = hashlib.sha256(
            np.ascontiguousarray(labels, "<i4" if integer else "<f8").tobytes()
        ).hexdigest()
        self._tokens_fingerprint = tokens.fingerprint

    def _total(self, num_epochs: int | None, num_steps: int | None) -> int:
        if (num_epochs is None) == (num_steps is None):
            raise BadInput("give num_epochs or num_steps, and not both")
        if num_epochs is not None and num_epochs < 1:
            raise BadInput(f"num_epochs must be at least 1, not {num_epochs}")
        if num_steps is not None and num_steps < 1:
            raise BadInput(f"num_steps must be at least 1, not {num_steps}")
        if num_steps is not None:
            return num_steps
        assert num_epochs is not None
        return num_epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return self.num_steps

    def _draw(self, epoch: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """(bucket and number by step, {bucket: positions by trial}) of an epoch."""
        sequence = order.generator(_SEQUENCE, self._batching.seed, epoch)
        plan = self._plan[sequence.permutation(len(self._plan))]
        rows = {
            bucket: np.stack(
                [
                    order.generator(_ROWS, seed, epoch, bucket).permutation(
                        len(members)
                    )
                    for seed in self._seeds
                ]
            )
            for bucket, members in self._buckets.rows.items()
        }
        return plan, rows

    def batch_at(self, step: int) -> Batch:
        """This process's part of the batch of a step, trials first.

        Raises:
          IndexError: There is no such step.
        """
        epoch, within = order.place(step, self.num_steps, self.steps_per_epoch)
        plan, rows = self._epoch(epoch)
        bucket, number = plan[within].tolist()
        size = self._batching.batch_size
        taken = rows[bucket][:, number * size : (number + 1) * size]
        filler = np.broadcast_to(
            taken[:, :1], (len(self._seeds), size - taken.shape[1])
        )
        positions = np.concatenate([taken, filler], axis=1)[:, self._local]
        real = (np.arange(size) < taken.shape[1])[self._local]
        return self._buckets.gather(bucket, positions, real[None])

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from a step to the end, prepared ahead by Grain.

        Raises:
          BadInput: `start_step` is beyond the end.
        """
        order.check_start(start_step, self.num_steps)
        return self._iterate(start_step)

    def _iterate(self, start_step: int) -> Iterator[tuple[int, Batch]]:
        if start_step == self.num_steps:
            return
        batches = grain.MapDataset.range(start_step, self.num_steps).map(self.batch_at)
        iterator = iter(batches.to_iter_dataset(_READING))
        try:
            for step in range(start_step, self.num_steps):
                yield step, next(iterator)
        finally:
            # Stops the threads of a loop that was left early.
            iterator.close()

    def _first_steps(self) -> list[int]:
        """The first step of each bucket that occurs, shortest bucket first."""
        plan, _ = self._epoch(0)
        seen: dict[int, int] = {}
        for step in range(min(self.num_steps, self.steps_per_epoch)):
            seen.setdefault(int(plan[step, 0]), step)
        return [seen[bucket] for bucket in sorted(seen)]

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The different (batch, seq) of this process that occur, to compile for."""
        plan, _ = self._epoch(0)
        size = self._local.stop - self._local.start
        return tuple((size, int(plan[step, 0])) for step in self._first_steps())

    def examples(self) -> list[Batch]:
        """One batch of each shape, in the order of `shapes`."""
        return [self.batch_at(step) for step in self._first_steps()]

    def report(self) -> dict[str, Any]:
        """Steps, rows per bucket, truncation and padding, for the record."""
        return {
            "num_steps": self.num_steps,
            "steps_per_epoch": self.steps_per_epoch,
            **self._buckets.report(),
        }

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what gives it a meaning.

        JSON types only.
        """
        return {
            "position": step,
            "version": ORDER_VERSION,
            "tokens": self._tokens_fingerprint,
            "labels": self._labels_digest,
            "batching": digest(self._batching),
            "trial_seeds": list(self._seeds),
            "process_count": self._num_processes,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a stored state whose position means another batch here.

        Raises:
          Corrupt: A field is missing or differs; names it and both values.
        """
        order.check_state(self.state(0), state, self.num_steps)


def eval_batches(
    tokens: Tokens,
    labels: Int[np.ndarray, " rows"] | Float[np.ndarray, " rows"],
    batching: Batching,
) -> Iterator[Batch]:
    """Batches of a split for evaluation: fixed order, every row exactly once.

    Rows come bucket by bucket, in their own order; `index` says which they are. The
    last batch of a bucket is filled up with copies that weigh 0 and have index -1.

    Raises:
      BadInput: There are no rows, or not one label per row.
    """
    buckets = Buckets(tokens, labels, batching)
    size = batching.batch_size

    def batches() -> Iterator[Batch]:
        for bucket, rows in buckets.rows.items():
            for first in range(0, len(rows), size):
                last = min(first + size, len(rows))
                positions = np.full(size, first)
                positions[: last - first] = np.arange(first, last)
                yield buckets.gather(bucket, positions, np.arange(size) < last - first)

    return batches()
