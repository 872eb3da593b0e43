"""What importance is divided by before components of different layers are compared.

A normaliser is a function (slots, values, gates) -> values.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank.allocate.slots import Slots

Flat = Float[Array, " components"]


def none(slots: Slots, values: Flat, gates: Flat) -> Flat:
    """v_j: components are compared as they are."""
    del slots, gates
    return values


def by_cost(slots: Slots, values: Flat, gates: Flat) -> Flat:
    """v_j / c_j, c the parameters of a component: gain per parameter.

    Among separable gains, taking the best ratios first is optimal up to the component
    that no longer fits (Dantzig 1957, Operations Research 5(2)). Tied layers are bought
    together, so c is their mean: the mean of v_j / c is then what the seat gains over
    what it costs, where the mean of v_j / c_j would overrate it for a cheap member.
    Costs are divided by the smallest one, which changes no order.
    """
    del gates
    cost = slots.each("parameters")
    cost = cost / cost.min(initial=np.inf)
    return values / cost.astype(np.float32)[slots.group][slots.layer]


def by_layer(slots: Slots, values: Flat, gates: Flat) -> Flat:
    """v_j / sum of v over the open components of the layer: its share there.

    In the manner of Mao et al. 2024 (arXiv:2405.17357), who divide the norm of a
    component by that of its layer's correction. Shares sum to one in every layer, so a
    layer that matters a thousand times as much gets no more: kept so that this can be
    seen.
    """
    total = slots.per_layer(jnp.where(gates != 0, values, 0))
    safe = jnp.where(total > 0, total, 1)
    return values / safe[slots.layer]


NORMALISERS: Mapping[str, Callable[[Slots, Flat, Flat], Flat]] = {
    "none": none,
    "cost": by_cost,
    "layer": by_layer,
}
