"""A weight on its way through the program, with its factors and labelled axes.

Every axis of the weight carries a label. A factor's axes carry the labels of the
weight axes they belong to, so whatever the program does to the weight (transpose,
reshape, cast, slice a layer off) is done to the factors without looking at them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from lowrank.deltas.base import Delta


class Label(NamedTuple):
    """One axis: the axes of the stored weight it came from, and a unique name."""

    dims: tuple[int, ...]
    name: str


RANK = Label((), "rank")
Labels = tuple[Label | None, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "factors", "dials", "rng"],
    meta_fields=[
        "labels", "ins", "outs", "stacks", "path", "delta", "max_rank", "fan_in",
        "trips",
    ],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class WeightView:
    """A weight as some point of the program sees it.

    Attributes:
      weight: The array in its present layout, or its shape while previewing.
      factors: Trained arrays of the delta, laid out as `Delta.axes` says.
      dials: Untrained arrays of the delta.
      rng: Keys for dropout, one per stacked layer, or None in evaluation.
      labels: One per axis of `weight`; None marks an axis that the program added and
        along which the weight does not vary: of size one, or repeated.
      ins, outs, stacks: Labels in the order in which factors hold them.
      path: The weight's name.
      delta: The recipe, or None while sites are being discovered.
      max_rank: Components of the factors.
      fan_in: Inputs that reach one output.
      trips: How often the enclosing loops run, for counting FLOPs.
    """

    weight: Any
    factors: Mapping[str, Any]
    dials: Mapping[str, Any]
    rng: Any
    labels: Labels
    ins: tuple[Label, ...]
    outs: tuple[Label, ...]
    stacks: tuple[Label, ...]
    path: str
    delta: Delta | None
    max_rank: int = 0
    fan_in: int = 1
    trips: float = 1

    def replace(self, **changes: Any) -> "WeightView":
        return dataclasses.replace(self, **changes)

    def role(self, role: str) -> tuple[Label, ...]:
        """The labels of a role, in the order in which factors hold them."""
        named = {
            "stack": self.stacks,
            "rank": (RANK,),
            "in": self.ins,
            "out": self.outs,
        }
        return named[role]

    def part_labels(self, roles: Sequence[str]) -> tuple[Label, ...]:
        """The labels of a factor or dial whose axes have these roles."""
        return tuple(label for role in roles for label in self.role(role))

    def size(self, label: Label) -> int:
        if label == RANK:
            return self.max_rank
        return self.weight.shape[self.labels.index(label)]

    def shape(self, *roles: str) -> tuple[int, ...]:
        """Sizes of a factor with these roles, stacked layers first."""
        return tuple(self.size(label) for label in self.part_labels(("stack", *roles)))

    @property
    def repeats(self) -> bool:
        """Whether the program repeats the weight along an axis of its own."""
        sizes = zip(self.labels, self.weight.shape, strict=True)
        return any(label is None and size > 1 for label, size in sizes)

    @property
    def trained_whole(self) -> bool:
        """Whether only whole axes of the weight mean something to its delta."""
        return self.delta is not None and not self.delta.linear

    def map_parts(self, change: Callable[[Any, tuple[Label, ...]], Any]):
        """All that has axes but the weight, with `change(array, labels)` applied."""
        axes = self.delta.axes if self.delta is not None else {}
        rng = self.rng
        if rng is not None:
            rng = change(rng, self.stacks)

        def apply(parts: Mapping[str, Array]) -> dict[str, Any]:
            return {
                name: change(part, self.part_labels(axes[name]))
                for name, part in parts.items()
            }

        return {
            "factors": apply(self.factors),
            "dials": apply(self.dials),
            "rng": rng,
        }

    def outer(self, a: Array, b: Array, gate: Array) -> Array:
        """sum_r gate_r a_r b_r in the layout and dtype of `weight`."""
        named = [label for label in self.labels if label is not None]
        operands = (
            (gate, self.part_labels(("stack", "rank"))),
            (a, self.part_labels(("stack", "rank", "in"))),
            (b, self.part_labels(("stack", "rank", "out"))),
        )
        dense = einsum(named, *operands, precision=lax.Precision.HIGHEST)
        added = [d for d, label in enumerate(self.labels) if label is None]
        dense = jnp.broadcast_to(lax.expand_dims(dense, added), self.weight.shape)
        # Rounded to whole numbers, a correction of a quantised weight would be lost.
        is_real = jnp.issubdtype(self.weight.dtype, jnp.inexact)
        return dense.astype(self.weight.dtype) if is_real else dense

    def dense(self) -> Array:
        """The adapted weight, formed in full."""
        if self.delta is None:
            return self.weight
        dense: Any = self.delta.dense(self.factors, self.dials, self)
        return dense


def einsum(out: Sequence[Any], *operands: tuple[Array, Sequence[Any]], precision=None):
    """`jnp.einsum` with labels, of any kind that can be hashed, for letters."""
    letters: dict[Any, str] = {}
    names = [subscript(labels, letters) for _, labels in operands]
    spec = ",".join(names) + "->" + subscript(out, letters)
    return jnp.einsum(spec, *[array for array, _ in operands], precision=precision)


def subscript(labels: Sequence[Any], letters: dict[Any, str]) -> str:
    """One letter per label, the same letter for the same label."""
    return "".join(letters.setdefault(t, chr(97 + len(letters))) for t in labels)


def cast(view: WeightView, apply: Callable[[Array], Array]) -> WeightView:
    """A change of the weight that keeps its axes; factors keep their own dtype."""
    return view.replace(weight=apply(view.weight))


def transpose(view: WeightView, permutation: Sequence[int]) -> WeightView:
    """Permutes the weight's axes; factors follow their labels and stay as they are."""
    return view.replace(
        weight=lax.transpose(view.weight, permutation),
        labels=tuple(view.labels[d] for d in permutation),
    )


def expand(view: WeightView, shape: Sequence[int], kept: Sequence[int]):
    """Adds axes, of size one or repeated; None if one of the weight's is repeated."""
    labels: list[Label | None] = [None] * len(shape)
    for label, size, d in zip(view.labels, view.weight.shape, kept, strict=True):
        if label is not None and shape[d] != size:
            return None
        labels[d] = label
    weight = lax.broadcast_in_dim(view.weight, shape, tuple(kept))
    return view.replace(weight=weight, labels=tuple(labels))


def squeeze(view: WeightView, dimensions: Sequence[int]) -> WeightView:
    """Drops axes of size one, added or the weight's own."""
    gone = {view.labels[d] for d in dimensions} - {None}
    kept = [d for d in range(view.weight.ndim) if d not in dimensions]
    return view.replace(
        weight=lax.squeeze(view.weight, dimensions),
        labels=tuple(view.labels[d] for d in kept),
        **_without(view, gone, lambda part, axes: lax.squeeze(part, axes)),
    )


def _without(view: WeightView, gone: Any, drop: Callable[[Array, list[int]], Array]):
    """Parts and roles after the labels in `gone` have been dropped."""
    if not gone:
        return {}
    roles = {
        role: tuple(t for t in getattr(view, role) if t not in gone)
        for role in ("ins", "outs", "stacks")
    }
    parts = view.map_parts(
        lambda part, own: drop(part, [d for d, t in enumerate(own) if t in gone])
    )
    return {**roles, **parts}


def cut(view: WeightView, cuts: Mapping[int, Callable[[Array, int], Array]]):
    """Takes a part of some axes: `cuts[d](array, axis)` cuts what axis `d` is there.

    None where a delta needs the whole axis.
    """
    labels = {view.labels[d]: change for d, change in cuts.items()}
    if view.trained_whole and {*labels} & {*view.ins, *view.outs}:
        return None

    def change(part: Array, own: Sequence[Label | None]) -> Array:
        for axis, label in enumerate(own):
            if label is not None and label in labels:
                part = labels[label](part, axis)
        return part

    weight = view.weight
    for d, own in cuts.items():
        weight = own(weight, d)
    return view.replace(weight=weight, **view.map_parts(change))


def scale(view: WeightView, by: Array, apply: Callable[[Array], Array]):
    """A weight the program scales along some of its axes, factors scaled with it.

    Args:
      view: The weight.
      by: As many axes as the weight, or none; of size one where it does not vary.
      apply: What the program does to the weight.

    Returns:
      The view, or None where no single factor can take the scale.
    """
    weight = apply(view.weight)
    if weight.shape != view.weight.shape:
        return None
    labels = [t for d, t in enumerate(view.labels) if by.ndim and by.shape[d] > 1]
    if view.delta is None:
        # Which axes go together is known when a delta is there to scale; a scale
        # along all of them never is one factor's.
        every = [d for d, size in enumerate(weight.shape) if size > 1]
        mixed = len(labels) > 1 and len(labels) == len(every)
        return None if mixed else view.replace(weight=weight)
    if None in labels:
        return None
    for name in view.delta.linear.values():
        own = view.part_labels(view.delta.axes[name])
        if not {*labels} <= {*own}:
            continue
        laid = jnp.transpose(
            by.reshape([by.shape[view.labels.index(t)] for t in labels]),
            sorted(range(len(labels)), key=lambda i: own.index(labels[i])),
        ).reshape([view.size(t) if t in labels else 1 for t in own])
        factor = view.factors[name]
        factors = {**view.factors, name: factor * laid.astype(factor.dtype)}
        return view.replace(weight=weight, factors=factors)
    return None


def unstack(view: WeightView) -> tuple[Any, Callable[[Any], WeightView]] | None:
    """Splits off the leading axis of a weight, for a loop that takes slices of it.

    Returns:
      (arrays with that axis first, slice -> view of one slice), or None when a delta
      needs the whole axis.
    """
    label = view.labels[0]
    if label is None or view.delta is None:
        rest = view.labels[1:]
        return view.weight, lambda one: view.replace(weight=one, labels=rest)
    if view.trained_whole and label not in view.stacks:
        return None
    axes = view.delta.axes
    lead = lambda part, own: jnp.moveaxis(part, own.index(label), 0)
    sliced = {
        kind: {
            name: lead(part, view.part_labels(axes[name]))
            for name, part in getattr(view, kind).items()
            if label in view.part_labels(axes[name])
        }
        for kind in ("factors", "dials")
    }
    has_key = view.rng is not None and label in view.stacks
    key = lead(view.rng, view.stacks) if has_key else None
    roles = {
        role: tuple(t for t in getattr(view, role) if t != label)
        for role in ("ins", "outs", "stacks")
    }

    def rebuild(one: Any) -> WeightView:
        weight, parts, key = one
        return view.replace(
            weight=weight,
            factors={**view.factors, **parts["factors"]},
            dials={**view.dials, **parts["dials"]},
            rng=key if has_key else view.rng,
            labels=view.labels[1:],
            **roles,
        )

    return (view.weight, sliced, key), rebuild


def reshape(view: WeightView, shape: Sequence[int]) -> WeightView | None:
    """Splits and merges axes; None where axes of different roles would merge."""
    labels: list[Label | None] = []
    edits: dict[tuple[Label, ...], tuple[Label, ...]] = {}
    sizes: dict[Label, int] = {}
    for olds, news in groups(view.weight.shape, shape):
        source = [view.labels[d] for d in olds]
        named = tuple(t for t in source if t is not None)
        if not named:
            labels += [None] * len(news)
            continue
        if any(view.labels[d] is None and view.weight.shape[d] > 1 for d in olds):
            return None
        real = [d for d in news if shape[d] > 1] or list(news[:1])
        if len(named) == 1 and len(real) == 1:
            labels += [named[0] if d == real[0] else None for d in news]
            continue
        if view.delta is not None and not _same_role(view, named):
            return None
        dims = tuple(sorted({d for t in named for d in t.dims}))
        origin = "*".join(t.name for t in named)
        fresh = {d: Label(dims, f"({origin})[{shape[d]}:{d}]") for d in real}
        edits[named] = tuple(fresh.values())
        sizes |= {label: shape[d] for d, label in fresh.items()}
        labels += [fresh.get(d) for d in news]
    changed = view.map_parts(lambda part, own: _reshape_part(part, own, edits, sizes))
    kept = ("ins", "outs", "stacks")
    roles = {role: _relabel(getattr(view, role), edits) for role in kept}
    return view.replace(
        weight=view.weight.reshape(shape), labels=tuple(labels), **roles, **changed
    )


def groups(old: Sequence[int], new: Sequence[int]):
    """Minimal runs of old and new axes that hold the same number of elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(olds), j + len(news)
        size = lambda axes, of: math.prod(of[d] for d in axes)
        while size(olds, old) != size(news, new):
            if size(olds, old) < size(news, new):
                olds.append(i)
                i += 1
            else:
                news.append(j)
                j += 1
        yield olds, news


def _same_role(view: WeightView, named: tuple[Label, ...]) -> bool:
    """Whether `named` stand side by side, in order, in one of the roles."""
    for role in (view.ins, view.outs, view.stacks):
        for start in range(len(role) - len(named) + 1):
            if role[start : start + len(named)] == named:
                return True
    return False


def _relabel(own: tuple[Label, ...], edits: Mapping) -> tuple[Label, ...]:
    for olds, news in edits.items():
        if olds[0] in own:
            at = own.index(olds[0])
            own = (*own[:at], *news, *own[at + len(olds) :])
    return own


def _reshape_part(part: Array, own: tuple[Label, ...], edits: Mapping, sizes: Mapping):
    known = dict(zip(own, part.shape, strict=True))
    after = _relabel(own, edits)
    return part.reshape([sizes.get(label, known.get(label)) for label in after])
