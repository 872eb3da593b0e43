"""A correction as the sum of thin products that it is: its size without its matrix.

    W' - W = sum_r c_r a_r b_r      a: (max_rank, d_in)   b: (max_rank, d_out)

holds for every delta with an `amplitude`; c is zero where a component is closed. Of
such a sum all that penalties ask for follows from two Gram matrices of shape (max_rank,
max_rank) per layer: nothing of shape (d_in, d_out) is formed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from lowrank.deltas.contraction import contract


class Terms(NamedTuple):
    """The rank-one terms of one site, layers first; at least float32."""

    a: Float[Array, "layers max_rank d_in"]
    b: Float[Array, "layers max_rank d_out"]
    c: Float[Array, "layers max_rank"]
    gates: Float[Array, "layers max_rank"] | None = None

    @property
    def open(self) -> Bool[Array, "layers max_rank"]:
        """Which components there are, though they may say nothing yet."""
        return (self.c if self.gates is None else self.gates) != 0


@dataclasses.dataclass(frozen=True)
class Thin:
    """How the correction of one site is read as terms.

    Attributes:
      a, b: Names of the factors along the inputs and along the outputs, both of axes
        (*stack, max_rank, ...).
      stacks: Axes of the weight that are stacked, in the order of the factors' own.
      amplitude: (dials, factors) -> c, (*stack, max_rank).
      silent: Name of the factor that is zero where a component says nothing.
    """

    a: str
    b: str
    stacks: tuple[int, ...]
    amplitude: Callable[[Mapping[str, Array], Mapping[str, Array]], Array | None]
    silent: str

    def terms(self, factors: Mapping[str, Array], dials: Mapping[str, Array]) -> Terms:
        """The terms of all layers."""
        c = self._amplitude(dials, factors)
        dtype = jnp.promote_types(factors[self.a].dtype, jnp.float32)
        flat = lambda x, *rest: x.astype(dtype).reshape(self._layers(c), *rest)
        rank = c.shape[-1]
        return Terms(
            flat(factors[self.a], rank, -1),
            flat(factors[self.b], rank, -1),
            flat(c, rank),
            flat(dials["gate"], rank),
        )

    def shrunk(
        self,
        factors: Mapping[str, Array],
        dials: Mapping[str, Array],
        by: Float[Array, " layers"],
    ) -> dict[str, Any]:
        """Factors of a correction that is `by` times as large, layer by layer.

        All of it is taken from the factor that begins at zero. So the others, which
        start at random, keep their length, and no correction is ever driven into
        a = b = 0, where both gradients vanish. Closed components stay as they are.
        """
        c = self._amplitude(dials, factors)
        b = factors[self.silent]
        by = by.reshape(*c.shape[:-1], 1).astype(b.dtype)
        own = jnp.where(c != 0, by, 1)
        own = own.reshape(*c.shape, *[1] * (b.ndim - c.ndim))
        return {**factors, self.silent: b * own}

    def squares(self, weight: Array) -> Float[Array, " layers"]:
        """||W||_F^2 of every layer of a frozen weight, in its own units."""
        dtype = jnp.promote_types(weight.dtype, jnp.float32)
        others = [d for d in range(weight.ndim) if d not in self.stacks]
        found = jnp.sum(jnp.square(weight.astype(dtype)), others)
        order = sorted(self.stacks)
        return lax.transpose(found, [order.index(d) for d in self.stacks]).reshape(-1)

    def _amplitude(
        self, dials: Mapping[str, Array], factors: Mapping[str, Array]
    ) -> Array:
        c = self.amplitude(dials, factors)
        assert c is not None, "a Thin is made only for deltas with an amplitude"
        return c

    def _layers(self, c: Array) -> int:
        return math.prod(c.shape[:-1])


def squared_norms(terms: Terms) -> Float[Array, " layers"]:
    """||sum_r c_r a_r b_r||_F^2 = sum_rs (a_r . a_s) (c_r b_r . c_s b_s), per layer.

    The terms of the double sum may cancel, so the error is about machine precision
    times (sum_r |c_r| |a_r| |b_r|)^2, and a result near zero may come out negative.
    """
    scaled = terms.c[..., None] * terms.b
    return jnp.sum(_gram(terms.a) * _gram(scaled), (1, 2))


def departures(terms: Terms) -> Float[Array, " layers"]:
    """||A A^T - I||_F^2 + ||B B^T - I||_F^2 over the open components, per layer.

    Closed ones are taken out of the Gram matrices and of the identity: left in I, each
    would add a constant, and a pull on what must stand still.
    """
    open_ = terms.open
    rank = open_.shape[-1]
    identity = jnp.eye(rank, dtype=terms.a.dtype)[None] * open_[..., None]
    rows = lambda x: jnp.where(open_[..., None], x, 0)
    apart = lambda x: jnp.sum(jnp.square(_gram(rows(x)) - identity), (1, 2))
    return apart(terms.a) + apart(terms.b)


def total(values: Sequence[Array]) -> Float[Array, ""]:
    """The sum over all layers of all sites, which may have any number of them each."""
    return sum((jnp.sum(one) for one in values[1:]), jnp.sum(values[0]))


def _gram(x: Float[Array, "layers max_rank d"]) -> Float[Array, "layers max_rank r"]:
    return contract("lri", "lsi", "lrs", x, x, x.dtype, lax.Precision.HIGHEST)
