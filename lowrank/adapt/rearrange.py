"""Rules for what only rearranges, cuts, joins or scales a weight."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lowrank.adapt import joined, views
from lowrank.adapt.joined import Joined
from lowrank.adapt.views import WeightView
from lowrank.adapt.walk import Walk


def _result(value: Any) -> list[Any] | None:
    return None if value is None else [value]


def unary(walk: Walk, eqn: Any, operands: list[Any]):
    """Casts, names, sharding constraints: the weight changes, its axes do not."""
    # Rounding W + dW to whole numbers is not rounding W.
    if len(operands) > 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    bind = lambda w: eqn.primitive.bind(w, **eqn.params)
    change = lambda part: (
        views.cast(part, bind) if isinstance(part, WeightView) else bind(part)
    )
    if isinstance(operands[0], Joined):
        if eqn.primitive.name not in ("convert_element_type", "copy", "copy_p", "name"):
            return None
        return _result(operands[0].map(change))
    return [change(operands[0])]


def place(walk: Walk, eqn: Any, operands: list[Any]):
    """Where a weight lies on a mesh with explicit axes: its factors go along."""
    (view,) = operands
    if isinstance(view, Joined):
        return None
    where = eqn.params["dst_sharding"]
    spec = [*where.spec, *[None] * (len(view.labels) - len(where.spec))]
    names = dict(zip(view.labels, spec, strict=True))
    weight = eqn.primitive.bind(view.weight, **eqn.params)

    def put(part: Any, labels: Any) -> Any:
        own = where.update(spec=PartitionSpec(*[names.get(t) for t in labels]))
        return eqn.primitive.bind(part, **{**eqn.params, "dst_sharding": own})

    parts = {
        kind: {
            name: put(part, view.part_labels(view.delta.axes[name]))
            for name, part in getattr(view, kind).items()
        }
        for kind in ("factors", "dials")
    }
    rng = None if view.rng is None else put(view.rng, view.stacks)
    return [view.replace(weight=weight, rng=rng, **parts)]


def barrier(walk: Walk, eqn: Any, operands: list[Any]):
    """A barrier holds weights and arrays back together."""
    if any(isinstance(v, Joined) for v in operands):
        return None
    arrays = [v.weight if isinstance(v, WeightView) else v for v in operands]
    return [
        v.replace(weight=array) if isinstance(v, WeightView) else array
        for v, array in zip(
            operands, eqn.primitive.bind(*arrays, **eqn.params), strict=True
        )
    ]


def _of(value: Any) -> Any:
    """The module that rearranges this kind of value."""
    return joined if isinstance(value, Joined) else views


def transpose(walk: Walk, eqn: Any, operands: list[Any]):
    """Permutes axes."""
    (value,) = operands
    return _result(_of(value).transpose(value, eqn.params["permutation"]))


def reshape(walk: Walk, eqn: Any, operands: list[Any]):
    """Splits and merges axes."""
    if len(operands) > 1:
        return None
    (value,) = operands
    # Some rules of JAX permute in the same step.
    if (first := eqn.params.get("dimensions")) is not None:
        value = _of(value).transpose(value, first)
        if value is None:
            return None
    return _result(_of(value).reshape(value, eqn.params["new_sizes"]))


def broadcast(walk: Walk, eqn: Any, operands: list[Any]):
    """Adds axes."""
    if len(operands) > 1:
        return None
    (value,) = operands
    shape = eqn.params["shape"]
    # Among them may be NumPy integers.
    kept = tuple(map(int, eqn.params["broadcast_dimensions"]))
    return _result(_of(value).expand(value, shape, kept))


def squeeze(walk: Walk, eqn: Any, operands: list[Any]):
    """Drops axes of size one."""
    (value,) = operands
    return _result(_of(value).squeeze(value, eqn.params["dimensions"]))


def cut_static(walk: Walk, eqn: Any, operands: list[Any]):
    """`slice`: with strides only along axes that are not joined."""
    (value,) = operands
    params = eqn.params
    shape = joined.shape_of(value)
    strides = params["strides"] or [1] * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strict=True)
    for d, ((start, stop), stride) in enumerate(zip(bounds, strides, strict=True)):
        if (start, stop, stride) == (0, shape[d], 1):
            continue
        if stride == 1:
            value = joined.span(value, d, start, stop)
        else:
            pick = _strided(start, stop, stride)
            value = joined.cut(value, {d: pick})
        if value is None:
            return None
    return [value]


def _strided(start: int, stop: int, stride: int):
    return lambda part, axis: lax.slice_in_dim(part, start, stop, stride, axis)


def split(walk: Walk, eqn: Any, operands: list[Any]):
    """Cuts one axis into several weights, as a fused projection is."""
    (value,) = operands
    ends = [int(sum(eqn.params["sizes"][: i + 1])) for i in range(len(eqn.outvars))]
    spans = zip([0, *ends[:-1]], ends, strict=True)
    axis = eqn.params["axis"]
    parts = [joined.span(value, axis, start, stop) for start, stop in spans]
    return None if any(part is None for part in parts) else parts


def cut_dynamic(walk: Walk, eqn: Any, operands: list[Any]):
    """`dynamic_slice`: a part whose place is data."""
    value, *starts = operands
    if joined.views_in(starts):
        return None
    shape = joined.shape_of(value)
    cuts = {
        d: _moving(starts[d], size)
        for d, size in enumerate(eqn.params["slice_sizes"])
        if size != shape[d]
    }
    return _result(joined.cut(value, cuts))


def _moving(start: Any, size: int):
    return lambda part, axis: lax.dynamic_slice_in_dim(part, start, size, axis)


def reverse(walk: Walk, eqn: Any, operands: list[Any]):
    """Turns axes round."""
    (value,) = operands
    # Not `lax.rev`: typed keys, which turn with their layers, have no such rule.
    turn = lambda part, axis: jnp.take(
        part, jnp.arange(part.shape[axis])[::-1], axis=axis, mode="clip"
    )
    return _result(joined.cut(value, dict.fromkeys(eqn.params["dimensions"], turn)))


def concatenate(walk: Walk, eqn: Any, operands: list[Any]):
    """Puts weights side by side."""
    return _result(joined.joined(operands, eqn.params["dimension"]))


def stack(walk: Walk, eqn: Any, operands: list[Any]):
    """Puts weights side by side along a new axis."""
    axis = eqn.params["axis"]
    shape = joined.shape_of(operands[0])
    kept = [d for d in range(len(shape) + 1) if d != axis]
    grown = [*shape[:axis], 1, *shape[axis:]]
    parts = [
        _of(v).expand(v, grown, kept)
        if joined.views_in([v])
        else lax.broadcast_in_dim(v, grown, kept)
        for v in operands
    ]
    return _result(joined.joined(parts, axis))


def scale(walk: Walk, eqn: Any, operands: list[Any]):
    """`neg`, and `mul` and `div` by what varies along some of a weight's axes."""
    bind = lambda *arrays: eqn.primitive.bind(*arrays, **eqn.params)
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    if eqn.primitive.name == "neg":
        return _result(_scaled(operands[0], jnp.float32(-1), lambda w, by: bind(w)))
    left, right = operands
    on_left = bool(joined.views_in([left]))
    if on_left == bool(joined.views_in([right])):
        return None
    if eqn.primitive.name == "div":
        return _result(_scaled(left, right, bind, jnp.reciprocal)) if on_left else None
    if on_left:
        return _result(_scaled(left, right, bind))
    return _result(_scaled(right, left, lambda w, by: bind(by, w)))


def _scaled(value: Any, by: Any, bind: Any, factor: Any = jnp.asarray) -> Any:
    """`bind(weight, by)` for the weight, `factor(by)` for its factors."""
    if isinstance(value, WeightView):
        return views.scale(value, factor(by), lambda w: bind(w, by))
    if not isinstance(value, Joined):
        return bind(value, by)
    pieces = [by] * len(value.parts)
    if jnp.ndim(by) and by.shape[value.axis] > 1:
        pieces = [
            lax.slice_in_dim(by, *ends, axis=value.axis) for ends in value.spans()
        ]
    parts = [
        _scaled(part, piece, bind, factor)
        for part, piece in zip(value.parts, pieces, strict=True)
    ]
    return None if any(p is None for p in parts) else joined.joined(parts, value.axis)
