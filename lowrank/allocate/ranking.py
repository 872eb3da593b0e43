"""Order among components, and winners under a budget: exact for ties and constants.

What competes is the seat: the p-th best component of a layer, or of every layer of a
tied group. Winning seats of a group are its first ones, so they are a rank, and `fill`
turns ranks back into gates. All shapes are static and budgets may be traced.

Cutting at the k-th value, as the code of AdaLoRA does, keeps none of k equal ones and
fails at k = 0. Here values are sorted, ties fall to the lower index, and as many win
as the budget has room for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowrank.allocate.slots import Slots, Unit


class Seats(NamedTuple):
    """The components sorted within their layers, and what each seat is worth.

    Attributes:
      order: The component at each place of the sorted vector.
      value: Mean importance of a seat over the tied layers; zero for shut components.
      rank: Open components of each group, the fewest of its layers.
    """

    order: Int[Array, " components"]
    value: Float[Array, " seats"]
    rank: Int[Array, " groups"]


def seats(
    slots: Slots,
    values: Float[Array, " components"],
    gates: Float[Array, " components"],
) -> Seats:
    """Sorts every layer: open before shut, then by importance, then by index."""
    is_open = gates != 0
    values = jnp.where(is_open, values, 0)
    order = sorted_within(slots, values, is_open)
    return Seats(
        order=order,
        value=_by_seat(slots, values[order]),
        rank=jax.ops.segment_min(
            slots.open_ranks(gates), slots.group, num_segments=slots.num_groups
        ),
    )


def sorted_within(
    slots: Slots,
    values: Float[Array, " components"],
    is_open: Bool[Array, " components"],
) -> Int[Array, " components"]:
    """The components layer by layer: open before shut, then by value, then by index."""
    return jnp.lexsort((-values, ~is_open, jnp.asarray(slots.layer)))


def _by_seat(slots: Slots, values: Array) -> Array:
    count = len(slots.seat_group)
    total = jax.ops.segment_sum(values, slots.seat, num_segments=count + 1)[:count]
    return total / slots.members[slots.seat_group].astype(np.float32)


def per_group(slots: Slots, values: Array) -> Array:
    """Sums over the seats of each group."""
    return jax.ops.segment_sum(values, slots.seat_group, num_segments=slots.num_groups)


def fill(
    slots: Slots,
    order: Int[Array, " components"],
    ranks: Int[Array, " groups"],
) -> Float[Array, " components"]:
    """Gates in which each layer has the rank of its group.

    Open components stay, the best first; where there are too few, shut ones open by
    rising index.
    """
    taken = slots.position < ranks[slots.group][slots.layer]
    return jnp.zeros(slots.num_components).at[order].set(taken.astype(jnp.float32))


def win(
    slots: Slots,
    unit: Unit,
    budget: Int[Array, ""],
    *,
    forced: Bool[Array, " seats"],
    allowed: Bool[Array, " seats"],
    keys: tuple[Array, ...],
) -> Int[Array, " groups"]:
    """The rank of every group: seats are taken in order while the budget has room.

    Where all seats count the same, the best budget // price of them win, no matter how
    many are equal. Elsewhere a seat that no longer fits is passed over, and what is
    left in the end is less than the cheapest allowed seat that did not win.

    Args:
      slots: The layout.
      unit: What the budget counts.
      budget: Most that may be taken.
      forced: Seats that win first.
      allowed: Seats that may win; every forced one must be.
      keys: What decides among the others, smallest first, the first key the weightiest.
        In each group they must not fall from one seat to the next.
    """
    kind = jnp.where(allowed, jnp.where(forced, 0, 1), 2)
    order = jnp.lexsort((*reversed(keys), kind))
    price = slots.price(unit)
    if len({*price.tolist()}) <= 1:
        place = jnp.argsort(order)
        each = int(price[0]) if len(price) else 1
        taken = (place < budget // each) & allowed
    else:
        cost = jnp.asarray(price.astype(np.int32))[slots.seat_group]

        def take(left: Array, seat: Array) -> tuple[Array, Array]:
            fits = allowed[seat] & (cost[seat] <= left)
            return left - jnp.where(fits, cost[seat], 0), fits

        _, won = jax.lax.scan(take, jnp.asarray(budget, jnp.int32), order)
        taken = jnp.zeros(len(slots.seat_group), bool).at[order].set(won)
    return per_group(slots, taken.astype(jnp.int32))
