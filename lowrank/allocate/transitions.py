"""What happens to a component when it is born, dies, or returns: one site's arrays.

    born   shut before, open now      b is zero, a is kept, age 0
    died   open before, shut now      nothing: it is silent, and stands still
    open   open now                   trains; its age counts its updates

A component is born with a zero factor, so a birth changes no output, whatever the
other factor is. One that returns is born like any other: what it was does not count.
A dead component is not erased, so pruning can be looked back on, and what a checkpoint
holds does not depend on when it died.

Ages and the optimizer's moments are training's: `train.aging.reborn` makes those of
what is born zero.

Factors are arrays (*stack, max_rank, ...), gates (*stack, max_rank).
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lowrank.core.arrays import Key
from lowrank.core.errors import BadInput
from lowrank.core.keys import numbered_keys

Factors = Mapping[str, Array]


def births(
    old: Float[Array, "*stack max_rank"], new: Float[Array, "*stack max_rank"]
) -> Bool[Array, "*stack max_rank"]:
    """Which components an event opened, from the gates before and after it."""
    return (new != 0) & (old == 0)


def over(mask: Bool[Array, "*stack max_rank"], x: Array) -> Array:
    """A mask of components with further axes, so that it broadcasts to a factor.

    Raises:
      BadInput: The factor's axes do not begin with those of the mask.
    """
    if x.shape[: mask.ndim] != mask.shape:
        raise BadInput(
            f"a factor of shape {x.shape} does not begin with the axes (stack, "
            f"max_rank) = {mask.shape} of its gates, so it has no components to change"
        )
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def reborn(
    factors: Factors,
    born: Bool[Array, "*stack max_rank"],
    zeroed: str,
) -> dict[str, Array]:
    """Factors in which components that are born say nothing yet.

    Args:
      factors: Of one site.
      born: Which components.
      zeroed: The factor that becomes zero: what makes the birth silent. The others keep
        what they hold: the first draw, or what training left there.
    """
    if zeroed not in factors:
        raise BadInput(
            f"a birth is to change the factor {zeroed!r}, and the site has "
            f"{', '.join(sorted(factors))}"
        )
    x = factors[zeroed]
    return {**factors, zeroed: jnp.where(over(born, x), 0, x).astype(x.dtype)}


def draw(
    key: Key,
    factor: Array,
    stack: tuple[int, ...],
    init: Callable[[Key, tuple[int, ...]], Array],
) -> Array:
    """Values for all components, each from a key of its own.

    So what a component gets does not depend on `max_rank` or on its neighbors.

    Args:
      key: Of the event and the site.
      factor: Gives the shape, (*stack, max_rank, ...).
      stack: Shape of the stack.
      init: (key, shape) -> values of one component.
    """
    rank, shape = factor.shape[len(stack)], factor.shape[len(stack) + 1 :]
    one = lambda k: init(k, shape)
    layer = lambda k: jax.vmap(one)(numbered_keys(k, rank))
    if not stack:
        return layer(key)
    count = math.prod(stack)
    return jax.vmap(layer)(numbered_keys(key, count)).reshape(factor.shape)


def revivable(
    factors: Factors, kept: Float[Array, "*stack max_rank"], zeroed: str
) -> dict[str, Array]:
    """Factors whose `zeroed` one is zero wherever a component was not kept.

    AdaLoRA's masking as in its code: the value is set to zero and the gate stays open,
    so the component gets gradients, and is back at once until the next event. Between
    events the model then has all components, whatever the budget says.
    """
    x = factors[zeroed]
    return {**factors, zeroed: jnp.where(over(kept != 0, x), x, 0).astype(x.dtype)}
