"""Recipes do what their papers say, and what does not go together is refused."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from layouts import equal, ranks_of
from simulated import ADAPTIVE, KEY, LAYERS, NAMED, STEPS, allocator, simulate

from lowrank.allocate import adaptive
from lowrank.allocate.importance import IMPORTANCES
from lowrank.allocate.normalisers import NORMALISERS
from lowrank.allocate.schedules import SHAPES, STAIRCASE
from lowrank.allocate.selectors import SELECTORS
from lowrank.allocate.slots import Competitor, Slots
from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import digest


def test_growth_grows_where_it_matters_and_forgets_nothing_else():
    allocation = allocator("growth").on(equal(LAYERS), STEPS)
    seen = jnp.repeat(jnp.array([1.0, 9, 4, 2]), 4)
    memory, gates = allocation.init(), allocation.gates(allocation.constants)
    totals = [float(gates.sum())]
    for step in range(STEPS):
        if allocation.due(step, allocation.constants):
            new, memory = allocation.event(
                memory, gates, step, KEY, allocation.constants
            )
            assert (new >= gates).all()
            born = (new > 0) & (gates == 0)
            assert not memory["importance"]["count"][born].any()
            gates = new
            totals.append(float(gates.sum()))
        if allocation.measures(step, allocation.constants):
            given = {"gate_fisher": seen * gates}
            memory = allocation.observe(memory, given, step, allocation.constants)
    assert totals == [4, 5, 6, 7, 8, 8]
    assert ranks_of(allocation.slots, gates)[1] == 4


def test_eva_gives_to_the_directions_that_explain_most_within_rho():
    allocation = allocator("eva", rho=1.5).on(equal(LAYERS), STEPS)
    shares = np.array([[0.9, 0.05, 0.03, 0.02], [0.4, 0.3, 0.2, 0.1],
                       [0.5, 0.3, 0.1, 0.1], [0.35, 0.3, 0.25, 0.1]])  # fmt: skip
    constants = allocation.constants
    memory = allocation.observe(
        allocation.init(),
        {"variance": jnp.asarray(shares.ravel(), jnp.float32)},
        0,
        constants,
    )
    gates = allocation.gates(constants)
    assert ranks_of(allocation.slots, gates).tolist() == [3] * 4
    assert allocation.due(0, constants)
    gates, _ = allocation.event(memory, gates, 0, KEY, constants)
    assert ranks_of(allocation.slots, gates).tolist() == [1, 2, 2, 3]


def test_fixed_ranks_are_what_they_say():
    slots = equal(LAYERS)
    ranks = lambda name, **f: ranks_of(
        slots, (a := allocator(name, **f).on(slots, STEPS)).gates(a.constants)
    ).tolist()
    assert ranks("uniform") == [2, 2, 2, 2]
    assert ranks("uniform", budget=6) == [2, 2, 1, 1]
    assert ranks("given") == [4, 1, 2, 1]
    assert ranks("ramp") == [1, 2, 2, 3]
    assert ranks("ramp", ratio=1 / 3) == [3, 2, 2, 1]
    shuffled = [ranks("shuffled", seed=s) for s in range(8)]
    assert all(sorted(one) == [1, 1, 2, 4] and one != [4, 1, 2, 1] for one in shuffled)
    assert len({tuple(one) for one in shuffled}) > 2
    stacked = Slots(
        [Competitor(path="w", max_rank=6, cost=4, ranks=2, stack=(3,), least=1),
         Competitor(path="v", max_rank=6, cost=9, ranks=2, stack=(3,))]
    )  # fmt: skip
    found = allocator("ramp", ratio=5.0).on(stacked, STEPS)
    # 1 : 3 : 5 in each stack, of six for both.
    assert found.constants["ranks"].tolist() == [1, 2, 3, 1, 2, 3]
    by_size = allocator("shuffled", ranks=stacked.named(np.array([1, 2, 3, 4, 5, 6])))
    moved = by_size.on(stacked, STEPS).constants["ranks"]
    assert sorted(moved[:3]) == [1, 2, 3], "among layers of one size"
    assert sorted(moved[3:]) == [4, 5, 6]


def test_a_ramp_goes_by_the_numbers_in_names():
    """Sites come in the order of their names, in which 10 is before 2."""
    names = sorted(f"layer_{number}/w" for number in range(12))
    sites = [Competitor(path=name, max_rank=24, cost=4, ranks=12) for name in names]
    slots = Slots(sites)
    made = allocator("ramp", ratio=23.0).on(slots, STEPS)
    found = slots.named(made.constants["ranks"])
    rising = [found[f"layer_{number}/w"] for number in range(12)]
    assert rising == [*range(1, 24, 2)]


def test_tied_layers_keep_the_largest_of_their_minima():
    sites = [
        Competitor(path="a", max_rank=8, cost=4, ranks=2, group="g"),
        Competitor(path="b", max_rank=16, cost=4, ranks=8, least=6, group="g"),
        Competitor(path="c", max_rank=16, cost=4, ranks=8),
    ]
    made = allocator("fisher", rho=1.0, start=1.2, budget=16).on(Slots(sites), STEPS)
    assert (made.constants["least"] <= made.constants["most"]).all()


def test_a_ramp_of_a_budget_in_parameters_is_a_ramp_of_ranks():
    """Ranks of 1 to 3, dear or cheap; were they weighed by cost, they would be 1:12."""
    for costs in ((10, 40), (40, 10), (10, 10)):
        sites = [
            Competitor(path=f"l{i}", max_rank=40, cost=cost, ranks=2)
            for i, cost in enumerate(costs)
        ]
        budget = 4 * (costs[0] + 3 * costs[1])
        ramp = allocator("ramp", budget=budget, unit="parameters")
        found = ramp.on(Slots(sites), STEPS).constants["ranks"]
        assert found.tolist() == [4, 12]


def test_a_budget_of_parameters_is_kept_in_parameters():
    slots = Slots(
        [
            Competitor(path=f"l{i}", max_rank=6, cost=c, ranks=2)
            for i, c in enumerate((5, 9, 20))
        ]
    )
    allocation = allocator("norm", unit="parameters").on(slots, STEPS)
    assert allocation.program.normaliser == "cost"
    shares = allocator("effective_rank", unit="parameters").on(slots, STEPS)
    assert shares.program.normaliser == "none", "shares are divided by cost once"
    costs = slots.cost[slots.layer]
    for step, gates, _ in simulate(allocation):
        budget = int(allocation.budget(step, allocation.constants))
        assert 0 <= budget - float((gates * costs).sum()) < 20
    assert budget == 2 * (5 + 9 + 20)
    start = allocator("norm", unit="parameters", start=1.5).on(slots, STEPS)
    assert start.constants["ranks"].tolist() == [3, 3, 3]


WRONG = [
    ("fisher", {"budget": 17}, "take 0, the maximum ranks 16"),
    ("fisher", {"start": 3.0}, "the first budget = 24.*Change ranks.start, ranks.b"),
    ("fisher", {"rho": 1.2, "start": 1.8}, "or raise ranks.rho"),
    ("fisher", {"start": 0.5}, "only prunes"),
    ("fisher", {"budget": 16}, "there are no more"),
    ("fisher", {"end": 40}, "run of 40"),
    ("fisher", {"end": 2.0}, "no fraction"),
    ("fisher", {"begin": 0, "end": 0}, "before the first step"),
    ("fisher", {"measure_every": 0}, "measured in training"),
    ("fisher", {"measure_every": 6}, "ranks.measure_every = 6"),
    ("fisher", {"decay": 1.0}, r"ranks.decay = 1\.0 .* at least 0 and below 1"),
    ("fisher", {"rho": 0.5}, r"ranks.rho = 0\.5"),
    ("fisher", {"budget": 0}, "ranks.budget = 0"),
    ("fisher", {"importance": "fischer"}, "importance must be"),
    ("fisher", {"schedule": "constant"}, "cannot lead"),
    ("fisher", {"colour": 1}, "no field 'colour'"),
    ("growth", {"start": 1.0}, "only grows"),
    ("growth", {"at_once": 1, "every": 20}, "climbs 2 at each, and may climb 1"),
    ("growth", {"schedule": "staircase", "at_once": 1, "unit": "parameters",
                "start": 0.5}, "counts layers"),
    ("growth", {"mode": "revivable"}, "opens gates"),
    ("effective_rank", {"selector": "swap", "start": 1.5, "schedule": "cubic"},
     "keeps the total"),
    ("effective_rank", {"selector": "swap", "every": 22}, "changes nothing at any"),
    ("effective_rank", {"selector": "swap", "moves": 0}, "changes nothing at any"),
    ("growth", {"budget": 4}, "'l[0-3]' would begin without any"),
    ("given", {"ranks": {**NAMED, "l9": 1}}, "'l9'.*Nearest: 'l"),
    ("given", {"ranks": {**NAMED, "l0": 5}}, "'l0' has rank 5"),
    ("given", {"ranks": {**NAMED, "l1": 2.7}}, "the rank of 'l1' is 2.7: give a whole"),
    ("given", {"ranks": {**NAMED, "l1": True}}, "the rank of 'l1' is True"),
    ("given", {"ranks": {**NAMED, "l1": -1}}, "the rank of 'l1' is -1"),
    ("shuffled", {"ranks": {**NAMED, "l1": "many"}}, "the rank of 'l1' is 'many'"),
    ("shuffled", {"ranks": dict.fromkeys(NAMED, 2)}, "no shuffle"),
    ("uniform", {"budget": 99}, "= 99 components is out of reach"),
    ("ramp", {"ratio": 0.0}, "ranks.ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), WRONG)
def test_what_does_not_go_together_is_refused_before_anything_runs(
    name, fields, message
):
    with pytest.raises(BadInput, match=message):
        allocator(name, **fields).on(equal(LAYERS), STEPS)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_recipe_checks_its_fields(name):
    """A recipe that forgets `__post_init__` would take any number."""
    with pytest.raises(BadInput, match=r"ranks\.every = 0"):
        allocator(name, every=0, measure_every=0)


def test_nothing_to_allocate_is_refused():
    slots = Slots([Competitor(path="w", max_rank=0, cost=4, ranks=0)])
    with pytest.raises(BadInput, match="no component competes"):
        allocator("fisher").on(slots, STEPS)
    assert allocator("uniform").on(slots, STEPS).constants["ranks"].tolist() == [0]


def test_bounds_that_leave_no_room_are_refused():
    slots = equal(LAYERS, least=2)
    with pytest.raises(BadInput, match="the minimum ranks of 4 layers take 8"):
        allocator("fisher", budget=7).on(slots, STEPS)


def test_recipes_are_compositions_and_hash_as_what_they_say():
    assert allocator("fisher").importance == "fisher"
    crossed = allocator("adalora", importance="fisher", mode="hard")
    assert crossed.on(equal(LAYERS), STEPS).needs == {"gate_fisher"}
    assert digest(crossed) != digest(allocator("adalora"))
    with pytest.raises(UnknownName, match="Nearest: 'adalora'"):
        allocator("adalore")


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (adaptive.Name, IMPORTANCES),
        (adaptive.Normaliser, NORMALISERS),
        (adaptive.Selector, SELECTORS),
        (adaptive.Shape, [*SHAPES, STAIRCASE]),
    ],
    ids=["importance", "normaliser", "selector", "schedule"],
)
def test_a_config_may_name_what_there_is_and_nothing_else(names, table):
    """A type cannot be read off a table, so its names stand twice, in one order."""
    assert list(get_args(names)) == [*table]


def test_eva_without_directions_may_go_by_another_importance():
    for name in ("first_gradient", "norm"):
        with pytest.raises(BadInput, match=r"set ranks\.directions=false"):
            allocator("eva", importance=name)
        assert not allocator("eva", importance=name, directions=False).directions
