"""How factors start. Every component is drawn from a key of its own.

A component's start then depends neither on `max_rank` nor on its neighbours, which
is what lets trials of different rank share a program and still start alike.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank.core.arrays import Key
from lowrank.core.keys import numbered_keys

#: Draws an array of the given shape from a key.
Initializer = Callable[[Key, tuple[int, ...]], Array]


def uniform(fan_in: int) -> Initializer:
    """Entries from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), component by component.

    This is `kaiming_uniform(a=sqrt(5))` of PyTorch and PEFT. `fan_in` is the number
    of inputs that reach one output: d_in for a product, 1 for a table lookup.
    """
    bound = 1.0 / math.sqrt(fan_in)

    def draw(key: Key, shape: tuple[int, ...]) -> Float[Array, " max_rank *d_in"]:
        one = lambda k: jax.random.uniform(k, shape[1:], minval=-bound, maxval=bound)
        return jax.vmap(one)(numbered_keys(key, shape[0]))

    return draw


def normal(stddev: float) -> Initializer:
    """Entries from N(0, stddev^2), component by component."""

    def draw(key: Key, shape: tuple[int, ...]) -> Float[Array, " max_rank *d_in"]:
        one = lambda k: stddev * jax.random.normal(k, shape[1:])
        return jax.vmap(one)(numbered_keys(key, shape[0]))

    return draw


def zeros(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """All zeros: the correction is silent at the start."""
    del key
    return jnp.zeros(shape)
