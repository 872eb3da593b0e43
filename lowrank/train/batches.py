"""What training asks of its data: batches as a function of position.

A batch is a mapping from names to arrays. What the model reads is called "ids" where it
is tokens, "pixels" where it is images, and "x" where it is rows of numbers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

#: Side of a patch, to count activations by where nobody knows the model.
PATCH = 16


@runtime_checkable
class Batches(Protocol):
    """What the loop asks of its data."""

    @property
    def num_steps(self) -> int: ...

    def iterate(
        self, start_step: int = 0
    ) -> Iterator[tuple[int, Mapping[str, Any]]]: ...


@runtime_checkable
class TrainBatches(Batches, Protocol):
    """What a whole training asks of its data; arrays have an axis of trials first.

    Attributes:
      steps_per_epoch: After so many steps every row was seen once.
    """

    steps_per_epoch: int

    def shapes(self) -> Sequence[tuple[int, int]]:
        """The different (rows, width) that occur; of images, (rows, side)."""
        ...

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """One batch of each shape, in their order."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """Position and "trial_seeds", and whatever gives the position a meaning."""
        ...

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a stored state whose position means another batch here."""
        ...


def shape_of(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of one trial's input, by which compiled steps are told apart."""
    return tuple(_input(batch).shape[1:])


def entries_of(batch: Mapping[str, Any], of_a_pack: bool = True) -> int:
    """How many activations a layer has for one trial's batch: tokens, or rows.

    The features of a row are one activation; the tokens of a text are one each. Of an
    image it is a patch of 16 x 16 pixels, as most models cut them.

    Args:
      batch: What the model reads.
      of_a_pack: Whether its arrays have an axis of trials first.
    """
    shape = _input(batch).shape[1 if of_a_pack else 0 :]
    if "pixels" in batch:
        *rows, height, width, _ = shape
        return math.prod(rows) * max(1, height * width // PATCH**2)
    return math.prod(shape if "ids" in batch else shape[:-1])


def _input(batch: Mapping[str, Any]) -> Any:
    return next(batch[name] for name in ("ids", "pixels", "x") if name in batch)
