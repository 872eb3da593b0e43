"""QR and singular values of thin matrices, many at once, within a compiled step.

On a CPU without LAPACK: that of jaxlib 0.10 deals a batch out to the threads of XLA's
pool and waits for them on such a thread, so that a program with as many independent
decompositions as the machine has threads stands still forever. (A later jaxlib has no
such dealing.) Elsewhere, the platform's own.

Here all matrices of a batch go through the same steps: Gram-Schmidt with every column
projected twice (Giraud et al. 2005, Numer. Math. 101), and Jacobi rotations from one
side, disjoint pairs at a time (Hestenes 1958; Brent & Luk 1985), which give small
singular values all the digits that the columns have.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_EXACT = lax.Precision.HIGHEST
#: Sweeps over all pairs at most; float32 takes five to seven.
_SWEEPS = 20


class SVD(NamedTuple):
    """m = u diag(values) v, values falling; vectors of a zero value may be zero."""

    u: Float[Array, "batch n n"]
    values: Float[Array, "batch n"]
    v: Float[Array, "batch n n"]


def qr(x: Float[Array, "batch d n"]) -> tuple[Array, Array]:
    """q (batch, d, n) and upper triangular r (batch, n, n) with x = q r.

    Columns of q are orthonormal, or zero where one of x depends on those before it.
    """
    return lax.platform_dependent(x, cpu=_gram_schmidt, default=_platform_qr)


def triangle(x: Float[Array, "batch n d"]) -> Float[Array, "batch n n"]:
    """Upper triangular r with x^T = q r, of rows instead of columns."""
    return lax.platform_dependent(
        x,
        cpu=lambda x: _of_rows(x)[1],
        default=lambda x: _platform_qr(jnp.swapaxes(x, 1, 2))[1],
    )


def svd(m: Float[Array, "batch n n"]) -> SVD:
    """Singular values and vectors of square matrices."""
    return SVD(*lax.platform_dependent(m, cpu=_jacobi, default=_platform_svd))


def singular_values(m: Float[Array, "batch n n"]) -> Float[Array, "batch n"]:
    """Those of `svd`, falling, without the vectors."""
    alone = lambda m: jnp.linalg.svd(m, compute_uv=False)
    return lax.platform_dependent(m, cpu=_values, default=alone)


def together(function: Callable[[Array], Array], parts: Sequence[Array]) -> list[Array]:
    """A function of batches, once for all parts whose matrices have one shape.

    A decomposition is many small operations one after the other: over twice as many
    matrices they take hardly longer.
    """
    shapes = list(dict.fromkeys(x.shape[1:] for x in parts))
    found: dict[int, Array] = {}
    for shape in shapes:
        own = [i for i, x in enumerate(parts) if x.shape[1:] == shape]
        ends = np.cumsum([parts[i].shape[0] for i in own])[:-1]
        done = function(jnp.concatenate([parts[i] for i in own]))
        found |= zip(own, jnp.split(done, ends), strict=True)
    return [found[i] for i in range(len(parts))]


def _platform_qr(x: Array) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(x)
    missing = x.shape[-1] - q.shape[-1]
    return (
        jnp.pad(q, ((0, 0), (0, 0), (0, missing))),
        jnp.pad(r, ((0, 0), (0, missing), (0, 0))),
    )


def _platform_svd(m: Array) -> tuple[Array, Array, Array]:
    return tuple(jnp.linalg.svd(m, full_matrices=False))


def _gram_schmidt(x: Array) -> tuple[Array, Array]:
    # Rows lie in one piece: each is read, and written, at once.
    q, r = _of_rows(jnp.swapaxes(x, 1, 2))
    return jnp.swapaxes(q, 1, 2), r


def _of_rows(x: Float[Array, "batch n d"]) -> tuple[Array, Array]:
    count = x.shape[1]
    noise = 8 * jnp.finfo(x.dtype).eps

    def add(j: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        q, r = found
        own = v = lax.dynamic_index_in_dim(x, j, 1, keepdims=False)
        parts = jnp.zeros_like(r[..., 0])
        for _ in range(2):
            shares = jnp.einsum("bnd,bd->bn", q, v, precision=_EXACT)
            v = v - jnp.einsum("bnd,bn->bd", q, shares, precision=_EXACT)
            parts = parts + shares
        length = _length(v)
        # What is left of a dependent row is rounding, and no direction.
        length = jnp.where(length > noise * _length(own), length, 0)
        unit = v / jnp.where(length > 0, length, 1)[:, None]
        unit = jnp.where((length > 0)[:, None], unit, 0)
        parts = parts.at[:, j].set(length)
        into = lax.dynamic_update_index_in_dim
        return into(q, unit, j, 1), into(r, parts, j, 2)

    square = jnp.zeros((x.shape[0], count, count), x.dtype)
    return lax.fori_loop(0, count, add, (jnp.zeros_like(x), square))


def _length(x: Array) -> Array:
    """Euclidean, of the last axis, without overflow or underflow of the squares."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    safe = jnp.where(largest > 0, largest, 1)
    return largest[..., 0] * jnp.sqrt(jnp.sum(jnp.square(x / safe), axis=-1))


def _jacobi(m: Array) -> tuple[Array, Array, Array]:
    """m v^T = u diag(values)."""
    count = m.shape[-1]
    unit, scale = _scaled(m)
    # Under the columns their combination, which every turn takes along.
    eye = jnp.broadcast_to(jnp.eye(count, dtype=m.dtype), m.shape)
    tall = _turned(jnp.concatenate([unit, eye], axis=1), count)
    lengths = _length(jnp.swapaxes(tall[:, :count], 1, 2))
    order = jnp.argsort(-lengths, axis=-1, stable=True)[:, :count]
    tall = jnp.take_along_axis(tall, order[:, None], axis=-1)
    lengths = jnp.take_along_axis(lengths, order, axis=-1)
    u = tall[:, :count] / jnp.where(lengths > 0, lengths, 1)[:, None]
    return u, lengths * scale, jnp.swapaxes(tall[:, count:], 1, 2)


def _values(m: Array) -> Array:
    count = m.shape[-1]
    unit, scale = _scaled(m)
    lengths = _length(jnp.swapaxes(_turned(unit, count), 1, 2))
    return -jnp.sort(-lengths, axis=-1)[:, :count] * scale


def _scaled(m: Array) -> tuple[Array, Array]:
    """Matrices whose largest entry is 1 or 0, and what they were divided by."""
    scale = jnp.max(jnp.abs(m), axis=(-2, -1))[:, None]
    return m / jnp.where(scale > 0, scale, 1)[..., None], scale


def _turned(tall: Array, count: int) -> Array:
    """Columns turned until their first `count` entries are orthogonal.

    Columns are paired, the first half with the second; of an odd number, one more of
    zeros is the last one's partner.
    """
    batch = tall.shape[0]
    tall = jnp.pad(tall, ((0, 0), (0, 0), (0, tall.shape[-1] % 2)))
    half = tall.shape[-1] // 2
    tolerance = 4 * jnp.finfo(tall.dtype).eps

    def turn(_: Array, found: tuple[Array, Array, Array]):
        p, q, most = found
        up, uq = p[:, :count], q[:, :count]
        alpha, beta = jnp.sum(up * up, axis=1), jnp.sum(uq * uq, axis=1)
        gamma = jnp.sum(up * uq, axis=1)
        cosine = jnp.abs(gamma) / jnp.sqrt(jnp.where(gamma == 0, 1, alpha * beta))
        # Squares that underflow leave no angle to speak of.
        acts = (cosine > tolerance) & jnp.isfinite(cosine)
        zeta = (beta - alpha) / jnp.where(acts, 2 * gamma, 1)
        t = jnp.sign(zeta) / (jnp.abs(zeta) + jnp.sqrt(1 + jnp.square(zeta)))
        t = jnp.where(acts, jnp.where(zeta == 0, 1, t), 0)
        c = 1 / jnp.sqrt(1 + jnp.square(t))
        s = c * t
        p, q = (c[:, None] * p - s[:, None] * q), (s[:, None] * p + c[:, None] * q)
        # The round of a tournament: one stays, all others move on by a place.
        if half > 1:
            first, rest = p[..., :1], p[..., 1:]
            p = jnp.concatenate([first, q[..., :1], rest[..., :-1]], axis=-1)
            q = jnp.concatenate([q[..., 1:], rest[..., -1:]], axis=-1)
        most = jnp.maximum(most, jnp.max(jnp.where(acts, cosine, 0), axis=1))
        return p, q, most

    def sweep(found: tuple[Array, Array, Array, Array]):
        p, q, _, number = found
        none = jnp.zeros(batch, tall.dtype)
        p, q, most = lax.fori_loop(0, 2 * half - 1, turn, (p, q, none))
        return p, q, most, number + 1

    def goes_on(found: tuple[Array, Array, Array, Array]) -> Array:
        return jnp.any(found[2] > 0) & (found[3] < _SWEEPS)

    begun = (
        tall[..., :half],
        tall[..., half:],
        jnp.ones(batch, tall.dtype),
        jnp.int32(0),
    )
    p, q, *_ = lax.while_loop(goes_on, sweep, begun)
    return jnp.concatenate([p, q], axis=-1)
