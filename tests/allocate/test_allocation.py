"""The contract that training calls, for every allocator of the catalogue."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import best, equal, ranks_of
from simulated import (
    KEY,
    LAYERS,
    STEPS,
    allocator,
    factors_of,
    signals_of,
    simulate,
)
from test_importance import adalora

from lowrank.allocate.allocation import pack
from lowrank.allocate.catalogue import CATALOGUE
from lowrank.allocate.slots import Competitor, Slots
from lowrank.core.errors import BadInput


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


@pytest.mark.parametrize("name", ["fisher", "adalora", "growth", "effective_rank"])
@pytest.mark.parametrize("alone", [0, 1], ids=["pairs", "pairs and one alone"])
def test_a_budget_of_tied_layers_is_not_exceeded(name, alone):
    """At most the budget is open, with less left than a pair counts."""
    sites = [
        Competitor(path=f"l{i}", max_rank=4, cost=8, ranks=2, group=f"pair {i % 2}")
        for i in range(4)
    ] + [Competitor(path="o", max_rank=4, cost=8, ranks=2)] * alone
    # A layer that began without a component would never gain one.
    more = {"start": 0.75} if name == "growth" else {}
    allocation = allocator(name, budget=7, **more).on(Slots(sites), STEPS)
    bounds, spent = [], []
    for step, gates, memory in simulate(allocation):
        bounds.append(int(allocation.forward_budget(step, allocation.constants)))
        spent.append(int(gates.sum()))
        ranks = ranks_of(allocation.slots, gates)
        np.testing.assert_array_equal(ranks[:2], ranks[2:4])
        assert memory["sound"]
    left = np.array(bounds) - spent
    assert (left >= 0).all()
    assert (left < 2).all()
    if not alone:
        np.testing.assert_array_equal(left, np.array(bounds) % 2)
        assert left[-1] == 1, "no pair fits into the last one"
    average = allocation.average_forward_budget()
    assert average == pytest.approx(np.mean(bounds))
    assert np.mean(spent) <= average


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
        allocator("fisher", basis="own").on(slots, STEPS),
        allocator("fisher", basis="own", budget=5, schedule="cosine", decay=0.5).on(
            bounded, STEPS
        ),
        allocator("fisher", basis="own", begin=0, end=39, every=7, start=1.5).on(
            slots, STEPS
        ),
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

    def event(memory, gates, step, key, own):
        """As a pack does it: only trials that are due move."""
        new = allocation.event(memory, gates, step, key, own)
        due = allocation.due(step, own)
        return jax.tree.map(lambda n, o: jnp.where(due, n, o), new, (gates, memory))

    mapped = jax.vmap(event, in_axes=(0, 0, None, 0, 0))
    move = jax.jit(lambda m, g, t: mapped(m, g, t, keys, constants))
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
    given = dict.fromkeys(("gate_fisher", "norms", "spectrum"), jnp.arange(16.0))
    for step in range(0, STEPS, 5):
        memory = allocation.observe(memory, given, step, allocation.constants)
        gates, memory = event(memory, gates, jnp.int32(step), KEY, allocation.constants)
    assert event._cache_size() == 1


def kept_as_numbers(tree):
    """What a checkpoint holds of a tree: its leaves as NumPy arrays, in order."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def read_as(tree, leaves):
    """The leaves in the structure of a tree that was made anew."""
    fresh, structure = jax.tree.flatten(tree)
    assert [(x.shape, x.dtype) for x in fresh] == [(x.shape, x.dtype) for x in leaves]
    return structure.unflatten([jnp.asarray(x) for x in leaves])


@pytest.mark.parametrize("name", ["fisher", "effective_rank", "adalora", "random"])
def test_a_run_that_is_resumed_has_identical_gates(name):
    """G6 as far as it is pure: what goes on is the memory, the gates and the step."""
    slots, rng = equal(LAYERS), np.random.default_rng(0)
    factors = factors_of(slots, rng)
    needs = allocator(name).on(slots, STEPS).needs
    every = jnp.ones(slots.num_components)
    seen = [signals_of(slots, rng, needs, every) for _ in range(STEPS)]

    def run(memory, gates, first, last):
        # A resumed run makes its allocator anew, from the config.
        allocation = allocator(name).on(slots, STEPS)
        constants = allocation.constants
        memory = allocation.init(factors) if memory is None else memory
        gates = allocation.gates(constants) if gates is None else gates
        course = []
        for step in range(first, last):
            if allocation.due(step, constants):
                gates, memory = allocation.event(memory, gates, step, KEY, constants)
            if allocation.measures(step, constants):
                memory = allocation.observe(memory, seen[step], step, constants)
            course += [gates, memory["kept"]]
        return memory, gates, np.array(course)

    # Between events, with measurements since the last one.
    memory, gates, _ = run(None, None, 0, 12)
    whole = run(memory, gates, 12, STEPS)
    fresh = allocator(name).on(slots, STEPS).init(factors)
    again = read_as(fresh, kept_as_numbers(memory)), jnp.asarray(np.array(gates))
    resumed = run(*again, 12, STEPS)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    lost = {**memory, "importance": fresh["importance"]}
    forgetful = run(lost, gates, 12, STEPS)
    decides = (forgetful[-1] != whole[-1]).any()
    assert decides == bool(needs), "else the memory would not be tested"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_importance_that_is_no_number_moves_nothing_and_says_so(value):
    allocation = allocator("fisher", basis="own").on(equal(LAYERS), STEPS)
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


@pytest.mark.parametrize("left", [1.0, np.nan], ids=["remembered", "no number"])
def test_a_layer_that_has_shrunk_does_not_lose_for_it(left):
    """Four alike that use their two directions equally: what two lost plays no part."""
    allocation = allocator("effective_rank").on(equal(LAYERS), STEPS)
    constants = allocation.constants
    norms = jnp.array([[1, 1, left, left]] * 2 + [[1, 1, 0, 0]] * 2, jnp.float32)
    given = {"norms": norms.ravel(), "spectrum": jnp.tile(jnp.array([1.0, 1, 0, 0]), 4)}
    memory = allocation.observe(allocation.init(), given, 0, constants)
    gates = allocation.gates(constants)
    np.testing.assert_array_equal(gates.reshape(4, 4), [[1, 1, 0, 0]] * 4)
    new, memory = allocation.event(memory, gates, 9, KEY, constants)
    assert memory["sound"]
    assert ranks_of(allocation.slots, new).tolist() == [2, 2, 2, 2]


def test_an_event_before_any_measurement_is_not_sound():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    gates = allocation.gates(allocation.constants)
    new, memory = allocation.event(
        allocation.init(), gates, 9, KEY, allocation.constants
    )
    assert not memory["sound"]
    np.testing.assert_array_equal(new, gates)


def test_what_is_measured_once_is_observed_before_the_loop():
    """No step measures it, and EVA's one event is before the first of them."""
    allocation = allocator("eva").on(equal(LAYERS), STEPS)
    constants = allocation.constants
    assert allocation.needs
    assert allocation.measure_every == 0
    steps = range(STEPS)
    assert not any(allocation.measures(step, constants) for step in steps)
    assert [step for step in steps if allocation.due(step, constants)] == [0]
    given = {"variance": jnp.arange(16.0)}
    gates = allocation.gates(constants)
    for before, sound in ((True, True), (False, False)):
        memory = allocation.init()
        if before:
            memory = allocation.observe(memory, given, 0, constants)
        new, memory = allocation.event(memory, gates, 0, KEY, constants)
        assert memory["sound"] == sound
        assert (new != gates).any() == sound


def test_measurements_stop_when_ranks_stand_still():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    found = [t for t in range(STEPS) if allocation.measures(t, allocation.constants)]
    assert found == [*range(0, 26, 2)]
    assert not allocator("eva").on(equal(LAYERS), STEPS).measures(0, {})


def test_signals_that_cannot_be_measured_are_named():
    allocation = allocator("fisher").on(equal(LAYERS), STEPS)
    assert allocation.needs == {"gate_fisher", "norms", "spectrum"}
    refused = "'gate_fisher', which cannot be measured for VeRA.*ranks.importance"
    with pytest.raises(BadInput, match=refused):
        allocation.check_available({"norms"}, "VeRA")
    with pytest.raises(BadInput, match=r"'norms'.*Set ranks\.basis=own"):
        allocation.check_available({"gate_fisher"}, "VeRA")
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
