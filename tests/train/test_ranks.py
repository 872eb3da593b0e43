"""Ranks move before the step they are named by, and nothing else moves with them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.allocate.fixed import Uniform
from lowrank.allocate.recipes import (
    AdaLoRA,
    EffectiveRank,
    Growth,
    Norm,
    Random,
    Squeeze,
)
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA
from lowrank.run.forward import inputs_of
from lowrank.run.ranks import gauges, moves, rank_events, slots_of
from lowrank.train import state as states
from lowrank.train.aging import Aged
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step

STEPS = 24
WINDOW = {"begin": 2, "end": 17, "every": 3, "measure_every": 2}
OPTIM = AdamW(lr=1e-2, warmup=0.0, schedule="constant", weight_decay=0.1)
LAYERS, RANK, HELD = 3, 2, 5


def apply(params, batch):
    x = params["embed"][batch["ids"]].mean(axis=1)

    def layer(x, w):
        return jnp.tanh(x @ w) + x, None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    return jnp.tanh(x @ params["up"]) @ params["head"]


def make(delta=None):
    keys = jax.random.split(jax.random.key(0), 3)
    width = toy.WIDTH
    params = {
        "embed": jax.random.normal(keys[0], (toy.VOCAB, width)),
        "stack": jax.random.normal(keys[1], (LAYERS, width, width)) / np.sqrt(width),
        "up": jax.random.normal(keys[2], (width, toy.HIDDEN)) / np.sqrt(width),
        "head": jnp.zeros((toy.HIDDEN, toy.CLASSES)),
    }
    rules = [
        Train("head", init="dense"),
        Rule("{stack,up}", delta or LoRA(), rank=RANK, max_rank=HELD),
    ]
    return attach(apply, params, inputs_of(toy.batch(0)), rules=rules)


class World:
    """A pack whose ranks move, step by step."""

    def __init__(
        self, *allocators, seeds=None, optims=None, loss=cross_entropy, delta=None,
        adapted=None,
    ):  # fmt: skip
        self.adapted = adapted or make(delta)
        count = len(allocators)
        self.seeds = list(range(count)) if seeds is None else seeds
        optims = optims or [OPTIM] * count
        model = toy.model_of(self.adapted)
        slots = [slots_of(self.adapted)] * count
        self.ranks = rank_events(
            self.adapted, allocators, slots, STEPS, gauges(model, loss)
        )
        births = self.ranks.births
        step = make_step(
            model, loss, optims[0], STEPS, False, self.adapted.active,
            roles=self.adapted.roles(), ages=births,
            tells=self.ranks.of_step,
        )  # fmt: skip
        dials = self.ranks.opened([self.adapted.dials()] * count)
        self.state = states.start(
            self.adapted.init_trained, dials, optims, self.seeds,
            roles=self.adapted.roles(), ages=births, ranks=self.ranks.begin,
        )  # fmt: skip
        self.traced = 0

        def counted(*given):
            self.traced += 1
            return over_trials(step, count, ranks=self.ranks)(*given)

        self.packed = jax.jit(counted)
        self.frozen = self.adapted.frozen()

    def batch(self, at):
        return toy.on_device(
            toy.stack([toy.batch(100 * at + seed) for seed in self.seeds])
        )

    def states(self, start=0, steps=STEPS):
        """The state before and after every step, with what the step reported."""
        for at in range(start, steps):
            before = self.state
            self.state, metrics = self.packed(self.frozen, before, self.batch(at))
            yield at, before, self.state, jax.device_get(metrics)

    def run(self, **more):
        for _ in self.states(**more):
            pass
        return self.state

    def flat(self, state, trial=0):
        slots = self.ranks.allocation.slots
        gates = {p: state.dials[p]["gate"][trial] for p in slots.paths}
        return np.asarray(slots.flat(gates))

    def constants(self, trial=0):
        return {n: x[trial] for n, x in self.ranks.constants.items()}


def norms_of(state, trial=0):
    """|c| |a| |b| of every component, in NumPy."""
    found = []
    for path in ("stack", "up"):
        own = {
            n: np.asarray(x[trial], np.float64) for n, x in state.trained[path].items()
        }
        c = np.asarray(
            state.dials[path]["gate"][trial] * state.dials[path]["scale"][trial]
        )
        length = lambda x: np.sqrt((x**2).sum(axis=-1))
        found.append((np.abs(c) * length(own["a"]) * length(own["b"])).reshape(-1))
    return np.concatenate(found)


def best(values, open_, count):
    order = sorted(np.flatnonzero(open_), key=lambda j: (-values[j], j))
    gates = np.zeros(len(values))
    gates[order[:count]] = 1
    return gates


def test_gates_are_a_replay_of_the_allocator_on_the_host():
    world = World(Norm(**WINDOW))
    constants = world.constants()
    mean, count, decay = 0.0, 0, 0.9
    total, events = LAYERS * HELD + HELD, []
    gates = np.ones(total)
    for at, before, after, metrics in world.states():
        if constants["due"][at]:
            budget = int(constants["budget"][at])
            seen = mean / (1 - decay**count)
            gates = best(seen, gates, budget)
            events.append(at)
        np.testing.assert_array_equal(world.flat(after), gates)
        budget = int(constants["budget"][at])
        assert gates.sum() == metrics["ranks/budget"][0] == budget
        assert metrics["ranks/forward_budget"][0] == budget
        assert metrics["sound"][0]
        if at % 2 == 0 and at < 17:
            # Of the factors before the update, under the gates of the step.
            shown = before.replace(dials=after.dials)
            mean, count = decay * mean + (1 - decay) * norms_of(shown), count + 1
    assert events == [5, 8, 11, 14, 17]
    assert gates.sum() == RANK * (LAYERS + 1), "the budget of the fixed run"
    history = world.state.ranks["history"]
    assert int(history["count"][0]) == len(events)
    ranks = np.asarray(history["ranks"][0])
    assert ranks.sum(axis=1).tolist() == [int(constants["budget"][t]) for t in events]
    assert ranks[-1].tolist() == [
        *gates[: LAYERS * HELD].reshape(LAYERS, HELD).sum(axis=1),
        gates[LAYERS * HELD :].sum(),
    ]
    assert world.traced == 1


class Unwatched(LoRA):
    axes: ClassVar = {n: own for n, own in LoRA.axes.items() if n != "gram"}


class Bent(LoRA):
    linear: ClassVar = {}


@pytest.mark.parametrize(
    ("delta", "allocator", "said"),
    [
        (Unwatched, Norm(importance="activation"), "Unwatched has no dial 'gram'"),
        (Bent, Random(), "not linear in a factor along the outputs"),
    ],
)
def test_a_delta_that_cannot_be_measured_or_moved_is_refused(delta, allocator, said):
    with pytest.raises(BadInput, match=said):
        World(allocator, delta=delta())


def test_sites_may_be_called_as_factors_are():
    """What an importance remembers of a site is by factor: no vector of components."""
    keys = jax.random.split(jax.random.key(0), 2)
    width = toy.WIDTH
    params = {
        "a": jax.random.normal(keys[0], (toy.VOCAB, width)),
        "b": jax.random.normal(keys[1], (width, toy.CLASSES)),
    }
    rules = [Rule("{a,b}", LoRA(), rank=RANK, max_rank=HELD)]
    called = lambda p, batch: p["a"][batch["ids"]].mean(axis=1) @ p["b"]
    adapted = attach(called, params, inputs_of(toy.batch(0)), rules=rules)
    world = World(AdaLoRA(**{**WINDOW, "mode": "hard"}), adapted=adapted)
    state = world.run()
    assert world.flat(state).sum() == 2 * RANK


def test_a_correction_without_gates_does_not_compete():
    adapted = make()
    dials = {path: {"scale": own["scale"]} for path, own in adapted.dials().items()}
    with pytest.raises(BadInput, match="by LoRA has none: set ranks=uniform"):
        slots_of(adapted, dials)


def test_what_nobody_asked_for_is_not_measured(monkeypatch):
    def never(*given):
        raise AssertionError("measured")

    for name in ("spectra", "energies"):
        monkeypatch.setattr(f"lowrank.train.ranks.signals.{name}", never)
    assert World(Norm(**WINDOW)).run(steps=1)
    with pytest.raises(AssertionError, match="measured"):
        World(Squeeze(**WINDOW)).run(steps=1)


def test_shut_components_stand_still_with_their_moments():
    world = World(Norm(**WINDOW))
    frozen = 0
    for _, before, after, _ in world.states():
        for path in ("stack", "up"):
            shut = np.asarray(after.dials[path]["gate"]) == 0
            trees = [
                (
                    s.trained[path],
                    *(
                        m[path]
                        for m in jax.tree.leaves(
                            s.opt, is_leaf=lambda x: isinstance(x, dict) and path in x
                        )
                        if isinstance(m, dict)
                    ),
                )
                for s in (before, after)
            ]
            assert len(trees[0]) == 3, "factors and two moments"
            for one, two in zip(*trees, strict=True):
                for name in ("a", "b"):
                    np.testing.assert_array_equal(
                        np.asarray(one[name])[shut], np.asarray(two[name])[shut]
                    )
            frozen += shut.sum()
    assert frozen > 0


def test_the_first_update_after_a_birth_is_the_rate():
    still = dataclasses.replace(OPTIM, weight_decay=0.0, clip=None)
    world = World(Growth(importance="norm", **WINDOW), optims=[still])
    seen = 0
    for _, before, after, _ in world.states():
        for path in ("stack", "up"):
            gates = [np.asarray(s.dials[path]["gate"]) for s in (before, after)]
            born = (gates[0] == 0) & (gates[1] != 0)
            seen += born.sum()
            moved = np.asarray(after.trained[path]["b"])[born]
            np.testing.assert_allclose(np.abs(moved), still.lr, rtol=1e-3)
            (aged,) = [x for x in after.opt if isinstance(x, Aged)]
            assert (np.asarray(aged.age[path]["b"])[born] == 1).all()
    assert seen == RANK * (LAYERS + 1) // 2
    assert world.flat(world.state).sum() == RANK * (LAYERS + 1)


def test_a_birth_changes_no_output():
    world = World(Growth(importance="norm", **WINDOW))
    batch = inputs_of(toy.on_device(toy.batch(7)))
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    output = jax.jit(
        lambda s: world.adapted.apply(
            world.frozen, first(s.trained), batch, dials=first(s.dials)
        )
    )
    events = 0
    for at, before, _, _ in world.states():
        if world.constants()["due"][at]:
            moved = world.ranks.before(before)
            born = world.flat(moved) > world.flat(before)
            np.testing.assert_array_equal(output(moved), output(before))
            events += born.sum()
    assert events == RANK * (LAYERS + 1) // 2


@pytest.mark.parametrize(
    "allocator",
    [
        Norm(**WINDOW),
        Random(**WINDOW, mode="revivable"),
        Growth(**WINDOW, importance="norm"),
        Random(**WINDOW, selector="swap", start=1.0, schedule="constant"),
    ],
    ids=["prune", "revive", "grow", "swap"],
)
def test_the_history_tells_what_each_event_added(allocator):
    world = World(allocator)
    slots = world.ranks.allocation.slots
    by_layer = lambda x: [x[slots.layer == n].sum() for n in range(slots.num_layers)]

    def kept(state):
        parts = state.ranks["memory"]["kept"]
        return np.asarray(slots.flat({p: parts[p][0] for p in slots.paths})) != 0

    expected, ranks, now = [], [], world.flat(world.state) != 0
    for at, _, after, _ in world.states():
        if world.constants()["due"][at]:
            was, now = now, kept(after) & (world.flat(after) != 0)
            expected.append(by_layer(now & ~was))
            ranks.append(by_layer(now))
    history = jax.tree.map(lambda x: np.asarray(x[0]), world.state.ranks["history"])
    np.testing.assert_array_equal(history["gained"], expected)
    np.testing.assert_array_equal(history["ranks"], ranks)
    told = moves(world.ranks, world.state, 0)
    assert [*zip(*told["gained"].values(), strict=True)] == [*map(tuple, expected)]
    assert told["sites"]["stack"]["layers"] == LAYERS
    budget = world.constants()["budget"]
    assert told["target"] == [budget[t] for t in (0, 5, 8, 11, 14, 17)]
    assert world.traced == 1
    gains = np.sum(expected)
    assert (gains == 0) == (allocator.selector == "top" and allocator.mode == "hard")


@pytest.mark.slow  # The replay of a Fisher pack in test_probes.py has two schedules.
def test_a_pack_of_other_schedules_is_each_alone():
    other = {"begin": 4, "end": 13, "every": 4, "schedule": "linear", "decay": 0.5}
    one, two = Norm(**WINDOW), Norm(**{**WINDOW, **other})
    together = World(one, two, Uniform(), seeds=[3, 1, 4])
    state = together.run()
    for trial, (allocator, seed) in enumerate([(one, 3), (two, 1)]):
        alone = World(allocator, seeds=[seed])
        own = alone.run()
        np.testing.assert_array_equal(
            together.flat(state, trial), alone.flat(own), strict=True
        )
        count = int(own.ranks["history"]["count"][0])
        assert count == int(state.ranks["history"]["count"][trial])
        np.testing.assert_array_equal(
            state.ranks["history"]["ranks"][trial, :count],
            own.ranks["history"]["ranks"][0, :count],
        )
        for a, b in zip(
            jax.tree.leaves(state.trained), jax.tree.leaves(own.trained), strict=True
        ):
            np.testing.assert_allclose(a[trial], b[0], rtol=1e-4, atol=1e-6)
    fixed = together.flat(state, 2)
    assert fixed.sum() == RANK * (LAYERS + 1)
    assert int(state.ranks["history"]["count"][2]) == 0
    assert together.traced == 1


def test_a_trial_that_has_ended_neither_observes_nor_moves():
    world = World(Norm(**WINDOW), Norm(**WINDOW))
    for at, before, after, _ in world.states():
        if at > 6:
            old, new = (
                jax.tree.map(lambda x: x[1], (s.ranks, s.dials))
                for s in (before, after)
            )
            jax.tree.map(np.testing.assert_array_equal, old, new)
        if at == 6:
            world.state = after.replace(live=jnp.array([True, False]))
    assert world.flat(world.state, 0).sum() == RANK * (LAYERS + 1)
    assert world.flat(world.state, 1).sum() > RANK * (LAYERS + 1)


def test_a_step_that_is_not_finite_tells_nothing():
    world = World(Norm(**WINDOW))
    world.run(steps=4)
    batch = {**world.batch(4), "weight": jnp.full((1, 8), jnp.nan)}
    after, metrics = world.packed(world.frozen, world.state, batch)
    assert not metrics["finite"][0]
    jax.tree.map(
        np.testing.assert_array_equal,
        after.ranks["memory"],
        world.state.ranks["memory"],
    )


def test_an_importance_that_is_no_number_moves_nothing_and_says_so():
    world = World(Norm(**WINDOW))
    world.run(steps=4)
    spoilt = jax.tree.map(lambda x: x, world.state.ranks)
    mean = spoilt["memory"]["importance"]["mean"]["up"]
    spoilt["memory"]["importance"]["mean"]["up"] = mean.at[0, 0].set(jnp.nan)
    world.state = world.state.replace(ranks=spoilt)
    before = world.flat(world.state)
    for at, _, after, metrics in world.states(start=4, steps=8):
        assert bool(metrics["sound"][0]) == (at < 5)
        np.testing.assert_array_equal(world.flat(after), before)


@pytest.mark.parametrize(
    "allocator",
    [
        EffectiveRank(**WINDOW),
        EffectiveRank(**WINDOW, importance="stable_rank"),
        Norm(**WINDOW, selector="proportional"),
        Norm(**WINDOW, selector="variance", threshold=0.9),
        Norm(**WINDOW, normaliser="layer"),
        Norm(**WINDOW, importance="gradient"),
    ],
    ids=["effective", "stable", "proportional", "variance", "normaliser", "gradient"],
)
def test_every_piece_runs_in_the_step_and_keeps_its_budget(allocator):
    world = World(allocator)
    budget = world.constants()["budget"]
    for at, _, after, metrics in world.states():
        assert metrics["sound"][0]
        ceiling = allocator.selector == "variance"
        total = world.flat(after).sum()
        assert total <= budget[at] if ceiling else total == budget[at]
    assert int(world.state.ranks["history"]["count"][0]) == 5
    assert world.traced == 1


def test_who_returns_after_training_is_newborn_again():
    """A component that was trained, died and is opened again has age and moments 0."""
    still = dataclasses.replace(OPTIM, weight_decay=0.0, clip=None)
    often = {**WINDOW, "every": 1, "measure_every": 1, "pool": 1}
    swaps = Random(**often, selector="swap", start=1.0, schedule="constant", moves=3)
    world, returned = World(swaps, optims=[still]), 0
    lived = {"stack": np.zeros((LAYERS, HELD), bool), "up": np.zeros(HELD, bool)}
    for _, before, after, _ in world.states():
        (aged,) = [x for x in after.opt if isinstance(x, Aged)]
        for path in ("stack", "up"):
            was, now = (
                np.asarray(s.dials[path]["gate"][0]) != 0 for s in (before, after)
            )
            lived[path] |= was
            again = now & ~was & lived[path]
            if not again.any():
                continue
            returned += again.sum()
            assert (np.asarray(aged.age[path]["b"][0])[again] == 1).all()
            moved = np.asarray(after.trained[path]["b"][0])[again]
            # Its first update, from zero: the rate, whatever its moments were.
            np.testing.assert_allclose(np.abs(moved), still.lr, rtol=1e-3)
    assert returned > 0
