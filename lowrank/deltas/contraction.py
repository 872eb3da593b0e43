"""One contraction of two arrays by subscripts, bound directly as `dot_general`.

What `jnp.einsum` does for two operands, without its path search and string work: an
adapted model has three contractions at every site, and tracing it must stay cheap.
On a mesh with explicit axes the result is told its sharding, which JAX asks for
where a sharded axis is contracted.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


class _Plan(NamedTuple):
    """How one contraction is bound; computed once per triple of subscripts."""

    summed: tuple[tuple[int, ...], tuple[int, ...]]
    swapped: bool
    numbers: tuple[Any, Any]
    order: str
    permutation: tuple[int, ...] | None


def contract(
    left: str,
    right: str,
    out: str,
    a: Array,
    b: Array,
    dtype: Any,
    precision: Any,
    like: Array | None = None,
) -> Array:
    """Sums products of `a` and `b` over every letter that `out` lacks.

    Args:
      left, right, out: One letter per axis, none twice; those of `out` are among the
        others.
      a, b: The operands.
      dtype: Of the result, and of the accumulation where it is wider.
      precision: As of `lax.dot_general`.
      like: An array with the axes of `out`, sharded as the result must be.
    """
    plan = _plan(left, right, out)
    a = jnp.sum(a, plan.summed[0]) if plan.summed[0] else a
    b = jnp.sum(b, plan.summed[1]) if plan.summed[1] else b
    if plan.swapped:
        a, b = b, a
        left, right = right, left
    kwargs = {}
    if has_explicit_axes():
        kept = {**axes_of(right, b), **axes_of(left, a)}
        kept = kept if like is None else axes_of(out, like)
        kwargs = {"out_sharding": sharding(plan.order, kept)}
    y = lax.dot_general(
        a, b, plan.numbers, precision=precision, preferred_element_type=dtype, **kwargs
    )
    return y if plan.permutation is None else lax.transpose(y, plan.permutation)


@functools.lru_cache(maxsize=4096)
def _plan(left: str, right: str, out: str) -> _Plan:
    alone = lambda own, other: tuple(
        d for d, t in enumerate(own) if t not in other and t not in out
    )
    summed = alone(left, right), alone(right, left)
    left = "".join(t for d, t in enumerate(left) if d not in summed[0])
    right = "".join(t for d, t in enumerate(right) if d not in summed[1])
    batch = [t for t in left if t in right and t in out]
    # A batch axis stands in the order of the result, which saves a transpose there.
    batch.sort(key=out.index)
    over = [t for t in left if t in right and t not in out]
    free = lambda own: [t for t in own if t not in batch and t not in over]
    swapped = [*batch, *free(left), *free(right)] != list(out)
    if swapped and [*batch, *free(right), *free(left)] != list(out):
        swapped = False
    if swapped:
        left, right = right, left
    numbers = (
        (tuple(map(left.index, over)), tuple(map(right.index, over))),
        (tuple(map(left.index, batch)), tuple(map(right.index, batch))),
    )
    order = "".join([*batch, *free(left), *free(right)])
    permutation = None if order == out else tuple(map(order.index, out))
    return _Plan(summed, swapped, numbers, order, permutation)


def has_explicit_axes() -> bool:
    """Whether the mesh of this trace makes shardings part of types."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def axes_of(letters: str, array: Array) -> Mapping[str, Any]:
    """Mesh axes along each letter, where the type of `array` tells them."""
    spec = [*jax.typeof(array).sharding.spec]
    spec += [None] * (len(letters) - len(spec))
    return {t: axes for t, axes in zip(letters, spec, strict=True) if axes is not None}


def sharding(letters: str, axes: Mapping[str, Any]) -> NamedSharding:
    """Each letter along its mesh axes; one mesh axis serves the first that asks."""
    taken: set[Any] = set()
    spec = []
    for letter in letters:
        wanted = axes.get(letter)
        names = wanted if isinstance(wanted, tuple) else (wanted,)
        free = wanted is not None and not taken & {*names}
        taken |= {*names} if free else set()
        spec.append(wanted if free else None)
    mesh = jax.sharding.get_abstract_mesh()
    return NamedSharding(mesh, PartitionSpec(*spec))  # pyright: ignore
