"""Length buckets: rows of similar length, padded alike, so that few shapes compile."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data.tokens import Tokens

logger = logging.getLogger(__name__)

MAX_SEED = 2**31

Batch = dict[str, np.ndarray]


@spec
class Batching:
    """How rows become batches.

    Attributes:
      batch_size: Rows per batch, over all processes.
      buckets: Lengths in tokens that batches are padded to; a row goes to the
        smallest that holds it. Cut at the longest row that tokenization kept; rows
        longer than the last one lose their end.
      seed: Of the sequence of buckets.
    """

    batch_size: int = 32
    buckets: Sequence[int] = (16, 32, 64, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, not {self.batch_size}")
        sizes = list(self.buckets)
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise BadInput(f"buckets must be positive and increasing, not {sizes}")
        if not 0 <= self.seed < MAX_SEED:
            raise BadInput(f"seed must be from 0 to 2**31 - 1, not {self.seed}")


class Buckets:
    """Rows of a split, padded by bucket.

    Attributes:
      lengths: Buckets that hold rows, shortest first.
      rows: bucket -> numbers of its rows, ascending.
      num_truncated: Rows longer than the last bucket.
    """

    def __init__(
        self,
        tokens: Tokens,
        labels: Int[np.ndarray, " rows"] | Float[np.ndarray, " rows"],
        batching: Batching,
    ):
        """Sorts rows by length.

        Args:
          tokens: The rows.
          labels: Of each row its class, or the number that it is to get.
          batching: Buckets; the other fields are not used.

        Raises:
          BadInput: There are no rows, not one label each, or no room in a bucket.
        """
        if len(tokens) != len(labels):
            raise BadInput(f"{len(tokens)} tokenized rows have {len(labels)} labels")
        if len(tokens) == 0:
            raise BadInput("there are no rows to make batches of")
        self._named = "y" if np.issubdtype(labels.dtype, np.floating) else "label"
        if self._named == "label" and labels.min() < 0:
            raise BadInput(
                f"row {int(labels.argmin())} has label {labels.min()}; labels are "
                "positions in the task's classes"
            )
        below = [size for size in batching.buckets if size < tokens.max_length]
        above = [size for size in batching.buckets if size >= tokens.max_length]
        sizes = np.array(below + ([tokens.max_length] if above else []))
        lengths = tokens.lengths
        if sizes[-1] <= tokens.num_suffix and lengths.max() > sizes[-1]:
            raise BadInput(
                f"the last bucket, {sizes[-1]}, has no room for text beside "
                f"{tokens.num_suffix} closing tokens; give longer buckets"
            )
        self.num_truncated = int((lengths > sizes[-1]).sum())
        if self.num_truncated:
            logger.warning(
                "%d of %d rows are longer than the last bucket of %d tokens and lose "
                "their end",
                self.num_truncated,
                len(tokens),
                sizes[-1],
            )
        which = sizes[np.minimum(np.searchsorted(sizes, lengths), len(sizes) - 1)]
        self.rows = {int(b): np.flatnonzero(which == b) for b in np.unique(which)}
        self.lengths = tuple(self.rows)
        self._labels = np.asarray(labels, np.int32)
        if self._named == "y":
            # As a model gives them: one output per row.
            self._labels = np.asarray(labels, np.float32)[:, None]
        self._padded = {b: _pad(tokens, rows, b) for b, rows in self.rows.items()}

    def gather(
        self,
        bucket: int,
        positions: Int[np.ndarray, "*leading batch"],
        real: Bool[np.ndarray, "... batch"],
    ) -> Batch:
        """A batch of one bucket.

        Args:
          bucket: Its length.
          positions: Positions among the rows of the bucket.
          real: Which of them count; the others are copies that only fill the batch.
        """
        ids, lengths, types = self._padded[bucket]
        rows = self.rows[bucket][positions]
        steps = np.arange(bucket).reshape((1,) * positions.ndim + (bucket,))
        real = np.broadcast_to(real, positions.shape)
        told = {} if types is None else {"type_ids": types[positions]}
        return {
            **told,
            "ids": ids[positions],
            "mask": steps < lengths[positions][..., None],
            self._named: self._labels[rows],
            "weight": real.astype(np.float32),
            "index": np.where(real, rows, -1).astype(np.int32),
        }

    def report(self) -> dict[str, Any]:
        """Rows per bucket, truncated rows and the share of padding, for the record."""
        used = sum(int(lengths.sum()) for _, lengths, _ in self._padded.values())
        room = sum(bucket * len(rows) for bucket, rows in self.rows.items())
        return {
            "rows_per_bucket": {str(b): len(rows) for b, rows in self.rows.items()},
            "num_truncated": self.num_truncated,
            "padding_share": 1.0 - used / room,
        }


def _pad(
    tokens: Tokens, rows: np.ndarray, bucket: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(padded ids, lengths, types) of rows; too long ones keep their closing tokens."""
    lengths = np.minimum(tokens.lengths[rows], bucket)
    body = bucket - tokens.num_suffix

    def padded(values: np.ndarray, fill: int) -> np.ndarray:
        found = np.full((len(rows), bucket), fill, np.int32)
        for position, row in enumerate(rows.tolist()):
            content = values[tokens.offsets[row] : tokens.offsets[row + 1]]
            if len(content) > bucket:
                end = content[len(content) - tokens.num_suffix :]
                content = np.concatenate([content[:body], end])
            found[position, : len(content)] = content
        return found

    types = None if tokens.types is None else padded(tokens.types, 0)
    return padded(tokens.ids, tokens.pad_id), lengths, types
