"""The contract that training calls, for every allocator of the catalogue."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import best, equal, ranks_of
from test_importance import adalora

from lowrank.allocate.allocation import events, pack
from lowrank.allocate.catalogue import CATALOGUE
from lowrank.allocate.signals import SIGNALS
from lowrank.allocate.slots import Competitor, Slots
from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build, digest

STEPS = 40
LAYERS = 4
D_IN, D_OUT = 5, 3
NAMED = {f"l{i}": rank for i, rank in enumerate((4, 1, 2, 1))}
#: Fields without which an allocator cannot be, and short windows.
WINDOW = {"begin": 4, "end": 26, "every": 5, "measure_every": 2}
FIELDS = {
    "uniform": {},
    "given": {"ranks": NAMED},
    "ramp": {},
    "shuffled": {"ranks": NAMED},
    "eva": {},
    "adalora": {**WINDOW, "measure_every": 1},
}
ADAPTIVE = [n for n in CATALOGUE if n not in ("uniform", "given", "ramp", "shuffled")]
KEY = jax.random.key(0)


def allocator(name, **fields):
    return build(
        {"name": name, **FIELDS.get(name, WINDOW), **fields}, CATALOGUE, "ranks"
    )


def factors_of(slots, rng):
    return {
        one.path: {
            "a": jnp.asarray(rng.normal(size=(one.max_rank, D_IN)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(one.max_rank, D_OUT)), jnp.float32),
        }
        for one in slots.competitors
    }


def signals_of(slots, rng, needs):
    flat = lambda: jnp.asarray(rng.gamma(1.0, size=slots.num_components), jnp.float32)
    given = {name: flat() for name in SIGNALS}
    given |= {"factors": factors_of(slots, rng), "gradients": factors_of(slots, rng)}
    return {name: given[name] for name in needs}


def simulate(allocation, seed=0, check=lambda *_: None):
    """A run without training: signals are random, ranks move as they would."""
    rng = np.random.default_rng(seed)
    slots, constants = allocation.slots, allocation.constants
    memory = allocation.init(factors_of(slots, rng))
    gates = allocation.gates(constants)
    if not allocation.measure_every:
        given = signals_of(slots, rng, allocation.needs)
        memory = allocation.observe(memory, given, 0, constants)
    event, observe = jax.jit(allocation.event), jax.jit(allocation.observe)
    for step in range(STEPS):
        if allocation.due(step, constants):
            before = gates
            gates, memory = event(memory, gates, step, KEY, constants)
            check(step, before, gates, memory)
        if allocation.measures(step, constants):
            given = signals_of(slots, rng, allocation.needs)
            memory = observe(memory, given, step, constants)
        yield step, gates, memory


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_open_is_the_budget_at_every_step(name):
    """B2 over whole runs, and the last budget is what the rules' ranks add up to."""
    slots = equal(LAYERS)
    allocation = allocator(name).on(slots, STEPS)
    spent = []
    for step, gates, memory in simulate(allocation):
        forward = allocation.forward_budget(step, allocation.constants)
        assert gates.sum() == forward
        spent.append(int(forward))
        assert memory["sound"]
    assert spent[-1] == 2 * LAYERS
    assert set(np.unique(np.asarray(gates))) <= {0.0, 1.0}
    assert allocation.average_forward_budget() == pytest.approx(np.mean(spent))


def test_revivable_losers_keep_their_gates_until_the_last_event():
    allocation = allocator("adalora").on(equal(LAYERS), STEPS)
    budget = lambda step: int(allocation.budget(step, allocation.constants))

    def check(step, before, after, memory):
        assert memory["kept"].sum() == budget(step)
        if step < 26:
            np.testing.assert_array_equal(after, before)
        else:
            np.testing.assert_array_equal(after, memory["kept"])

    last = [*simulate(allocation, check=check)][-1]
    assert last[1].sum() == 8
    assert allocation.average_budget() < allocation.average_forward_budget()
    hard = allocator("adalora", mode="hard").on(equal(LAYERS), STEPS)
    assert hard.average_budget() == hard.average_forward_budget()


@pytest.mark.parametrize("mode", ["hard", "revivable"])
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "all tied"])
def test_adalora_follows_a_reference_for_20_steps(mode, tied):
    """Scores, budgets and masks, from the paper's equations and code in float64."""
    slots, rng = equal(LAYERS), np.random.default_rng(1)
    fields = {"begin": 2, "end": 18, "every": 3, "mode": mode}
    allocation = allocator("adalora", **fields).on(slots, 20)
    constants = allocation.constants
    factors = factors_of(slots, rng)
    if tied:
        factors = jax.tree.map(jnp.ones_like, factors)
    memory, gates = allocation.init(factors), allocation.gates(constants)
    expected_gates = np.asarray(gates)
    assert expected_gates.sum() == 12, "1.5 times the rules' 8"
    history = []
    for step in range(20):
        due = step == 18 or (2 < step < 18 and (step - 2) % 3 == 0)
        assert bool(allocation.due(step, constants)) == due
        if due:
            p = min((step - 2) / 16, 1)
            count = int(8 + (12 - 8) * (1 - p) ** 3 + 1e-9)
            scores = np.concatenate(
                [
                    adalora(*zip(*[h[i] for h in history], strict=True), 0.85, 0.85)
                    for i in range(LAYERS)
                ]
            )
            kept = best(scores if not tied else np.ones(16), expected_gates, count)
            gates, memory = allocation.event(memory, gates, step, KEY, constants)
            np.testing.assert_array_equal(memory["kept"], kept)
            expected_gates = kept if mode == "hard" or step == 18 else expected_gates
        np.testing.assert_array_equal(gates, expected_gates)
        grads = factors_of(slots, rng)
        grads = jax.tree.map(jnp.ones_like, grads) if tied else grads
        given = {"factors": factors, "gradients": grads}
        memory = allocation.observe(memory, given, step, constants)
        row = []
        for i in range(LAYERS):
            (a, b), (da, db) = (
                [np.asarray(t[f"l{i}"][n], np.float64) for n in ("a", "b")]
                for t in (factors, grads)
            )
            none = np.zeros(4)
            row.append(((b.T, none, a), (db.T, none, da)))
        history.append(row)
    assert gates.sum() == 8


def trials_of():
    """Four trials of one program that differ in every number; the last one is fixed."""
    slots = equal(LAYERS)
    bounded = Slots(
        [
            dataclasses.replace(one, least=i % 2, most=4 - i % 2)
            for i, one in enumerate(slots.competitors)
        ]
    )
    return [
        allocator("fisher").on(slots, STEPS),
        allocator("fisher", budget=5, schedule="cosine", decay=0.5).on(bounded, STEPS),
        allocator("fisher", begin=0, end=39, every=7, start=1.5).on(slots, STEPS),
        allocator("given").on(slots, STEPS),
    ]


def test_a_pack_is_its_trials_one_by_one():
    """G5: events of trials that are not due leave them alone, to the bit."""
    each = trials_of()
    allocation, constants = pack(each)
    rng = np.random.default_rng(2)
    seen = jnp.asarray(rng.gamma(1.0, size=(STEPS, 4, 16)), jnp.float32)
    keys = jax.random.split(KEY, 4)
    start = lambda _: allocation.init()
    memory = jax.vmap(start)(jnp.arange(4))
    gates = jax.vmap(allocation.gates)(constants)
    move = jax.jit(lambda m, g, t: events(allocation, m, g, t, keys, constants))
    watch = jax.jit(
        lambda m, x, t: jax.vmap(
            lambda m, x, c: allocation.observe(m, {"gate_fisher": x}, t, c)
        )(m, x, constants)
    )
    alone = [(one.init(), one.gates(one.constants)) for one in each]
    for step in range(STEPS):
        gates, memory = move(memory, gates, jnp.int32(step))
        budgets = jax.vmap(lambda c, t=step: allocation.budget(t, c))(constants)
        np.testing.assert_array_equal(gates.sum(1), budgets)
        for trial, one in enumerate(each):
            own, held = alone[trial]
            if one.due(step, one.constants):
                held, own = one.event(own, held, step, keys[trial], one.constants)
            np.testing.assert_array_equal(gates[trial], held)
            given = {"gate_fisher": seen[step, trial]}
            if step % 2 == 0:
                own = one.observe(own, given, step, one.constants)
            alone[trial] = own, held
        if step % 2 == 0:
            memory = watch(memory, seen[step], jnp.int32(step))
    assert len({tuple(ranks_of(each[0].slots, g)) for g in gates}) == 4
    ranks = ranks_of(each[0].slots, gates[1])
    assert (ranks >= [0, 1, 0, 1]).all()
    assert (ranks <= [4, 3, 4, 3]).all()


def test_a_run_is_compiled_once():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    event = jax.jit(allocation.event)
    memory, gates = allocation.init(), allocation.gates(allocation.constants)
    given = {"gate_fisher": jnp.arange(16.0)}
    for step in range(0, STEPS, 5):
        memory = allocation.observe(memory, given, step, allocation.constants)
        gates, memory = event(memory, gates, jnp.int32(step), KEY, allocation.constants)
    assert event._cache_size() == 1


def test_a_run_that_is_resumed_has_identical_gates():
    """G6 as far as it is pure: what goes on is the memory, the gates and the step."""
    allocation = allocator("random").on(equal(LAYERS), STEPS)
    whole = [(g, m) for _, g, m in simulate(allocation)]
    gates, memory = whole[12]
    for step in range(13, STEPS):
        if allocation.due(step, allocation.constants):
            gates, memory = allocation.event(
                memory, gates, step, KEY, allocation.constants
            )
        np.testing.assert_array_equal(gates, whole[step][0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_importance_that_is_no_number_moves_nothing_and_says_so(value):
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    constants = allocation.constants
    memory, gates = allocation.init(), allocation.gates(constants)
    given = {"gate_fisher": jnp.arange(16.0).at[3].set(value)}
    memory = allocation.observe(memory, given, 0, constants)
    new, memory = allocation.event(memory, gates, 26, KEY, constants)
    np.testing.assert_array_equal(new, gates)
    assert not memory["sound"]
    # It stays so, whatever is seen later.
    _, memory = allocation.event(memory, gates, 26, KEY, constants)
    assert not memory["sound"]
    # A shut component is none of its business.
    shut = gates.at[3].set(0)
    fresh = allocation.observe(allocation.init(), given, 0, constants)
    new, fresh = allocation.event(fresh, shut, 26, KEY, constants)
    assert fresh["sound"]
    assert new.sum() == 8


def test_an_event_before_any_measurement_is_not_sound():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    gates = allocation.gates(allocation.constants)
    new, memory = allocation.event(
        allocation.init(), gates, 9, KEY, allocation.constants
    )
    assert not memory["sound"]
    np.testing.assert_array_equal(new, gates)


def test_measurements_stop_when_ranks_stand_still():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    found = [t for t in range(STEPS) if allocation.measures(t, allocation.constants)]
    assert found == [*range(0, 26, 2)]
    assert not allocator("eva").on(equal(LAYERS), STEPS).measures(0, {})


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
    ("fisher", {"start": 3.0}, "the first budget = 24"),
    ("fisher", {"start": 0.5}, "only prunes"),
    ("fisher", {"budget": 16}, "there are no more"),
    ("fisher", {"end": 40}, "run of 40"),
    ("fisher", {"end": 2.0}, "no fraction"),
    ("fisher", {"begin": 0, "end": 0}, "before the first step"),
    ("fisher", {"measure_every": 0}, "measured in training"),
    ("fisher", {"measure_every": 6}, "ranks.measure_every = 6"),
    ("fisher", {"decay": 1.0}, r"ranks.decay = 1\.0"),
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
    ("given", {"ranks": {**NAMED, "l9": 1}}, "'l9'.*Nearest: 'l"),
    ("given", {"ranks": {**NAMED, "l0": 5}}, "'l0' has rank 5"),
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


def test_signals_that_cannot_be_measured_are_named():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    assert allocation.needs == {"gate_fisher"}
    with pytest.raises(
        BadInput, match="'gate_fisher', which cannot be measured for VeRA"
    ):
        allocation.check_available({"norms"}, "VeRA")
    with pytest.raises(BadInput, match="it offers none"):
        allocation.observe(allocation.init(), {}, 0, allocation.constants)


def test_trials_that_differ_in_more_than_numbers_share_no_program():
    slots = equal(LAYERS)
    one, two = (allocator(n).on(slots, STEPS) for n in ("fisher", "norm"))
    with pytest.raises(BadInput, match="trial 1 allocates ranks by"):
        pack([one, two])
    with pytest.raises(BadInput, match="trial 1 holds other components"):
        pack([one, allocator("fisher").on(equal(LAYERS, max_rank=5), STEPS)])
    with pytest.raises(BadInput, match="trial 1 counts its budget in parameters"):
        pack([one, allocator("uniform", unit="parameters").on(slots, STEPS)])
    with pytest.raises(BadInput, match="another number of steps"):
        pack([one, allocator("fisher").on(slots, STEPS + 1)])


def test_recipes_are_compositions_and_hash_as_what_they_say():
    assert allocator("fisher").importance == "fisher"
    crossed = allocator("adalora", importance="fisher", mode="hard")
    assert crossed.on(equal(LAYERS), STEPS).needs == {"gate_fisher"}
    assert digest(crossed) != digest(allocator("adalora"))
    with pytest.raises(UnknownName, match="Nearest: 'adalora'"):
        allocator("adalore")
