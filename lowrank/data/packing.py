"""Sequences in rows of one length: several in a row, told apart by segments.

A row's "label" is the next token and its "weight" says whether that counts; where a
sequence ends nothing counts. A model that reads "segments" and "positions" sees each
sequence by itself, so that packing changes no number, only the time.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from lowrank.core.errors import BadInput
from lowrank.data.talk import Spoken

Arrays = Mapping[str, Shaped[np.ndarray, "rows length"]]


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of sequences by row: first fit, longest first.

    At most 11/9 of the fewest rows there can be, and 6/9 of one.
    Source: Dosa, 2007, https://doi.org/10.1007/978-3-540-74450-4_1

    Raises:
      BadInput: A sequence is longer than a row.
    """
    if too_long := [n for n, length in enumerate(lengths) if length > size]:
        first = too_long[0]
        raise BadInput(
            f"{len(too_long)} sequences are longer than a row of {size} tokens, such "
            f"as number {first} with {lengths[first]}"
        )
    rows: list[list[int]] = []
    # Rows with room for the shortest, in order: full ones are not looked at again.
    room: dict[int, int] = {}
    shortest = min(lengths, default=0)
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        wanted = lengths[number]
        row = next((row for row, left in room.items() if left >= wanted), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        room[row] = room.get(row, size) - wanted
        if room[row] < shortest:
            del room[row]
    return rows


def packed(
    spoken: Spoken, size: int, pad: int, rows: Sequence[Sequence[int]] | None = None
) -> Arrays:
    """Sequences as arrays of rows of `size` places.

    Args:
      spoken: The sequences. The last token of each is only ever a label.
      size: Places of a row.
      pad: Fills what is left.
      rows: Which sequences share a row; None: as `bins` has it.

    Returns:
      "ids", "label", "weight", "mask", "segments", "positions", each (rows, size).
    """
    if rows is None:
        rows = bins([len(ids) - 1 for ids in spoken.ids], size)
    shape = (len(rows), size)
    found = {
        "ids": np.full(shape, pad, np.int32),
        "label": np.full(shape, pad, np.int32),
        "weight": np.zeros(shape, np.float32),
        "mask": np.zeros(shape, bool),
        "segments": np.full(shape, -1, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    for row, members in enumerate(rows):
        at = 0
        for segment, number in enumerate(members):
            ids, start = spoken.ids[number], spoken.starts[number]
            place = slice(at, at + len(ids) - 1)
            found["ids"][row, place] = ids[:-1]
            found["label"][row, place] = ids[1:]
            # The token at `start` is predicted from the place before it.
            found["weight"][row, at + start - 1 : at + len(ids) - 1] = 1.0
            found["mask"][row, place] = True
            found["segments"][row, place] = segment
            found["positions"][row, place] = np.arange(len(ids) - 1)
            at += len(ids) - 1
    return found


def one_by_one(spoken: Spoken, pad: int, size: int | None = None) -> Arrays:
    """Every sequence in a row of its own, as long as the longest unless `size` says."""
    longest = max(len(ids) - 1 for ids in spoken.ids)
    return packed(spoken, size or longest, pad, [[n] for n in range(len(spoken))])
