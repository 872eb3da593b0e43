"""Ranks that are dealt out before a run, on the host and in exact numbers.

What fixed allocations consist of, and where adaptive ones begin.
"""

import bisect
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lowrank.allocate.slots import Slots, Unit
from lowrank.core.errors import BadInput

#: Permutations tried before a shuffle within bounds is given up.
_TRIES = 1000


def deal(
    slots: Slots,
    weights: Sequence[float] | np.ndarray,
    budget: int,
    unit: Unit,
    most: np.ndarray | None = None,
) -> np.ndarray:
    """Ranks of all layers in proportion to weights, within bounds and a budget.

    The largest remainders of `selectors.proportional`, in fractions and whatever layers
    count: the quota of a group of tied layers is clip(x w, least, most), with w their
    mean weight and x such that the budget is used up; components with the smallest
    rank - quota are dealt first. Never exceeded, with less left than any further one
    would count: so met exactly where a component of each group counts one.

    Raises:
      BadInput: The budget is out of reach.
    """
    top = slots.most if most is None else most
    slots.check_budget(budget, unit, "the budget", top)
    low, high = (one.tolist() for one in slots.group_bounds(slots.least, top))
    price = slots.price(unit).tolist()
    exact = [Fraction(float(w)) for w in weights]
    members = [np.flatnonzero(slots.group == g) for g in range(len(price))]
    shares = [sum((exact[i] for i in own), Fraction(0)) / len(own) for own in members]
    quotas = _quotas(shares, price, low, high, budget)
    ranks, left = (
        list(low),
        budget - sum(r * p for r, p in zip(low, price, strict=True)),
    )
    wanted = sorted(
        (rank - quotas[group], group, rank)
        for group in range(len(price))
        for rank in range(low[group] + 1, high[group] + 1)
    )
    for _, group, _ in wanted:
        if price[group] <= left:
            ranks[group] += 1
            left -= price[group]
    return np.array(ranks, np.int32)[slots.group]


def _quotas(
    shares: list[Fraction], price: list[int], low: list[int], high: list[int],
    budget: int,
) -> list[Fraction]:  # fmt: skip
    """clip(x s, low, high) that count `budget` together: found bound by bound.

    Between two neighboring values of x at which some bound is met, the total is linear.
    """
    at = lambda x: [
        min(max(x * s, Fraction(a)), Fraction(b))
        for s, a, b in zip(shares, low, high, strict=True)
    ]
    total = lambda x: sum(q * p for q, p in zip(at(x), price, strict=True))
    bends = {Fraction(0)}
    for s, a, b in zip(shares, low, high, strict=True):
        bends |= {a / s, b / s} if s > 0 else set()
    ordered = sorted(bends)
    place = bisect.bisect_right(ordered, budget, key=total)
    below = ordered[max(place - 1, 0)]
    above = ordered[min(place, len(ordered) - 1)]
    rise = total(above) - total(below)
    step = (budget - total(below)) / rise if rise else Fraction(0)
    return at(below + (above - below) * step)


def ramp(slots: Slots, ratio: float) -> np.ndarray:
    """Weights that change linearly from the first layer of the depth to the last.

    PRILoRA's ranks (Benedek & Wolf 2024, arXiv:2401.11316) rise with depth. The depth
    of a layer is its place in its stack, or among the sites where nothing is stacked,
    in the order of their names, where layer_2 comes before layer_10.

    Args:
      slots: The layout.
      ratio: The last weight over the first one; above 1 it rises.
    """
    weights: list[float] = []
    by_number = lambda path: [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", path)
    ]
    single = sorted(
        (one.path for one in slots.competitors if one.num_layers == 1), key=by_number
    )
    for one in slots.competitors:
        alone = one.num_layers == 1
        count = len(single) if alone else one.num_layers
        places = [single.index(one.path)] if alone else range(one.num_layers)
        weights += [1 + (ratio - 1) * place / max(count - 1, 1) for place in places]
    return np.array(weights)


def shuffle(slots: Slots, ranks: np.ndarray, seed: int) -> np.ndarray:
    """The same ranks on other layers: how many of each, but not where they belong.

    Ranks are permuted among groups whose components count the same parameters, so
    that every budget stays what it is.

    Raises:
      BadInput: Of the permutations tried, none moves a rank and keeps every layer
        within its bounds: there would be no control.
    """
    own = slots.by_group(ranks, np.minimum)
    low, high = slots.group_bounds(slots.least, slots.most)
    price = slots.price("parameters")
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        moved = own.copy()
        for cost in np.unique(price):
            members = np.flatnonzero(price == cost)
            moved[members] = own[rng.permutation(members)]
        if ((low <= moved) & (moved <= high)).all() and (moved != own).any():
            return moved[slots.group].astype(np.int32)
    raise BadInput(
        f"no shuffle of the ranks of {slots.num_layers} layers differs from them and "
        "keeps within their bounds: ranks move only among layers of equal size. Widen "
        "ranks.bounds or ranks.max_rank, or leave this control out"
    )
