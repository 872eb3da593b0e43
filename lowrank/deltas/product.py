"""The low-rank product: one contraction down to the rank, a gate, one back up.

    y = ((x lo^T) * gate) hi

with ``lo: (rank, *in)`` and ``hi: (rank, *out)``, both rank-major. Its derivative is
written by hand. Autodiff would form the gradient of a factor as (big operand)^T
(small operand), and XLA:CPU then makes a physical transpose of the big one at every
site: half of a training step. Here the small operand is the transposed one,

    d_lo = (d_u)^T x        d_hi = v^T d_y        u = x lo^T,  v = u * gate,

and `x`, `u` are the only activations kept for the backward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowrank.deltas.contraction import contract


class Subscripts(NamedTuple):
    """Einsum subscripts of the operands; `u` is the activation in rank space.

    `gram` is what its second moments keep, then the rank's letter and one more.
    """

    x: str
    lo: str
    u: str
    hi: str
    y: str
    gram: str = ""


class Numerics(NamedTuple):
    """Dtype of the output and precision of every contraction, as in the base's own."""

    dtype: str
    precision: lax.PrecisionLike = None


def lowrank(
    x: Float[Array, "*rows_and_in"],
    lo: Float[Array, "*lo"],
    hi: Float[Array, "*hi"],
    gate: Float[Array, "*u_or_1"],
    subscripts: Subscripts,
    numerics: Numerics,
    gram: Float[Array, "*gram"] | None = None,
) -> Float[Array, "*rows_and_out"]:
    """Contracts `x` with `lo`, scales by `gate`, contracts with `hi`.

    Args:
      x: Input of the site.
      lo: Factor that goes down to the rank; cast to the dtype of `x` inside.
      hi: Factor that comes back up.
      gate: Gate times scale, with as many axes as `u`; axes of size one broadcast,
        so it may differ per component, per layer or per example. Differentiable.
      subscripts: How the axes of the operands correspond.
      numerics: Output dtype and matmul precision.
      gram: If it is there, what is called the derivative of anything by it is the sum
        of u_t^T u_t over the rows t whose output that anything depends on; its values
        are not looked at. Padding, which nothing depends on, is not in it.

    Returns:
      The correction, in `numerics.dtype`. Gradients of the factors are accumulated
      in the factors' own dtype.
    """
    if gram is not None:
        return _watched(subscripts, numerics, x, lo, hi, gate, gram)
    return _lowrank(subscripts, numerics, x, lo, hi, gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lowrank(s: Subscripts, n: Numerics, x, lo, hi, gate):
    return _forward(s, n, x, lo, hi, gate)[0]


def _forward(s: Subscripts, n: Numerics, x, lo, hi, gate):
    u = contract(s.x, s.lo, s.u, x, lo.astype(x.dtype), x.dtype, n.precision)
    v = u * gate.astype(x.dtype)
    y = contract(s.u, s.hi, s.y, v, hi.astype(x.dtype), n.dtype, n.precision)
    return y, (x, u, lo, hi, gate)


def _backward(s: Subscripts, n: Numerics, residuals, dy):
    x, u, lo, hi, gate = residuals
    dy = dy.astype(x.dtype)
    scale = gate.astype(x.dtype)
    dv = contract(s.y, s.hi, s.u, dy, hi.astype(x.dtype), x.dtype, n.precision, u)
    du = dv * scale
    dx = contract(s.u, s.lo, s.x, du, lo.astype(x.dtype), x.dtype, n.precision, x)
    dlo = contract(s.u, s.x, s.lo, du, x, lo.dtype, n.precision, lo)
    dhi = contract(s.u, s.y, s.hi, u * scale, dy, hi.dtype, n.precision, hi)
    shared = tuple(d for d, size in enumerate(gate.shape) if size == 1)
    dgate = jnp.sum((dv * u).astype(gate.dtype), axis=shared, keepdims=True)
    return dx, dlo, dhi, dgate


_lowrank.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _watched(s: Subscripts, n: Numerics, x, lo, hi, gate, gram):
    del gram
    return _forward(s, n, x, lo, hi, gate)[0]


def _forward_watched(s: Subscripts, n: Numerics, x, lo, hi, gate, gram):
    y, residuals = _forward(s, n, x, lo, hi, gate)
    return y, (residuals, gram)


def _backward_watched(s: Subscripts, n: Numerics, residuals, dy):
    given, gram = residuals
    return *_backward(s, n, given, dy), _moments(s, n, given[1], dy, gram)


def _moments(s: Subscripts, n: Numerics, u, dy, gram):
    """u^T u over the rows of `u` whose output has a derivative that is not zero."""
    across = tuple(d for d, letter in enumerate(s.y) if letter not in s.u)
    counts = jnp.any(dy != 0, axis=across)
    rows = [letter for letter in s.y if letter in s.u]
    order = [rows.index(letter) for letter in s.u if letter in rows]
    shape = [u.shape[d] if letter in rows else 1 for d, letter in enumerate(s.u)]
    counts = jnp.transpose(counts, order).reshape(shape)
    own = jnp.where(counts, u, 0)
    again = s.u.replace(s.gram[-2], s.gram[-1])
    return contract(s.u, again, s.gram, own, own, gram.dtype, n.precision, gram)


_watched.defvjp(_forward_watched, _backward_watched)
