"""Rules for what consumes a weight: products, lookups, convolutions.

Each builds the call that a delta answers (`lowrank.adapt.call`) and records the use.
"""

import math
from typing import Any

from jax import lax

from lowrank.adapt.call import ConvCall, DotCall, GatherCall, RaggedCall
from lowrank.adapt.joined import Joined, views_in
from lowrank.adapt.views import WeightView
from lowrank.adapt.walk import Walk

_INSIDE = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def dot(walk: Walk, eqn: Any, operands: list[Any]):
    """A matrix product with a weight on one side."""
    left, right = operands
    on_right = bool(views_in([right]))
    if on_right == bool(views_in([left])):
        return None
    value, x = (right, left) if on_right else (left, right)
    y = _Dot(walk, eqn, on_right).over(value, x)
    return None if y is None else [y]


class _Dot:
    """One `dot_general` equation with a weight on one side."""

    def __init__(self, walk: Walk, eqn: Any, on_right: bool):
        self.walk = walk
        self.params = eqn.params
        self.bind = lambda x, w: eqn.primitive.bind(
            *((x, w) if on_right else (w, x)), **eqn.params
        )
        self.aval = eqn.outvars[0].aval
        self.on_right = on_right
        contracted, batch = eqn.params["dimension_numbers"]
        self.w_con, self.x_con = contracted[on_right], contracted[not on_right]
        self.w_batch, self.x_batch = batch[on_right], batch[not on_right]

    def over(self, value: Any, x: Any) -> Any:
        """The product, part by part where the weight is joined."""
        if isinstance(value, Joined):
            return self.over_parts(value, x)
        if isinstance(value, WeightView):
            return self.over_view(value, x)
        return self.bind(x, value)

    def over_parts(self, value: Joined, x: Any) -> Any:
        """A joined axis that is summed: a sum of products. Else they stand in a row."""
        w_axes, x_axes = (*self.w_con, *self.w_batch), (*self.x_con, *self.x_batch)
        axis = dict(zip(w_axes, x_axes, strict=True)).get(value.axis)
        given = [x] * len(value.parts)
        if axis is not None:
            given = [lax.slice_in_dim(x, *ends, axis=axis) for ends in value.spans()]
        pieces = [self.over(p, own) for p, own in zip(value.parts, given, strict=True)]
        if any(piece is None for piece in pieces):
            return None
        if value.axis in self.w_con:
            return sum(pieces[1:], pieces[0])
        _, y_labels = self.labels(range(len(value.shape)), x.ndim)
        return lax.concatenate(pieces, y_labels.index(value.axis))

    def labels(self, w_labels: Any, x_ndim: int) -> tuple[list[Any], list[Any]]:
        """Labels of input and output for those of the weight."""
        x_labels: list[Any] = [("x", d) for d in range(x_ndim)]
        for d, k in zip(
            (*self.x_con, *self.x_batch), (*self.w_con, *self.w_batch), strict=True
        ):
            x_labels[d] = w_labels[k]
        free = lambda ts, *bound: [
            t for d, t in enumerate(ts) if all(d not in own for own in bound)
        ]
        x_free = free(x_labels, self.x_con, self.x_batch)
        w_free = free(w_labels, self.w_con, self.w_batch)
        rest = [*x_free, *w_free] if self.on_right else [*w_free, *x_free]
        return x_labels, [*(w_labels[k] for k in self.w_batch), *rest]

    def over_view(self, view: WeightView, x: Any) -> Any:
        w_labels = [
            t if t is not None else ("added", d) for d, t in enumerate(view.labels)
        ]
        x_labels, y_labels = self.labels(w_labels, x.ndim)
        contracted = [view.labels[k] for k in self.w_con if view.labels[k] is not None]
        if view.delta is not None:
            roles = [{*view.role(side)} & {*contracted} for side in ("in", "out")]
            if bool(roles[0]) == bool(roles[1]):
                return None
        sizes = dict(zip(w_labels, view.weight.shape, strict=True))
        sizes |= dict(zip(x_labels, x.shape, strict=True))
        shape = tuple(sizes[t] for t in y_labels)
        out = self.aval.update(shape=shape) if shape != self.aval.shape else self.aval
        weight = view.weight
        call = DotCall(
            view, x, x_labels, y_labels, contracted, out, self.params["precision"],
            lambda x: self.bind(x, weight), self.walk.ordinal(view.path),
        )  # fmt: skip
        flops = 2 * (x.size + math.prod(shape))
        return self.walk.meet(call, "dot_general", "dot", flops)


def gather(walk: Walk, eqn: Any, operands: list[Any]):
    """A lookup of whole rows along one axis of a table."""
    view, index = operands
    params = eqn.params
    if not isinstance(view, WeightView) or view.repeats:
        return None
    axis = _table_axis(view.weight.shape, params)
    table = None if axis is None else view.labels[axis]
    if axis is None or table is None or table in view.stacks:
        return None
    numbers = params["dimension_numbers"]
    out = eqn.outvars[0].aval
    y_labels: list[Any] = [("x", d) for d in range(len(out.shape))]
    rest = [
        ("added", d) if label is None or d == axis else label
        for d, label in enumerate(view.labels)
        if d not in numbers.collapsed_slice_dims
    ]
    for d, label in zip(numbers.offset_dims, rest, strict=True):
        y_labels[d] = label
    rows = [t for t in y_labels if isinstance(t, tuple) and t[0] == "x"]
    column = numbers.start_index_map.index(axis)

    def pick(factor: Any) -> Any:
        own = lax.slice_in_dim(index, column, column + 1, axis=index.ndim - 1)
        return lax.gather(
            factor,
            own,
            lax.GatherDimensionNumbers((index.ndim - 1,), (0,), (0,)),
            (1, factor.shape[1]),
            mode=params["mode"],
            fill_value=params["fill_value"],
        )

    weight = view.weight
    product = lambda x: eqn.primitive.bind(weight, index, **params)
    call = GatherCall(
        view, None, [*rows, table], y_labels, [table], out, None, product,
        walk.ordinal(view.path), pick=pick,
    )  # fmt: skip
    return [walk.meet(call, "gather", "gather", 2 * out.size)]


def _table_axis(shape: tuple[int, ...], params: Any) -> int | None:
    """The axis along which a gather picks, where it takes everything along the others.

    A mapped `w[i]` has an index for every axis. Where all of an axis is taken, an
    index that is kept within bounds can only be zero.
    """
    numbers = params["dimension_numbers"]
    if numbers.operand_batching_dims:
        return None
    mapped, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    sizes = params["slice_sizes"]
    axes = collapsed or [d for d, n in enumerate(sizes) if n != shape[d]]
    if len(axes) != 1 or axes[0] not in mapped or sizes[axes[0]] != 1:
        return None
    whole = all(n == shape[d] for d, n in enumerate(sizes) if d != axes[0])
    kept_inside = params["mode"] in _INSIDE or len(mapped) == 1
    return axes[0] if whole and kept_inside else None


def conv(walk: Walk, eqn: Any, operands: list[Any]):
    """A convolution with the weight as its kernel, of any rank, stride and grouping."""
    x, view = operands
    params = eqn.params
    if not isinstance(view, WeightView) or views_in([x]):
        return None
    if params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    channel = numbers.rhs_spec[0]
    produced = view.labels[channel]
    contracted = [t for d, t in enumerate(view.labels) if d != channel and t]
    if produced is None or view.repeats:
        return None
    if view.delta is not None and (
        view.outs != (produced,) or {*contracted} - {*view.ins} or view.stacks
    ):
        return None
    out = eqn.outvars[0].aval
    y_labels: list[Any] = [("x", d) for d in range(len(out.shape))]
    y_labels[numbers.out_spec[1]] = produced
    call = ConvCall(
        view, x, [("x", d) for d in range(x.ndim)], y_labels, contracted, out,
        params["precision"], lambda x: eqn.primitive.bind(x, view.weight, **params),
        walk.ordinal(view.path), params=params,
    )  # fmt: skip
    size, groups = view.weight.size, params["feature_group_count"]
    channels = out.shape[numbers.out_spec[1]]
    per_place = size // view.weight.shape[channel] * groups + channels
    flops = 2 * (out.size // channels) * per_place
    return [walk.meet(call, "conv_general_dilated", "conv", flops)]


def ragged_dot(walk: Walk, eqn: Any, operands: list[Any]):
    """Rows sorted by expert times the experts' weights."""
    x, view, sizes, *offset = operands
    params = eqn.params
    numbers = params["ragged_dot_dimension_numbers"]
    plain = numbers.dot_dimension_numbers
    (x_con, w_con), batch = plain
    if not isinstance(view, WeightView) or views_in([x, sizes]) or offset:
        return None
    is_plain = (
        view.weight.ndim == 3 and x.ndim == 2 and tuple(map(len, batch)) == (0, 0)
        and tuple(numbers.lhs_ragged_dimensions) == (0,) and tuple(x_con) == (1,)
        and tuple(numbers.rhs_group_dimensions) == (0,) and len(w_con) == 1
    )  # fmt: skip
    if not is_plain or None in view.labels:
        return None
    group, *pair = view.labels
    contracted = view.labels[w_con[0]]
    (produced,) = [t for t in pair if t != contracted]
    one_each = (view.ins, view.outs) in (
        ((contracted,), (produced,)),
        ((produced,), (contracted,)),
    )
    if view.delta is not None and not (view.stacks == (group,) and one_each):
        return None
    out = eqn.outvars[0].aval
    call = RaggedCall(
        view, x, [("x", 0), contracted], [("x", 0), produced], [contracted], out,
        params["precision"],
        lambda x: eqn.primitive.bind(x, view.weight, sizes, **params),
        walk.ordinal(view.path), sizes=sizes,
    )  # fmt: skip
    flops = 2 * (x.size + out.size)
    return [walk.meet(call, "ragged_dot_general", "ragged", flops)]
