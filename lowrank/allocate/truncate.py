"""After training: the best correction of lower rank, and factors without dead ones.

For D = sum_r c_r a_r b_r of every layer, `split` gives the singular values and balanced
factors through QR and a small SVD, O((d_in + d_out) max_rank^2); nothing of shape
(d_in, d_out) is formed. By Eckart & Young (1936) the first k of them are the nearest
correction of rank k, and the squared error is the sum of the squares left out.

LoRA-Squeeze (arXiv:2602.10993) truncates so, there by a randomised SVD; here it is
exact, since the matrix is no wider than max_rank. One threshold for all layers is
PARA's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lowrank.allocate import decompose, ranking, selectors
from lowrank.allocate.signals import core
from lowrank.allocate.slots import Slots, Unit
from lowrank.core.errors import BadInput
from lowrank.deltas.contraction import contract
from lowrank.deltas.thin import Terms, Thin


class Split(NamedTuple):
    """Singular values and vectors of every layer's correction.

    Attributes:
      values: Singular values, falling, filled up with zeros to max_rank.
      a, b: Balanced factors with D = scale sum_r a_r b_r, where a a^T = b b^T =
        diag(values) / scale: the components in order, ready for a prefix of gates.
    """

    values: Float[Array, "layers max_rank"]
    a: Float[Array, "layers max_rank d_in"]
    b: Float[Array, "layers max_rank d_out"]


def split(terms: Terms, scale: Array | float = 1.0) -> Split:
    """Rewrites every layer's correction by its singular value decomposition.

    Args:
      terms: Of one site, from `Thin.terms`; c holds gates and scale.
      scale: What the delta multiplies its factors by, positive; one number, or one per
        component.
    """
    q_a, q_b, middle = core(terms)
    u, values, v = decompose.svd(middle)
    root = jnp.sqrt(values / scale)
    exact = lax.Precision.HIGHEST
    a = contract("lis", "lsr", "lri", q_a, u * root[:, None, :], q_a.dtype, exact)
    b = contract("lis", "lrs", "lri", q_b, v * root[..., None], q_b.dtype, exact)
    return Split(values, a, b)


def written(
    factors: Mapping[str, Array], dials: Mapping[str, Array], thin: Thin
) -> dict[str, Array]:
    """The factors of a site with its corrections written by `split`.

    Args:
      factors: Two thin ones, beside which the delta has no other.
      dials: With the gates of the moment; all that they shut is zero in what comes out.
      thin: How they are read.
    """
    opened = {**dials, "gate": jnp.ones_like(dials["gate"])}
    scale = thin.terms(factors, opened).c
    found = split(thin.terms(factors, dials), scale)
    alike = lambda x, old: x.reshape(old.shape).astype(old.dtype)
    return {
        **factors,
        thin.a: alike(found.a, factors[thin.a]),
        thin.b: alike(found.b, factors[thin.b]),
    }


def keeping_energy(
    values: Float[Array, "*layers max_rank"], energy: Array | float
) -> Int[Array, "*layers"]:
    """The smallest k with sum of the first k values^2 >= energy times that of all."""
    squares = jnp.square(values / _largest(values))
    whole = jnp.sum(squares, axis=-1, keepdims=True)
    before = jnp.cumsum(squares, axis=-1) - squares
    # Sums in float32 fall short of the whole by their rounding.
    wanted = (before < energy * whole * (1 - 1e-6)) & (values > 0)
    return jnp.sum(wanted, axis=-1).astype(jnp.int32)


def _largest(values: Array) -> Array:
    largest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(largest > 0, largest, 1)


def keeping_largest(
    slots: Slots, values: Float[Array, " components"], budget: Array | int, unit: Unit
) -> Int[Array, " layers"]:
    """Ranks such that the largest singular values of all layers stay.

    Args:
      slots: The layout; its bounds are kept.
      values: Singular values of all layers as the flat vector.
      budget: Not exceeded; exact where a component of each group counts one.
      unit: What it counts.
    """
    least, most = slots.group_bounds(slots.least, slots.most)
    contest = selectors.Contest(
        slots=slots,
        unit=unit,
        seats=ranking.seats(slots, values, jnp.ones_like(values)),
        budget=jnp.asarray(budget, jnp.int32),
        least=jnp.asarray(least),
        most=jnp.asarray(most),
    )
    return selectors.top(contest)[slots.group]


def error(
    values: Float[Array, "*layers max_rank"], ranks: Int[Array, "*layers"]
) -> Float[Array, "*layers"]:
    """||D - D_k||_F of the truncation to `ranks`: the root of what is left out."""
    places = jnp.arange(values.shape[-1]).reshape([1] * (values.ndim - 1) + [-1])
    dropped = jnp.where(places < ranks[..., None], 0, values)
    return jnp.sqrt(jnp.sum(jnp.square(dropped), axis=-1))


def compact(
    parts: Mapping[str, Any], gate: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Factors with the open components alone, in their order: the same function.

    The layers of a stack share a shape: each holds as many as the one with the most,
    the rest shut and zero. A site without an open component comes out with none.

    Args:
      parts: Arrays (*stack, max_rank, ...): factors, moments, ages.
      gate: (*stack, max_rank).

    Returns:
      The parts and the gate, on the host, since their shape depends on the gate.
    """
    gate = np.asarray(gate)
    is_open = gate != 0
    width = int(is_open.sum(axis=-1).max(initial=0))
    order = np.argsort(~is_open, axis=-1, kind="stable")[..., :width]

    def gather(name: str, x: np.ndarray) -> np.ndarray:
        if x.shape[: gate.ndim] != gate.shape:
            raise BadInput(
                f"{name!r} has shape {x.shape}, which does not begin with the shape "
                f"{gate.shape} of the gates, so it cannot be made compact with them"
            )
        extra = (1,) * (x.ndim - gate.ndim)
        index = order.reshape(*order.shape, *extra)
        found = np.take_along_axis(x, index, axis=gate.ndim - 1)
        kept = np.take_along_axis(is_open, order, axis=-1).reshape(index.shape)
        return np.where(kept, found, np.zeros((), x.dtype))

    found = {name: gather(name, np.asarray(x)) for name, x in parts.items()}
    return found, gather("gate", gate)
