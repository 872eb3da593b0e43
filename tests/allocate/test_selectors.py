"""Winners are as many as the budget says, whatever is equal, and bounds hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import best, equal, layout, ranks_of

from lowrank.allocate import dealing, ranking
from lowrank.allocate.normalisers import NORMALISERS
from lowrank.allocate.selectors import SELECTORS, Contest, select
from lowrank.allocate.slots import Competitor, Slots

SEEDS = st.integers(0, 2**31)
#: One layout for all draws of a property, so that programs are compiled once.
SIX = equal(6)


def contest(slots, values, gates, budget, unit="components", **more):
    least, most = slots.group_bounds(slots.least, slots.most)
    least = jnp.asarray(more.pop("least", least), jnp.int32)
    most = jnp.asarray(more.pop("most", most), jnp.int32)
    seats = ranking.seats(slots, values, gates)
    budget = jnp.asarray(budget, jnp.int32)
    return Contest(slots, unit, seats, budget, least, most, **more)


def run(name, slots, values, gates, budget, unit="components", **numbers):
    """The gates after a selection under jit."""
    key = name, id(slots), unit, *sorted(numbers)
    if key not in _PROGRAMS:
        decide = lambda v, g, b, more: select(
            name, contest(slots, v, g, b, unit, **more)
        )
        # The layout is kept alive, so that its id is its own.
        _PROGRAMS[key] = jax.jit(decide), slots
    arrays = [jnp.asarray(x, jnp.float32) for x in (values, gates)]
    more = {n: jnp.asarray(x) for n, x in numbers.items()}
    return np.asarray(_PROGRAMS[key][0](*arrays, jnp.int32(budget), more))


_PROGRAMS = {}


def drawn(seed, slots, ties):
    """Values, many of them equal if `ties`, and gates."""
    rng = np.random.default_rng(seed)
    size = slots.num_components
    values = rng.integers(0, 3, size) if ties else rng.permutation(size) + 1.0
    gates = rng.integers(0, 2, size)
    return np.asarray(values, np.float32), np.asarray(gates, np.float32)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.booleans(), st.integers(0, 24))
def test_top_keeps_exactly_the_budget_of_the_best(seed, ties, budget):
    values, gates = drawn(seed, SIX, ties)
    found = run("top", SIX, values, gates, budget)
    np.testing.assert_array_equal(found, best(values, gates, budget))
    assert found.sum() == min(budget, gates.sum())


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
def test_all_equal_values_keep_exactly_the_budget(value):
    """A cut at the k-th value keeps none of them (AdaLoRA's code)."""
    for budget in range(25):
        found = run("top", SIX, np.full(24, value), np.ones(24), budget)
        np.testing.assert_array_equal(found, np.arange(24) < budget)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.booleans(), st.data())
def test_top_keeps_minima_and_maxima(seed, ties, data):
    values, _ = drawn(seed, SIX, ties)
    rng = np.random.default_rng(seed)
    least = rng.integers(0, 3, 6)
    most = rng.integers(2, 5, 6)
    budget = data.draw(st.integers(int(least.sum()), int(most.sum())))
    found = run("top", SIX, values, np.ones(24), budget, least=least, most=most)
    ranks = ranks_of(SIX, found)
    assert found.sum() == budget
    assert (least <= ranks).all()
    assert (ranks <= most).all()
    # Of each layer, none that was kept is worse than one that was not.
    for layer in range(6):
        own = SIX.layer == layer
        kept, lost = values[own & (found > 0)], values[own & (found == 0)]
        assert kept.min(initial=np.inf) >= lost.max(initial=-np.inf)
    # Across layers, who could still lose is no worse than who could still gain.
    free = lambda i: values[(SIX.layer == i) & (found > 0)].min(initial=np.inf)
    next_ = lambda i: values[(SIX.layer == i) & (found == 0)].max(initial=-np.inf)
    losers = [free(i) for i in range(6) if ranks[i] > least[i]]
    gainers = [next_(i) for i in range(6) if ranks[i] < most[i]]
    assert min(losers, default=np.inf) >= max(gainers, default=-np.inf)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(0, 10 * 12 + 7 * 3 + 4 * 8))
def test_a_budget_of_parameters_is_used_up_to_what_still_fits(seed, budget):
    """B6, and against the greedy rule written as a loop."""
    slots = LAYOUT
    values, _ = drawn(seed, slots, False)
    found = run(
        "top", slots, values, np.ones(slots.num_components), budget, unit="parameters"
    )
    costs = slots.cost[slots.layer]
    left, expected = budget, np.zeros(slots.num_components)
    for j in np.argsort(-values, kind="stable"):
        if costs[j] <= left:
            expected[j], left = 1, left - costs[j]
    np.testing.assert_array_equal(found, expected)
    assert left == budget - (costs * found).sum() >= 0
    assert left < costs[found == 0].min(initial=10**9)


LAYOUT = layout()


@pytest.mark.parametrize("unit", ["components", "parameters"])
@pytest.mark.parametrize("name", ["proportional", "variance"])
@settings(deadline=None, max_examples=40)
@given(SEEDS, st.booleans(), st.data())
def test_layers_that_share_a_budget_keep_their_bounds(name, unit, seed, ties, data):
    """B5: whatever layers are worth, some of them nothing; the budget is a ceiling."""
    values, _ = drawn(seed, LAYOUT, ties)
    rng = np.random.default_rng(seed)
    room = ranks_of(LAYOUT, np.ones(LAYOUT.num_components))
    values = values * rng.integers(0, 2, len(room))[LAYOUT.layer]
    least = rng.integers(0, room + 1)
    most = rng.integers(least, room + 1)
    price = LAYOUT.cost if unit == "parameters" else np.ones_like(room)
    low, high = int((least * price).sum()), int((most * price).sum())
    budget = data.draw(st.integers(low, max(low, high)))
    more = {"threshold": np.float32(0.7)} if name == "variance" else {}
    found = run(
        name, LAYOUT, values, np.ones(LAYOUT.num_components), budget, unit,
        least=least, most=most, **more,
    )  # fmt: skip
    ranks = ranks_of(LAYOUT, found)
    assert (least <= ranks).all()
    assert (ranks <= most).all()
    assert (ranks * price).sum() <= budget
    if name == "proportional":
        # What is left buys nothing that anybody has room for.
        assert budget - (ranks * price).sum() < price[ranks < most].min(initial=10**9)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 24))
def test_proportional_is_within_one_of_its_quota(seed, budget):
    """B7, where no bound is met; and the total is exact where one is."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(1.0, size=24).astype(np.float32)
    found = run("proportional", SIX, values, np.ones(24), budget)
    ranks = ranks_of(SIX, found)
    assert ranks.sum() == budget
    worth = np.array([values[SIX.layer == i].sum(dtype=np.float64) for i in range(6)])
    quota = budget * worth / worth.sum()
    if quota.max() <= 4:
        # Of float32 shares: a remainder that is zero may come out as one.
        assert (np.abs(ranks - quota) < 1 + 1e-5).all()
    np.testing.assert_array_equal(ranks, dealing.deal(SIX, worth, budget, "components"))


@pytest.mark.parametrize(
    ("worth", "budget", "expected"),
    [
        ([1, 1, 1, 1, 1, 1], 9, [2, 2, 2, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 0], 6, [1, 1, 1, 1, 1, 1]),
        ([100, 1, 1, 1, 1, 1], 9, [4, 1, 1, 1, 1, 1]),
        ([100, 50, 0, 0, 0, 0], 9, [4, 4, 1, 0, 0, 0]),
        ([4, 3, 2, 1, 0, 0], 10, [4, 3, 2, 1, 0, 0]),
        ([1e-30, 1e-30, 0, 0, 0, 0], 4, [2, 2, 0, 0, 0, 0]),
    ],
)
def test_proportional_cases_by_hand(worth, budget, expected):
    values = np.zeros(24, np.float32)
    values[::4] = worth
    found = run("proportional", SIX, values, np.ones(24), budget)
    np.testing.assert_array_equal(ranks_of(SIX, found), expected)
    np.testing.assert_array_equal(
        dealing.deal(SIX, worth, budget, "components"), expected
    )


def test_proportional_opens_what_was_shut_and_keeps_the_best():
    values = np.tile([1.0, 4.0, 3.0, 2.0], 6)
    gates = np.tile([0.0, 1, 1, 0], 6)
    found = run("proportional", SIX, values, gates, 18)
    # Open ones first, by importance; then shut ones by index.
    np.testing.assert_array_equal(found, np.tile([1.0, 1, 1, 0], 6))
    found = run("proportional", SIX, values, gates, 6)
    np.testing.assert_array_equal(found, np.tile([0.0, 1, 0, 0], 6))


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.booleans(), st.integers(0, 24), st.integers(1, 3))
def test_growth_loses_none_and_never_overshoots(seed, ties, budget, add):
    """B4."""
    values, gates = drawn(seed, SIX, ties)
    found = run("grow", SIX, values, gates, budget, add=add)
    assert (found >= gates).all()
    assert found.sum() == max(budget, gates.sum())


def test_growth_goes_to_the_layers_that_matter_most():
    values = np.repeat([1.0, 5.0, 3.0, 9.0, 7.0, 0.0], 4)
    gates = np.tile([1.0, 0, 0, 0], 6)
    ranks = lambda budget, **more: ranks_of(
        SIX, run("grow", SIX, values, gates, budget, **more)
    ).tolist()
    assert ranks(8) == [1, 1, 1, 2, 2, 1]
    assert ranks(9, add=2) == [1, 1, 1, 3, 2, 1], "the last one gets what is left"
    assert ranks(10, add=2) == [1, 1, 1, 3, 3, 1]
    most = np.array([4, 4, 4, 2, 4, 4])
    assert ranks(10, add=2, most=most) == [1, 2, 1, 2, 3, 1], "a full layer passes"
    assert ranks(24) == [4] * 6


@settings(deadline=None, max_examples=80)
@given(SEEDS, st.booleans(), st.integers(0, 8), st.integers(1, 3))
def test_swaps_conserve_and_respect_bounds(seed, ties, moves, pool):
    """B3."""
    values, gates = drawn(seed, SIX, ties)
    least = np.minimum(ranks_of(SIX, gates), 1)
    found = run("swap", SIX, values, gates, 0, least=least, moves=moves, pool=pool)
    assert found.sum() == gates.sum()
    ranks = ranks_of(SIX, found)
    assert (ranks >= least).all()
    assert (ranks <= 4).all()
    change = ranks - ranks_of(SIX, gates)
    assert change.min() >= -pool
    assert change.clip(0).sum() <= moves


def test_a_swap_takes_from_the_worst_and_gives_to_the_best():
    values = np.array([[9, 8, 0, 0], [3, 2, 0, 0], [6, 1, 0, 0]], np.float32).ravel()
    gates = np.tile([1.0, 1, 0, 0], 3)
    slots = equal(3)
    ranks = lambda **more: ranks_of(slots, run("swap", slots, values, gates, 0, **more))
    assert ranks(moves=1, pool=1).tolist() == [3, 2, 1]
    # The pool is 8, 2, 1; layer 1 both gains and loses, and keeps what it has.
    assert ranks(moves=2, pool=1).tolist() == [3, 2, 1]
    assert ranks(moves=0, pool=1).tolist() == [2, 2, 2]
    least = np.array([0, 2, 2])
    assert ranks(moves=1, pool=2, least=least).tolist() == [2, 2, 2], "none can lose"
    most = np.array([2, 4, 4])
    assert ranks(moves=1, pool=1, most=most).tolist() == [2, 3, 1], "the best is full"
    poor = values.reshape(3, 4) * np.array([[1], [1], [0.01]])
    found = run("swap", slots, poor.ravel(), gates, 0, moves=2, pool=4)
    assert ranks_of(slots, found).tolist() == [3, 2, 1], "the last one stays"


def test_variance_keeps_as_few_as_explain_enough():
    values = np.array([[8, 1, 1, 0], [5, 5, 0, 0], [1, 1, 1, 1]], np.float32).ravel()
    slots = equal(3)
    ranks = lambda threshold, budget=12, scale=1.0: ranks_of(
        slots,
        run(
            "variance", slots, values * scale, np.ones(12), budget, threshold=threshold
        ),
    ).tolist()
    assert ranks(0.8) == [1, 2, 4]
    assert ranks(0.75) == [1, 2, 3]
    assert ranks(1.0) == [3, 2, 4]
    assert ranks(0.8, budget=3) == [1, 2, 0], "the budget is a ceiling"
    # Small layers beside large ones: a sum over all would lose them.
    assert ranks(0.8, scale=np.repeat([1e6, 1.0, 1e-6], 4)) == [1, 2, 4]


@pytest.mark.parametrize("name", SELECTORS)
def test_who_wins_does_not_depend_on_the_order_of_layers(name):
    """Equivariance: distinct values, layers permuted with all that is theirs."""
    rng = np.random.default_rng(3)
    values = rng.gamma(1.0, size=(6, 4)).astype(np.float32)
    gates = np.ones((6, 4))
    gates[:, 2:] = 0
    least, most = np.array([0, 1, 0, 2, 0, 0]), np.array([4, 4, 3, 4, 2, 4])
    budget = {"top": 7, "grow": 16}.get(name, 12)
    more = {"moves": 2} if name == "swap" else {}
    more |= {"threshold": 0.6} if name == "variance" else {}
    first = run(
        name, SIX, values.ravel(), gates.ravel(), budget, least=least, most=most, **more
    )
    for _ in range(4):
        p = rng.permutation(6)
        second = run(
            name, SIX, values[p].ravel(), gates[p].ravel(), budget,
            least=least[p], most=most[p], **more,
        )  # fmt: skip
        np.testing.assert_array_equal(second.reshape(6, 4), first.reshape(6, 4)[p])


@pytest.mark.parametrize(
    ("name", "unit"),
    # Swaps are between components that count the same.
    [(n, u) for n in SELECTORS for u in ("components", "parameters")
     if (n, u) != ("swap", "parameters")],
)  # fmt: skip
def test_trials_mapped_over_are_trials_alone(name, unit):
    """G5, and G4 against no jit: all numbers differ between trials."""
    rng = np.random.default_rng(4)
    slots = LAYOUT
    values = jnp.asarray(rng.gamma(1.0, size=(3, slots.num_components)), jnp.float32)
    gates = jnp.asarray(rng.integers(0, 2, values.shape), jnp.float32)
    held = np.stack([ranks_of(slots, g) for g in gates])
    least = jnp.asarray(np.minimum(held, [[0], [1], [2]]), jnp.int32)
    budgets = held.sum(1) if unit == "components" else held @ slots.cost
    budgets = jnp.asarray(budgets, jnp.int32) + jnp.array([-2, 0, 3])
    decide = lambda v, g, b, low, moves: select(
        name, contest(slots, v, g, b, unit, least=low, moves=moves, threshold=0.7)
    )
    moves = jnp.array([0, 1, 3])
    given = values, gates, budgets, least, moves
    together = jax.jit(jax.vmap(decide))(*given)
    for trial in range(3):
        alone = decide(*[x[trial] for x in given])
        np.testing.assert_array_equal(together[trial], alone)


def test_tied_layers_win_together():
    slots = Slots(
        [
            Competitor(path="q", max_rank=3, cost=8, ranks=1, stack=(2,), group="att"),
            Competitor(path="v", max_rank=3, cost=8, ranks=1, stack=(2,), group="att"),
            Competitor(path="o", max_rank=3, cost=8, ranks=1),
        ]
    )
    q, v, o = [[9, 1, 1], [2, 2, 2]], [[1, 8, 0], [2, 6, 2]], [4, 3, 2]
    values = np.array([*np.ravel(q), *np.ravel(v), *o], np.float32)
    ranks = lambda budget: ranks_of(
        slots, run("top", slots, values, np.ones(15), budget)
    ).tolist()
    # Pairs of the best of each: layer 0 has 8.5, 1, .5; layer 1 has 4, 2, 2; o 4, 3, 2.
    assert ranks(2) == [1, 0, 1, 0, 0]
    assert ranks(4) == [1, 1, 1, 1, 0]
    assert ranks(3) == [1, 0, 1, 0, 1], "one is left, in which no pair fits"
    assert ranks(6) == [1, 1, 1, 1, 2]
    for budget in range(16):
        found = ranks(budget)
        assert found[:2] == found[2:4]
        # What is left is less than the cheapest that may still win.
        left = budget - sum(found)
        open_ = [1] if found[4] < 3 else [2] if min(found[:2]) < 3 else [99]
        assert 0 <= left < open_[0]


def test_tied_layers_of_unequal_cost_are_bought_by_gain_per_parameter():
    """A pair that gains 20 for 110 parameters, beside a layer that gains 5 for 10."""
    costs = {"cheap": 10, "dear": 100, "alone": 10}
    slots = Slots(
        [
            Competitor(
                path=path, max_rank=1, cost=cost, ranks=1,
                group=None if path == "alone" else "pair",
            )
            for path, cost in costs.items()
        ]
    )  # fmt: skip
    values, gates = jnp.array([10.0, 10.0, 5.0]), jnp.ones(3)
    worth = NORMALISERS["cost"](slots, values, gates)
    seats = ranking.seats(slots, worth, gates)
    # Relative to the smallest cost. One by one the pair has (10/10 + 10/100) / 2.
    np.testing.assert_allclose(seats.value, [10 * 20 / 110, 10 * 5 / 10], rtol=1e-6)
    found = run("top", slots, worth, gates, 110, unit="parameters")
    assert found.tolist() == [0, 0, 1]
    # Where the pair gains more per parameter, it wins.
    worth = NORMALISERS["cost"](slots, values.at[1].set(90.0), gates)
    found = run("top", slots, worth, gates, 110, unit="parameters")
    assert found.tolist() == [1, 1, 0]


@pytest.mark.parametrize("unit", ["components", "parameters"])
def test_ties_do_not_lower_the_ranks_that_layers_are_worth(unit):
    """Of equal worth and cost, a layer that is tied gets as much as one alone."""
    slots = Slots(
        [
            Competitor(path=f"l{i}", max_rank=8, cost=5, ranks=2, group=group)
            for i, group in enumerate(["pair", "pair", None, None])
        ]
    )
    values = np.repeat(np.array([1.0, 3.0, 2.0, 1.0], np.float32), 8)
    budget = 14 * (1 if unit == "components" else 5)
    found = run("proportional", slots, values, np.ones(32), budget, unit=unit)
    assert ranks_of(slots, found).tolist() == [4, 4, 4, 2]
    by_hand = dealing.deal(slots, [1, 3, 2, 1], budget, unit)
    assert by_hand.tolist() == [4, 4, 4, 2]


def test_normalisers_are_the_quotients_they_claim():
    slots, rng = LAYOUT, np.random.default_rng(5)
    values = rng.gamma(1.0, size=slots.num_components).astype(np.float32)
    gates = rng.integers(0, 2, slots.num_components).astype(np.float32)
    own = {n: np.asarray(f(slots, jnp.asarray(values), jnp.asarray(gates)))
           for n, f in NORMALISERS.items()}  # fmt: skip
    np.testing.assert_array_equal(own["none"], values)
    cost = slots.cost[slots.layer] / slots.cost.min()
    np.testing.assert_allclose(own["cost"], values / cost, rtol=1e-6)
    for layer in range(slots.num_layers):
        inside = (slots.layer == layer) & (gates > 0)
        if inside.any():
            assert own["layer"][inside].sum() == pytest.approx(1, rel=1e-5)
    # Its limitation: a layer that matters more gets no more.
    larger = np.where(slots.layer == 0, 1000 * values, values)
    again = NORMALISERS["layer"](slots, jnp.asarray(larger), jnp.asarray(gates))
    np.testing.assert_allclose(again, own["layer"], rtol=1e-5)
