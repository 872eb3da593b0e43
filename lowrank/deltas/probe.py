"""A delta that changes nothing, and whose derivative tells of a weight's inputs."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from lowrank.core.errors import BadInput
from lowrank.deltas import inits
from lowrank.deltas.base import Call, Delta, Site, View


class Probe(Delta):
    """y = x W. What is called the derivative of anything by `a` is a sum of inputs:

        d/da := sum_t m_t u_t^T x_t = a (sum_t m_t x_t^T x_t)        u_t = x_t a^T

    over all rows x_t that meet the weight. m_t is one where that anything depends on
    the row's output, and zero elsewhere, as where a text is filled up. So the second
    moments of the inputs of every weight of a model, stacked, scanned or rematerialized
    as it may be, are one call of `jax.grad`: their rows r of the identity at a time,
    with a = I_r. Not for training, and no entry of the catalogue.

    b has orthonormal rows, which `eye` makes: what a use of the weight gives back is
    u b, and u is to be had from it. Needs max_rank <= d_out.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a": ("stack", "rank", "in"),
        "b": ("stack", "rank", "out"),
        "gate": ("stack", "rank"),
    }
    linear: ClassVar[Mapping[str, str]] = {"in": "a", "out": "b"}

    @nn.compact
    def factors(self, site: Site) -> Mapping[str, Array]:
        a = self.factor("a", inits.zeros, site.shape("rank", "in"))
        b = self.factor("b", inits.zeros, site.shape("rank", "out"))
        return {"a": a, "b": b}

    def __call__(self, call: Call) -> Array:
        if call.x is None or call.transposed:
            raise BadInput(
                "directions of inputs are for matrix products, and a weight that is "
                "corrected is a table of rows, or used both ways: leave it out "
                "(delta.targets), or set another ranks.importance"
            )
        f = self.factors(call)
        b = lax.stop_gradient(f["b"])
        # What goes back to the input is the model's own derivative alone.
        x = lax.stop_gradient(call.x)
        y = call.lowrank(f["a"], b, self.dial("gate"), x=x)
        out = call.onto_y(jnp.ones(call.shape("out"))).shape
        along = tuple(d for d, size in enumerate(out) if size > 1)
        return jnp.add(call.product(), _counted(y, along))

    def weight(self, view: View) -> Array:
        return view.weight

    def dial_values(
        self, stack: tuple[int, ...], max_rank: int, rank: int, ref_rank: int
    ) -> dict[str, Array]:
        del rank, ref_rank
        return {"gate": jnp.ones((*stack, max_rank))}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _counted(y: Array, along: tuple[int, ...]) -> Array:
    """Zero; its derivative is `y`, in those rows whose cotangent is not all zero."""
    del along
    return jnp.zeros_like(y)


def _forward(y: Array, along: tuple[int, ...]) -> tuple[Array, Array]:
    return _counted(y, along), y


def _backward(along: tuple[int, ...], y: Array, cotangent: Any) -> tuple[Array]:
    counts = jnp.any(cotangent != 0, axis=along, keepdims=True)
    return (jnp.where(counts, y, 0),)


_counted.defvjp(_forward, _backward)
