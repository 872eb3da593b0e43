"""Who wins: from importance and a budget to the rank of every layer.

A selector is a function of a `Contest` that gives a rank per group. It sees open
components only; those it adds are opened by `ranking.fill`. None of them branches on
values, so all can be jitted, and mapped over trials with budgets of their own.

    top           the budget's most important components, wherever they are; prunes
    proportional  ranks in proportion to what layers are worth
    grow          layers worth most gain components, none loses any
    swap          the least important components make room in layers worth more
    variance      as few components as explain a given share of each layer
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowrank.allocate import ranking
from lowrank.allocate.ranking import Seats, per_group, win
from lowrank.allocate.slots import Slots, Unit

#: Halvings after which the two ends of an interval are neighbors in float32.
_HALVINGS = 64
#: Worth beside that of the best layer under which a layer counts as worth nothing.
_NOTHING = 1e-12


class Contest(NamedTuple):
    """What a selector decides from.

    Attributes:
      slots: The layout.
      unit: What the budget counts.
      seats: The components in order, from `ranking.seats`.
      budget: Not to be exceeded; met exactly where every seat counts one, except by
        `variance`, which may ask for less.
      least, most: Bounds of each group's rank.
      moves: Components that may change places in one event; for `swap`.
      pool: Components of each layer that may; for `swap`.
      add: Components that a layer gains at once; for `grow`.
      threshold: Share of a layer to be explained; for `variance`.
    """

    slots: Slots
    unit: Unit
    seats: Seats
    budget: Int[Array, ""]
    least: Int[Array, " groups"]
    most: Int[Array, " groups"]
    moves: Int[Array, ""] | int = 0
    pool: Int[Array, ""] | int = 2
    add: Int[Array, ""] | int = 1
    threshold: Float[Array, ""] | float = 1.0

    @property
    def place(self) -> Int[Array, " seats"]:
        """The number of each seat within its group."""
        return jnp.asarray(self.slots.seat_position)

    def spread(self, by_group: Array) -> Array:
        """One number per seat from one per group."""
        return jnp.asarray(by_group)[self.slots.seat_group]

    @property
    def worth(self) -> Float[Array, " groups"]:
        """Summed importance of open components per layer, the mean over a group."""
        inside = self.place < self.spread(self.seats.rank)
        return per_group(self.slots, jnp.where(inside, self.seats.value, 0))

    def win(
        self, budget: Array, *keys: Array, forced: Array | None = None, most: Array
    ) -> Int[Array, " groups"]:
        """`ranking.win` with each group's rank at most `most`."""
        allowed = self.place < self.spread(most)
        forced = self.place < self.spread(self.least) if forced is None else forced
        return win(
            self.slots,
            self.unit,
            budget,
            forced=forced & allowed,
            allowed=allowed,
            keys=keys,
        )


def top(contest: Contest) -> Int[Array, " groups"]:
    """The most important open components of all layers, after every layer's minimum."""
    most = jnp.minimum(contest.most, contest.seats.rank)
    return contest.win(contest.budget, -contest.seats.value, most=most)


def proportional(contest: Contest) -> Int[Array, " groups"]:
    """Ranks in proportion to the worth of layers, rounded by largest remainders.

    The quota of layer l is q_l = clip(x w_l / c_l, least, most), with c_l what a
    component counts and x such that quotas use the budget up; of tied layers, w and c
    are means, so that their number does not lower their ranks. Rounded down, and the
    rest given to the largest remainders (Hamilton's method), so that |r_l - q_l| < 1
    and, where every seat counts one, the total is exact. Both are one rule: the
    component that makes a rank r has the key r - q_l, and the smallest keys win.

    With nothing of worth anywhere, all are worth the same.
    """
    cost = contest.slots.price(contest.unit).astype("float32")
    each = contest.slots.each(contest.unit).astype("float32")
    worth = contest.worth
    worth = jnp.where(jnp.max(worth) > 0, worth, 1.0)
    share = worth / jnp.max(worth)
    ideal = jnp.where(share > _NOTHING, share, 0) / each
    low, high = (b.astype(jnp.float32) for b in (contest.least, contest.most))
    quota = lambda x: jnp.clip(x * ideal, low, high)
    budget = contest.budget.astype(jnp.float32)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = ends
        middle = (below + above) / 2
        over = jnp.sum(quota(middle) * cost) > budget
        return jnp.where(over, below, middle), jnp.where(over, middle, above)

    # Where no bound is met, x = budget / sum w: the first guess is exact there.
    plain = budget / jnp.sum(ideal * cost)
    unbounded = jnp.all((plain * ideal >= low) & (plain * ideal <= high))
    widest = jnp.max(jnp.where(ideal > 0, high / jnp.where(ideal > 0, ideal, 1), 0))
    ends = jnp.zeros(()), widest
    x = jnp.where(unbounded, plain, jax.lax.fori_loop(0, _HALVINGS, halve, ends)[0])
    key = contest.place + 1 - contest.spread(quota(x))
    return contest.win(contest.budget, key, most=contest.most)


def grow(contest: Contest) -> Int[Array, " groups"]:
    """Layers gain `add` components each, those worth most first, as the budget allows.

    IncreLoRA (arXiv:2308.12043), whose h layers per event are here the growth of the
    budget divided by `add`. Departs from its code, which counts layers where it should
    count components and so runs past the budget, and which adds to all of several
    equal layers. A layer that is full passes its turn to the next one; when all have
    had theirs, a second round begins.
    """
    rank = contest.spread(contest.seats.rank)
    turn = jnp.maximum(contest.place - rank, 0) // contest.add
    worth = contest.spread(contest.worth)
    forced = contest.place < jnp.maximum(rank, contest.spread(contest.least))
    present = jnp.sum(contest.seats.rank * contest.slots.price(contest.unit))
    budget = jnp.maximum(contest.budget, present.astype(jnp.int32))
    return contest.win(budget, turn, -worth, forced=forced, most=contest.most)


def swap(contest: Contest) -> Int[Array, " groups"]:
    """The worst of every layer's `pool` worst components give way to other layers.

    ElaLoRA (arXiv:2504.00254): the pool holds up to `pool` lowest components of each
    layer, but never its minimum or its last one; the `moves` lowest of all lose, and
    the layers of the `moves` highest gain one for each. The total is kept: as many gain
    as lose, where a layer that is full cannot gain. Departs in that a layer that both
    gains and loses just keeps what it has, instead of trading an old component for a
    fresh one.

    Needs components that all count the same.
    """
    rank = contest.spread(contest.seats.rank)
    # A layer without any component could not return: nothing would speak for it.
    least = jnp.maximum(contest.spread(contest.least), jnp.minimum(rank, 1))
    floor = jnp.maximum(least, rank - contest.pool)
    pooled = (contest.place >= floor) & (contest.place < rank)
    # The t-th best of a layer's pool stands for the t-th component that it may gain.
    room = contest.spread(contest.most) - rank
    may_gain = pooled & (contest.place - floor < room)
    order = lambda among, key: jnp.argsort(jnp.lexsort((key, ~among)))
    value = contest.seats.value
    count = jnp.minimum(
        jnp.asarray(contest.moves, jnp.int32),
        jnp.minimum(jnp.sum(pooled), jnp.sum(may_gain)),
    )
    gains = may_gain & (order(may_gain, -value) < count)
    # Read backwards, so that of equal components of a layer the last one loses.
    last = lambda x: jnp.flip(x)
    losses = pooled & (last(order(last(pooled), last(value))) < count)
    change = gains.astype(jnp.int32) - losses.astype(jnp.int32)
    return contest.seats.rank + per_group(contest.slots, change)


def variance(contest: Contest) -> Int[Array, " groups"]:
    """The fewest components whose importance is `threshold` of their layer's.

    With importance=spectrum these are singular values, not their squares: a threshold
    of 0.9 keeps more than nine tenths of what is usually called explained variance.
    The budget is a ceiling: if more are asked for, the most important ones win.
    """
    value, slots = contest.seats.value, contest.slots
    # Summed layer by layer: a sum over all would drown small layers in rounding.
    shape = slots.num_groups, int(slots.seat_position.max(initial=-1)) + 1
    where = slots.seat_group, slots.seat_position
    before = jnp.cumsum(jnp.zeros(shape).at[where].set(value), axis=1)[where] - value
    # What sums lose in float32 must not make one component more.
    enough = contest.threshold * contest.spread(contest.worth) * (1 - 1e-6)
    wanted = before < enough
    count = per_group(contest.slots, wanted.astype(jnp.int32))
    most = jnp.clip(count, contest.least, contest.most)
    most = jnp.minimum(most, contest.seats.rank)
    return contest.win(contest.budget, -value, most=most)


SELECTORS: Mapping[str, Callable[[Contest], Int[Array, " groups"]]] = {
    "top": top,
    "proportional": proportional,
    "grow": grow,
    "swap": swap,
    "variance": variance,
}
#: Selectors under which a layer may gain components.
GAINING = frozenset({"proportional", "grow", "swap"})


def select(name: str, contest: Contest) -> Float[Array, " components"]:
    """The gates that a selector decides on."""
    ranks = SELECTORS[name](contest)
    return ranking.fill(contest.slots, contest.seats.order, ranks)
