"""Weights that a program puts side by side, kept as the parts they are.

A model may concatenate its query, key and value weights before one product. No
single pair of factors has the form of the result, but each part is still a weight
with its own: what the program does to the whole is done to the parts, and a product
with the whole is the products with the parts put side by side, or summed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from lowrank.adapt import views
from lowrank.adapt.views import WeightView


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis"]
)
@dataclasses.dataclass(frozen=True)
class Joined:
    """Views and plain arrays, concatenated along an axis.

    Attributes:
      parts: In order; at least one is a view.
      axis: Where they meet.
    """

    parts: tuple[Any, ...]
    axis: int

    @property
    def widths(self) -> list[int]:
        """Sizes of the parts along the axis."""
        return [shape_of(part)[self.axis] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(shape_of(self.parts[0]))
        shape[self.axis] = sum(self.widths)
        return tuple(shape)

    @property
    def views(self) -> list[WeightView]:
        return [part for part in self.parts if isinstance(part, WeightView)]

    def spans(self) -> list[tuple[int, int]]:
        """First and last position of each part along the axis."""
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.parts))]
        return [(end - n, end) for end, n in zip(ends, self.widths, strict=True)]

    def map(self, change: Callable[[Any], Any], axis: int | None = None):
        """Each part changed; None where one cannot be."""
        parts = tuple(change(part) for part in self.parts)
        if any(part is None for part in parts):
            return None
        return joined(parts, self.axis if axis is None else axis)


def shape_of(part: Any) -> tuple[int, ...]:
    """Shape of a view, of what is joined, or of an array."""
    return part.weight.shape if isinstance(part, WeightView) else part.shape


def views_in(operands: Sequence[Any]) -> list[WeightView]:
    """All views among operands, also inside what is joined."""
    found: list[WeightView] = []
    for value in operands:
        if isinstance(value, WeightView):
            found.append(value)
        elif isinstance(value, Joined):
            found += value.views
    return found


def joined(parts: Sequence[Any], axis: int) -> Any:
    """Parts side by side: flat, and a plain array where no view is left."""
    flat: list[Any] = []
    for part in parts:
        same = isinstance(part, Joined) and part.axis == axis
        flat += part.parts if same else [part]
    if any(isinstance(part, Joined) for part in flat):
        return None
    if not views_in(flat):
        return lax.concatenate(flat, axis) if len(flat) > 1 else flat[0]
    return flat[0] if len(flat) == 1 else Joined(tuple(flat), axis)


def transpose(value: Joined, permutation: Sequence[int]) -> Any:
    """As `views.transpose`."""
    turn = lambda part: (
        views.transpose(part, permutation)
        if isinstance(part, WeightView)
        else lax.transpose(part, permutation)
    )
    return value.map(turn, list(permutation).index(value.axis))


def squeeze(value: Joined, dimensions: Sequence[int]) -> Any:
    """As `views.squeeze`."""
    if value.axis in dimensions:
        return None
    drop = lambda part: (
        views.squeeze(part, dimensions)
        if isinstance(part, WeightView)
        else lax.squeeze(part, dimensions)
    )
    return value.map(drop, value.axis - sum(d < value.axis for d in dimensions))


def expand(value: Joined, shape: Sequence[int], kept: Sequence[int]) -> Any:
    """As `views.expand`."""
    axis = kept[value.axis]

    def grow(part: Any) -> Any:
        own = [*shape]
        own[axis] = shape_of(part)[value.axis]
        if isinstance(part, WeightView):
            return views.expand(part, own, kept)
        return lax.broadcast_in_dim(part, own, tuple(kept))

    return value.map(grow, axis) if shape[axis] == value.shape[value.axis] else None


def reshape(value: Joined, shape: Sequence[int]) -> Any:
    """Where the joined axis leads the run of axes that it is split or merged in."""
    for olds, news in views.groups(value.shape, shape):
        if value.axis not in olds:
            continue
        if value.axis != olds[0] or not news:
            return None
        rest = math.prod(shape[d] for d in news[1:])
        inner = math.prod(value.shape[d] for d in olds[1:])
        if any(width * inner % rest for width in value.widths):
            return None

        return value.map(
            functools.partial(_reshape_part, value.axis, shape, news[0], inner, rest),
            news[0],
        )
    return None


def _reshape_part(axis: int, shape: Any, lead: int, inner: int, rest: int, part: Any):
    own = [*shape]
    own[lead] = shape_of(part)[axis] * inner // rest
    return views.reshape(part, own) if views_in([part]) else part.reshape(own)


def cut(value: Any, cuts: Mapping[int, Callable[[Any, int], Any]]) -> Any:
    """As `views.cut`, for views, arrays and for axes that are not joined."""
    if isinstance(value, WeightView):
        return views.cut(value, cuts)
    if isinstance(value, Joined):
        return None if value.axis in cuts else value.map(lambda part: cut(part, cuts))
    for axis, change in cuts.items():
        value = change(value, axis)
    return value


def span(value: Any, axis: int, start: int, stop: int) -> Any:
    """Positions `start` to `stop` of an axis, joined or not."""
    if not isinstance(value, Joined) or value.axis != axis:
        whole = lambda part, d: lax.slice_in_dim(part, start, stop, axis=d)
        return cut(value, {axis: whole})
    pieces = []
    for part, (first, last) in zip(value.parts, value.spans(), strict=True):
        low, high = max(start, first), min(stop, last)
        if low < high:
            full = (low, high) == (first, last)
            shift = lambda n, first=first: n - first
            pieces.append(part if full else span(part, axis, shift(low), shift(high)))
    return None if any(p is None for p in pieces) else joined(pieces, axis)
