"""What a pass back tells of components: by differences, by loops, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_ranks import HELD, LAYERS, OPTIM, RANK, STEPS, WINDOW, World, best, make

from lowrank.allocate.adaptive import Adaptive
from lowrank.allocate.recipes import AdaLoRA, Fisher
from lowrank.allocate.signals import energies
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA
from lowrank.train import state as states
from lowrank.train.examples import check_examples_apart
from lowrank.train.losses import cross_entropy
from lowrank.train.penalties import Imposed, Penalties, impose
from lowrank.train.probes import OF_EXAMPLES, OF_INPUTS, OF_PASS
from lowrank.train.step import make_step

pytestmark = pytest.mark.long

CONSTANTS = {"label_smoothing": jnp.float32(0.1)}


def disturbed(trained):
    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        [
            x + 0.3 * jax.random.normal(k, x.shape)
            for k, x in zip(keys, leaves, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def world():
    adapted = make()
    frozen, trained = adapted.init(jax.random.key(0))
    return adapted, frozen, disturbed(trained), adapted.dials()


def loss_of(world, batch):
    adapted, frozen, trained, dials = world
    model, batch = toy.model_of(adapted), toy.on_device(batch)

    def loss(gates):
        own = {path: {**dials[path], "gate": gate} for path, gate in gates.items()}
        outputs = model(frozen, trained, batch, dials=own, key=None)
        return cross_entropy(outputs, batch, CONSTANTS)

    return jax.jit(loss), {path: own["gate"] for path, own in dials.items()}


def trial(world, imposed=Imposed(), weights=(), optim=OPTIM):
    """The state of one trial, disturbed as the world's."""
    adapted, _, trained, dials = world
    state = states.start(adapted.init_trained, dials, [optim], [0], weights=weights)
    first = lambda x: x[0]
    fields = {
        name: value if name == "step" else jax.tree.map(first, value)
        for name, value in vars(state).items()
    }
    smooth = {**fields["constants"], **CONSTANTS}
    return states.TrainState(**{**fields, "trained": trained, "constants": smooth})


def stepped(world, batch, measures=True, tells=OF_EXAMPLES, imposed=Imposed(), **more):
    """What a step does and tells; `more` goes into its optimizer."""
    adapted, frozen, *_ = world
    optim = dataclasses.replace(OPTIM, **more)
    weights = [dict.fromkeys(imposed.names, 0.1)] if imposed.names else ()
    step = make_step(
        toy.model_of(adapted), cross_entropy, optim, STEPS, adapted.draws,
        adapted.active, imposed, tells=tells,
    )  # fmt: skip
    given = frozen, trial(world, imposed, weights, optim), toy.on_device(batch)
    return jax.jit(step)(*given, *([jnp.bool_(measures)] if tells else []))


def measured(world, batch, **more):
    return stepped(world, batch, **more)[2]


def by_hand(world, batch, rows, keys=None):
    """Sums of slopes and of their squares, row after row."""
    adapted, frozen, trained, dials = world
    model = toy.model_of(adapted)

    @jax.jit
    def slope(row, key):
        def loss(gates):
            own = {path: {**dials[path], "gate": gate} for path, gate in gates.items()}
            outputs = model(frozen, trained, row, dials=own, key=key)
            return cross_entropy(outputs, row, CONSTANTS).loss

        return jax.grad(loss)({path: own["gate"] for path, own in dials.items()})

    each = [
        slope(
            toy.on_device({name: x[row : row + 1] for name, x in batch.items()}),
            None if keys is None else keys[row],
        )
        for row in range(rows)
    ]
    total = jax.tree.map(lambda *g: sum(g), *each)
    return total, jax.tree.map(lambda *g: sum(x**2 for x in g), *each)


def test_the_gate_gradient_is_the_slope_of_the_loss(world):
    batch = toy.batch(3)
    found = measured(world, batch)["gate_gradient"]
    loss, gates = loss_of(world, batch)
    for path, at in (("stack", (1, 1)), ("stack", (2, 0)), ("up", (1,)), ("up", (3,))):
        values = [
            float(loss({**gates, path: gates[path].at[at].add(step)}).loss) / 8
            for step in (1e-2, -1e-2)
        ]
        slope = (values[0] - values[1]) / 2e-2
        assert float(found[path][at]) == pytest.approx(slope, rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gate_fisher_is_a_loop_over_examples(world, accumulate):
    batch = toy.batch(5, padding=2)
    found = measured(world, batch, accumulate=accumulate)
    total, squares = by_hand(world, batch, 6)
    for path in ("stack", "up"):
        for name, sums in (("gate_gradient", total), ("gate_fisher", squares)):
            np.testing.assert_allclose(
                found[name][path], sums[path] / 6, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_that_measures_trains_as_one_that_does_not(world, accumulate):
    batch, more = toy.batch(5, padding=2), {"accumulate": accumulate}
    plain, metrics = stepped(world, batch, tells=(), **more)
    still, at_rest, nothing = stepped(world, batch, False, **more)
    after, told, _ = stepped(world, batch, **more)
    same = np.testing.assert_array_equal
    jax.tree.map(same, (still.trained, at_rest), (plain.trained, metrics))
    assert not any(x.any() for x in jax.tree.leaves(nothing))
    # Rows one by one sum in another order: float32, and a few hundred terms.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    moved = lambda s: jax.tree.map(jnp.subtract, s.trained, world[2])
    jax.tree.map(close, (moved(after), told), (moved(plain), metrics))


def test_the_drift_has_no_say_in_what_a_gate_is_worth(world):
    batch = toy.batch(5)
    imposed = impose([Penalties(drift=0.1)], world[0].sites, world[0].thin)
    after, metrics, found = stepped(world, batch, imposed=imposed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        found, measured(world, batch),
    )  # fmt: skip
    plain, alike = stepped(world, batch, tells=(), imposed=imposed)
    assert float(alike["penalty/drift"]) > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (after.trained, metrics), (plain.trained, alike),
    )  # fmt: skip


def test_every_example_draws_for_itself():
    adapted = make(LoRA(dropout=0.3, rank_dropout=0.3))
    frozen, trained = adapted.init(jax.random.key(0))
    world = adapted, frozen, disturbed(trained), adapted.dials()
    batch = toy.batch(5)
    state = trial(world)
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 8)
    found = measured(world, batch)
    _, squares = by_hand(world, batch, 8, keys)
    for path in ("stack", "up"):
        np.testing.assert_allclose(
            found["gate_fisher"][path], squares[path] / 8, rtol=1e-4, atol=1e-5
        )
    assert not jnp.allclose(
        found["gate_fisher"]["up"], by_hand(world, batch, 8)[1]["up"] / 8
    )


def test_activations_are_second_moments_of_inputs_in_rank_space(world):
    """Against the model by hand in NumPy; rows without weight are not in it."""
    _, _, trained, dials = world
    batch = toy.batch(5, padding=3)
    found = measured(world, batch, tells=OF_INPUTS)["activations"]
    params = {n: np.asarray(x, np.float64) for n, x in world[1].items()}
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(trained))
    c = {p: np.asarray(d["gate"] * d["scale"]) for p, d in dials.items()}
    x = params["embed"][batch["ids"]].mean(axis=1)[:5]
    for layer in range(LAYERS):
        a, b = (own["stack"][name][layer] for name in ("a", "b"))
        u = x @ a.T
        np.testing.assert_allclose(
            found["stack"][layer], u.T @ u / 5, rtol=1e-4, atol=1e-5
        )
        x = np.tanh(x @ params["stack"][layer] + (u * c["stack"][layer]) @ b) + x
    u = x @ own["up"]["a"].T
    np.testing.assert_allclose(found["up"], u.T @ u / 5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{"accumulate": 4}, {"tells": OF_PASS}])
def test_activations_do_not_depend_on_how_a_batch_is_gone_through(world, more):
    batch = toy.batch(5, padding=2)
    one = measured(world, batch, tells=OF_INPUTS)["activations"]
    other = measured(world, batch, **{"tells": OF_INPUTS, **more})["activations"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other
    )


def test_energies_are_what_components_add_to_outputs(world):
    _, _, trained, dials = world
    terms = world[0].thin()["stack"].terms(trained["stack"], dials["stack"])
    x = np.random.default_rng(0).normal(size=(7, toy.WIDTH))
    u = np.einsum("ti,lri->ltr", x, terms.a)
    gram = jnp.asarray(np.einsum("ltr,lts->lrs", u, u), jnp.float32)
    added = np.einsum("ltr,lr,lro->ltro", u, terms.c, terms.b)
    np.testing.assert_allclose(
        energies(terms, gram), (added**2).sum(axis=(1, 3)), rtol=1e-4
    )


def test_models_that_couple_examples_are_refused(world):
    adapted, frozen, _, dials = world
    model = toy.model_of(adapted)
    trees = frozen, adapted.init_trained(jax.random.key(0)), dials, CONSTANTS
    batch = toy.batch(1)
    check_examples_apart(model, cross_entropy, *trees, batch)

    def normed(frozen, trained, batch, dials, key):
        x = model(frozen, trained, batch, dials=dials, key=key)
        return (x - x.mean(axis=0, keepdims=True)) / (x.std(axis=0, keepdims=True) + 1)

    with pytest.raises(BadInput, match="lets examples of a batch meet"):
        check_examples_apart(normed, cross_entropy, *trees, batch)


def test_gates_by_fisher_are_a_replay_on_the_host():
    own = {**WINDOW, "basis": "own"}
    world = World(Fisher(**own), Fisher(**{**own, "decay": 0.5, "end": 13}))
    model = toy.model_of(world.adapted)

    def fisher(trained, dials, constants, batch):
        def of_row(gates, row):
            own = {path: {**dials[path], "gate": gate} for path, gate in gates.items()}
            row = {name: x[None] for name, x in row.items()}
            outputs = model(world.frozen, trained, row, dials=own, key=None)
            return cross_entropy(outputs, row, constants).loss

        gates = {path: own["gate"] for path, own in dials.items()}
        slopes = jax.vmap(jax.grad(of_row), in_axes=(None, 0))(gates, batch)
        return jax.tree.map(lambda x: jnp.mean(jnp.square(x), axis=0), slopes)

    alone = jax.jit(jax.vmap(fisher))
    total = LAYERS * HELD + HELD
    gates, means, counts = np.ones((2, total)), np.zeros((2, total)), [0, 0]
    for at, before, after, _ in world.states():
        for trial in range(2):
            constants = world.constants(trial)
            if constants["due"][at]:
                seen = means[trial] / (1 - float(constants["decay"]) ** counts[trial])
                budget = int(constants["budget"][at])
                gates[trial] = best(seen, gates[trial], budget)
            np.testing.assert_array_equal(world.flat(after, trial), gates[trial])
        if at % 2 == 0:
            found = alone(
                before.trained, after.dials, before.constants, world.batch(at)
            )
            flat = np.concatenate(
                [np.asarray(found[p]).reshape(2, -1) for p in ("stack", "up")], axis=1
            )
            for trial in range(2):
                if at >= world.constants(trial)["end"]:
                    continue
                decay = float(world.constants(trial)["decay"])
                means[trial] = decay * means[trial] + (1 - decay) * flat[trial]
                counts[trial] += 1
            own = after.ranks["memory"]["importance"]["mean"]
            held = [np.asarray(own[p]).reshape(2, -1) for p in ("stack", "up")]
            np.testing.assert_allclose(
                np.concatenate(held, axis=1), means, rtol=1e-3, atol=1e-9
            )
    assert gates.sum(axis=1).tolist() == [RANK * (LAYERS + 1)] * 2
    assert world.traced == 1


def test_a_step_that_does_not_measure_pays_for_none():
    """In a pack, too, it is a choice between two programs and never both."""
    world = World(Fisher(**WINDOW), Fisher(**{**WINDOW, "begin": 4}))
    step = world.packed.__wrapped__
    program = jax.make_jaxpr(step)(world.frozen, world.state, world.batch(0))
    chosen, always = [], []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "cond":
                chosen.append(str(eqn.params["branches"]))
                continue
            always.append(eqn.primitive.name)
            for inner in jax.core.jaxprs_in_params(eqn.params):
                visit(inner)

    visit(program.jaxpr)
    assert "tanh" not in always, "the model runs outside of the choice"
    (models,) = (text for text in chosen if "tanh" in text)
    assert models.count("scan") > 2


def test_ranks_by_activation_are_a_replay_on_the_host():
    world = World(Adaptive(importance="activation", **{**WINDOW, "decay": 0.0}))
    gates, latest = np.ones(LAYERS * HELD + HELD), None
    for at, before, after, _ in world.states():
        constants = world.constants()
        if constants["due"][at]:
            gates = best(latest, gates, int(constants["budget"][at]))
        np.testing.assert_array_equal(world.flat(after), gates)
        if at % 2 == 0 and at < 17:
            first = lambda tree: jax.tree.map(lambda x: x[0], tree)
            trained, dials = first(before.trained), first(after.dials)
            latest = energy_by_hand(
                world.frozen, trained, dials, first(world.batch(at))
            )
    assert gates.sum() == RANK * (LAYERS + 1)
    assert world.traced == 1


def energy_by_hand(frozen, trained, dials, batch):
    """The squares of what every component adds to the outputs of its weight."""
    # NumPy, where axes broadcast as they are written.
    given = (frozen, trained, dials, batch)
    frozen, trained, dials, batch = jax.tree.map(np.asarray, given)
    x = frozen["embed"][batch["ids"]].mean(axis=1)
    found = []
    for layer in range(LAYERS):
        c = dials["stack"]["gate"][layer] * dials["stack"]["scale"]
        a, b = trained["stack"]["a"][layer], trained["stack"]["b"][layer]
        each = (x @ a.T * c)[..., None] * b
        found.append((each**2).sum(axis=(0, 2)))
        x = np.tanh(x @ frozen["stack"][layer] + each.sum(axis=1)) + x
    c = dials["up"]["gate"] * dials["up"]["scale"]
    each = (x @ trained["up"]["a"].T * c)[..., None] * trained["up"]["b"]
    return np.concatenate([*found, (each**2).sum(axis=(0, 2))])


def test_sensitivity_sees_the_task_alone_and_its_own_step():
    fields = {"importance": "sensitivity", **WINDOW, "measure_every": 1}
    world = World(Adaptive(**fields))
    # Neither a penalty nor the clipping may leak in.
    adapted = world.adapted
    imposed = impose([Penalties(frobenius=0.1)], adapted.sites, adapted.thin)
    model = toy.model_of(adapted)
    step = make_step(
        model, cross_entropy, OPTIM, STEPS, False, adapted.active, imposed,
        adapted.roles(), tells={"gradients"},
    )  # fmt: skip
    state = world.run(steps=3)
    constants = {**state.constants, "frobenius": jnp.float32([0.1])}
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    step_state = state.replace(constants=constants)
    alone = first(step_state.replace(step=state.step[None]))
    batch = first(world.batch(3))
    _, metrics, told = jax.jit(step)(world.frozen, alone, batch, jnp.bool_(False))

    def mean(trained):
        outputs = model(world.frozen, trained, batch, dials=alone.dials, key=None)
        sums = cross_entropy(outputs, batch, alone.constants)
        return sums.loss / sums.weight

    grads = jax.grad(mean)(alone.trained)
    assert float(metrics["penalty/frobenius"]) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        told["gradients"], grads,
    )  # fmt: skip
    before = first(state.ranks["memory"]["importance"])
    (_, _, after, _) = next(world.states(start=3, steps=4))
    found = first(after.ranks["memory"]["importance"])
    for path in ("stack", "up"):
        for name in ("a", "b"):
            w, g = alone.trained[path][name], grads[path][name]
            size = np.abs(np.asarray(w) * np.asarray(g))
            wanted = 0.9 * np.asarray(before["mean"][path][name]) + 0.1 * size
            np.testing.assert_allclose(
                found["mean"][path][name], wanted, rtol=1e-4, atol=1e-8
            )
    assert all((np.asarray(n) == 4).all() for n in found["count"].values())


def test_revivable_components_come_back_until_the_last_event():
    world = World(AdaLoRA(**{**WINDOW, "measure_every": 1}))
    total = RANK * (LAYERS + 1)
    revived = 0
    for at, before, after, metrics in world.states():
        constants = world.constants()
        shown = int(metrics["ranks/forward_budget"][0])
        assert shown == (total * 3 // 2 if at < 17 else total)
        assert int(metrics["ranks/budget"][0]) == constants["budget"][at]
        if constants["due"][at] and at < 17:
            moved = world.ranks.before(before)
            for path in ("stack", "up"):
                kept = np.asarray(moved.ranks["memory"]["kept"][path]) != 0
                lost = ~kept & (np.asarray(moved.dials[path]["gate"]) != 0)
                assert not np.asarray(moved.trained[path]["b"])[lost].any()
                revived += (
                    (np.asarray(after.trained[path]["b"])[lost] != 0).any(-1).sum()
                )
    assert revived > 0
    assert world.flat(world.state).sum() == total
