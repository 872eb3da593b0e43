"""The best correction of lower rank, by singular values.

For D = sum_r c_r a_r b_r of every layer, `split` gives the singular values and balanced
factors through QR and a small SVD, O((d_in + d_out) max_rank^2); nothing of shape
(d_in, d_out) is formed. By Eckart & Young (1936) the first k of them are the nearest
correction of rank k, and the squared error is the sum of the squares left out.

LoRA-Squeeze (arXiv:2602.10993) truncates so, there by a randomised SVD; here it is
exact, since the matrix is no wider than max_rank. One threshold for all layers is
PARA's.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowrank.allocate import decompose
from lowrank.allocate.signals import core
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
