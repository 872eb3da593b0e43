"""Penalties: exact, silent where nothing is open, and each trial's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.penalties import (
    Gradients,
    Penalties,
    closed,
    drift,
    impose,
    with_drift,
)
from lowrank.train.step import make_step

OPTIM = AdamW(lr=0.03, warmup=0.0, schedule="constant", clip=0.5, eps=1e-3)
STEPS, RANK = 4, 3
NONE = Penalties()
#: Every one of them, at weights that are felt.
ALL = Penalties(
    frobenius=0.03, orthogonality=0.02, norm_cap=0.05, drift=0.4, factor_decay=0.7
)
BATCHES = [toy.batch(seed, rows=12, padding=3) for seed in range(STEPS)]


def made(max_rank=RANK):
    rules = [
        Train("head", init="dense"),
        Rule("up", LoRA(alpha=9.0), rank=RANK, max_rank=max_rank),
    ]
    plain = toy.make()
    params = {**plain.leaves, "head": jnp.zeros((toy.HIDDEN, toy.CLASSES))}
    return attach(
        toy.apply, params, {k: BATCHES[0][k] for k in ("ids", "mask")}, rules=rules
    )


def loud(state):
    """Factors that are not silent, alike for all trials."""
    b = state.trained["up"]["b"]
    own = np.random.default_rng(0).normal(0, 0.2, (RANK, b.shape[2]))
    b = b.at[:, :RANK].set(jnp.asarray(own, b.dtype)[None])
    return state.replace(
        trained={**state.trained, "up": {**state.trained["up"], "b": b}}
    )


@functools.cache
def packed(count, imposed, max_rank, accumulate):
    """A compiled pack; the same for all that differ in numbers alone."""
    adapted = made(max_rank)
    step = make_step(
        toy.model_of(adapted), cross_entropy,
        AdamW(**{**vars(OPTIM), "accumulate": accumulate}), STEPS, adapted.draws,
        adapted.active, impose([imposed], adapted.sites, adapted.thin),
    )  # fmt: skip
    return adapted, jax.jit(over_trials(step, count))


def train(penalties, *, optims=None, max_rank=RANK, batches=BATCHES, start=loud):
    """First and last state of a pack and its metrics, a trial per set of penalties."""
    count, optims = len(penalties), optims or [OPTIM] * len(penalties)
    named = {name: 1.0 for one in penalties for name in one.named}
    imposed = Penalties(**named)
    adapted, pack = packed(count, imposed, max_rank, optims[0].accumulate)
    weights = impose([imposed], adapted.sites, adapted.thin).weights(penalties)
    first = state = start(states.start(
        adapted.init_trained, adapted.dials(), optims, [0] * count, weights=weights
    ))  # fmt: skip
    metrics = []
    for batch in batches:
        given = toy.on_device(toy.stack([batch] * count))
        state, found = pack(adapted.frozen(), state, given)
        metrics.append(jax.tree.map(np.asarray, found))
    return first, state, metrics


def close(one, two, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1e-6)
        ),
        one,
        two,
    )


def trial(tree, number):
    return jax.tree.map(lambda x: x[number : number + 1], tree)


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly():
    """Everything here runs a few times: optimizing it costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def alone():
    """Each of two settings as a pack of one."""
    return {one: train([one]) for one in (ALL, NONE)}


def test_without_weights_the_program_is_the_one_without_penalties():
    adapted = made()
    none = impose([NONE, NONE], adapted.sites, adapted.thin)
    parts = (toy.model_of(adapted), cross_entropy, OPTIM, STEPS, False, adapted.active)
    texts = []
    for more, weights in (((), ()), ((none,), none.weights([NONE]))):
        state = states.start(
            adapted.init_trained, adapted.dials(), [OPTIM], [0], weights=weights
        )
        pack = jax.jit(over_trials(make_step(*parts, *more), 1))
        batch = toy.on_device(toy.stack(BATCHES[:1]))
        texts.append(pack.lower(adapted.frozen(), state, batch).as_text())
    assert texts[0] == texts[1]


def test_a_pack_is_its_trials_alone_and_a_weight_of_zero_is_no_penalty(alone):
    """Two of three trials differ in every weight; the third one has none."""
    half = Penalties(**{name: value / 2 for name, value in ALL.constants().items()})
    _, pack, metrics = train([ALL, half, NONE])
    for number, own in ((0, ALL), (2, NONE)):
        _, single, values = alone[own]
        close(trial(pack.trained, number), single.trained)
        for name in values[0]:
            ours, expected = ([m[name][t] for m in given] for given, t in (
                (metrics, number), (values, 0)
            ))  # fmt: skip
            # A small divergence is a difference of logarithms near one.
            close(np.array(ours), np.array(expected), 1e-4)
    far = lambda i, j: np.abs(
        pack.trained["up"]["b"][i] - pack.trained["up"]["b"][j]
    ).max()
    assert min(far(0, 1), far(1, 2), far(0, 2)) > 1e-3, "else it is no test"


def test_every_value_is_reported_and_the_loss_stays_the_tasks(alone):
    first, _, metrics = alone[ALL]
    wanted = {f"penalty/{name}" for name in ALL.constants()}
    assert wanted <= set(metrics[0])
    assert not wanted & set(alone[NONE][2][0])
    assert metrics[0]["loss"] == pytest.approx(alone[NONE][2][0]["loss"], rel=1e-6)
    a, b = (np.asarray(first.trained["up"][n][0], np.float64) for n in "ab")
    scale = 9.0 / RANK
    expected = {
        "frobenius": ((scale * a.T @ b) ** 2).sum(),
        "orthogonality": sum(((x @ x.T - np.eye(RANK)) ** 2).sum() for x in (a, b)),
        "factor_decay": (a**2).sum() + (b**2).sum(),
    }
    for name, value in expected.items():
        assert metrics[0][f"penalty/{name}"] == pytest.approx(value, rel=1e-5), name


def test_padding_is_silent(alone):
    """With components that are closed: the same run, and they stand still."""
    _, few, m1 = alone[ALL]
    before, many, m2 = train([ALL], max_rank=6)
    for name in ("a", "b"):
        old, new = (s.trained["up"][name][0] for s in (before, many))
        np.testing.assert_array_equal(old[RANK:], new[RANK:])
        close(new[:RANK], few.trained["up"][name][0])
        for moments in ("mu", "nu"):
            (adam,) = [part for part in many.opt if hasattr(part, moments)]
            assert not getattr(adam, moments)["up"][name][0, RANK:].any()
    assert np.abs(before.trained["up"]["a"][0, RANK:]).min() > 0, "they start somewhere"
    for one, two in zip(m1, m2, strict=True):
        close(one, two, 1e-4)


def test_micro_batches_of_unequal_weight_equal_one_large_batch(alone):
    parts = AdamW(**{**vars(OPTIM), "accumulate": 3})
    _, state, metrics = train([ALL], optims=[parts])
    close(state.trained, alone[ALL][1].trained)
    for one, two in zip(metrics, alone[ALL][2], strict=True):
        # A small divergence is a difference of logarithms near one.
        close(one, two, 1e-4)


def test_a_step_that_is_not_finite_changes_nothing():
    bad = {**BATCHES[0], "weight": BATCHES[0]["weight"].copy()}
    bad["weight"][0] = np.nan
    before, after, metrics = train([ALL], batches=[bad])
    assert not metrics[0]["finite"][0]
    for name in ("trained", "opt"):
        one, two = getattr(before, name), getattr(after, name)
        assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


def test_the_gradient_added_is_the_weighted_sum():
    """Weights and the mean over the batch, against each gradient by itself."""
    adapted = made()
    one = Penalties(frobenius=0.5, orthogonality=0.25, drift=2.0)
    imposed = impose([one], adapted.sites, adapted.thin)
    state = trial_state(adapted, imposed, one)
    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    ones = jax.tree.map(jnp.ones_like, {"up": state.trained["up"]})
    given = Gradients(zeros, ones)
    found, values = imposed.add(given, jnp.float32(8), state, {})
    assert {*values} == {"penalty/frobenius", "penalty/orthogonality"}
    a, b = (np.asarray(state.trained["up"][n], np.float64) for n in "ab")
    scale, eye = 9.0 / RANK, np.eye(RANK)
    dense = scale * a.T @ b
    da = 0.5 * 2 * scale * b @ dense.T + 0.25 * 4 * (a @ a.T - eye) @ a + 2 / 8
    db = 0.5 * 2 * scale * a @ dense + 0.25 * 4 * (b @ b.T - eye) @ b + 2 / 8
    close(found["up"], {"a": da, "b": db})
    assert not found["head"].any()


def test_a_weight_of_zero_keeps_what_is_not_finite_out():
    adapted = made()
    imposed = impose([ALL], adapted.sites, adapted.thin)
    state = trial_state(adapted, imposed, NONE)
    ones = jax.tree.map(jnp.ones_like, state.trained)
    bad = {"up": jax.tree.map(lambda x: x * jnp.inf, ones["up"])}
    found, _ = imposed.add(Gradients(ones, bad), jnp.float32(1), state, {})
    assert jax.tree.all(jax.tree.map(lambda x: (x == 1).all(), found))


def trial_state(adapted, imposed, one):
    state = states.start(
        adapted.init_trained, adapted.dials(), [OPTIM], [0],
        weights=imposed.weights([one]),
    )  # fmt: skip
    fields = {
        name: value if name == "step" else jax.tree.map(lambda x: x[0], value)
        for name, value in vars(loud(state)).items()
    }
    return states.TrainState(**fields)


def test_drift_is_the_divergence_from_the_base_and_spares_the_head():
    """Against merged weights in NumPy, and against autodiff through them."""
    adapted, batch = made(), toy.on_device(BATCHES[0])
    state = trial_state(adapted, impose([NONE], adapted.sites, adapted.thin), NONE)
    trained, dials, frozen = state.trained, state.dials, adapted.frozen()
    model = toy.model_of(adapted)
    run = lambda t, rest: model(frozen, t, batch, dials=rest, key=None)
    judge = lambda y: cross_entropy(y, batch, state.constants)

    def both(trained):
        base = model(frozen, trained, batch, dials=closed(dials), key=None)
        return base, *with_drift(run, judge, (trained, dials), base, batch)

    base, found, slopes, sums, outputs = jax.jit(both)(trained)
    np.testing.assert_array_equal(outputs, jax.jit(run)(trained, dials))
    plain = toy.apply({**frozen, "head": trained["head"]}, batch)
    np.testing.assert_allclose(base, plain, atol=1e-6)

    wide = lambda x: np.asarray(x, np.float64)
    soft = lambda y: np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    p, q = soft(wide(plain)), soft(wide(outputs))
    expected = (wide(batch["weight"]) * (p * np.log(p / q)).sum(-1)).sum()
    assert float(sums.extra["penalty/drift"]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1

    def dense(factors):
        change = 9.0 / RANK * factors["a"].T @ factors["b"]
        params = {**frozen, "up": frozen["up"] + change, "head": trained["head"]}
        log_q = jax.nn.log_softmax(toy.apply(params, batch))
        return jnp.sum(batch["weight"][:, None] * jnp.asarray(p) * -log_q)

    assert set(found.drift) == {"up"}
    close(found.drift["up"], jax.grad(dense)(trained["up"]), 1e-4)
    # The task's gradient is what it is without.
    task = jax.grad(lambda t, rest: judge(run(t, rest)).loss, argnums=(0, 1))
    close((found.task, slopes), jax.jit(task)(trained, dials))


def test_rows_of_padding_and_excluded_classes_do_not_drift():
    logits = jnp.array([[1.0, 2.0, -jnp.inf], [jnp.nan, 0.0, 0.0]])
    base = jnp.zeros((2, 3)).at[0, 2].set(-jnp.inf)
    weight = {"weight": jnp.array([2.0, 0.0])}
    value, slope = jax.value_and_grad(drift)(logits, base, weight)
    p, q = np.full(2, 0.5), np.exp([1, 2]) / np.exp([1, 2]).sum()
    assert float(value) == pytest.approx(2 * (p * np.log(p / q)).sum(), rel=1e-6)
    np.testing.assert_allclose(slope[0], [*(2 * (q - p)), 0], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_a_drift_is_exact_be_it_small_or_large(size):
    rng = np.random.default_rng(0)
    base = rng.normal(0, 2, (6, 9)).astype(np.float32)
    logits = base + (size * rng.normal(size=(6, 9))).astype(np.float32)
    log = lambda y: y - np.log(np.exp(y).sum(-1, keepdims=True))
    log_p, log_q = (log(y.astype(np.float64)) for y in (base, logits))
    expected = (np.exp(log_p) * (log_p - log_q)).sum()
    given = jnp.asarray(logits), jnp.asarray(base), {"weight": jnp.ones(6)}
    value, slope = jax.value_and_grad(drift)(*given)
    # Logarithms are rounded by 1e-7, and at 1e-3 a term is the square of their gap.
    assert float(value) == pytest.approx(expected, rel=1e-3 if size < 0.1 else 1e-5)
    np.testing.assert_allclose(slope, np.exp(log_q) - np.exp(log_p), atol=1e-6)


def test_a_norm_is_cut_where_it_exceeds_the_cap_and_only_there():
    caps = [NONE, Penalties(norm_cap=0.1), Penalties(norm_cap=1e3)]
    _, state, metrics = train(caps)
    weight = np.asarray(made().frozen()["up"], np.float64)
    a, b = (np.asarray(state.trained["up"][n], np.float64) for n in "ab")
    dense = 9.0 / RANK * np.einsum("tri,tro->tio", a, b)
    ratios = np.linalg.norm(dense, axis=(1, 2)) / np.linalg.norm(weight)
    assert ratios[0] > 0.3
    # Rounding of the norm and of the quotient.
    assert ratios[1] == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_allclose(metrics[-1]["penalty/norm_cap"], ratios, rtol=1e-5)
    for name in ("a", "b"):
        np.testing.assert_array_equal(*state.trained["up"][name][jnp.array([0, 2])])


def test_silent_factors_give_numbers_for_every_penalty():
    """At the start all corrections are zero, where a root has no slope."""
    _, after, metrics = train([ALL], batches=BATCHES[:1], start=lambda state: state)
    finite = lambda tree: jax.tree.all(
        jax.tree.map(lambda x: np.isfinite(x).all(), tree)
    )
    assert finite(metrics)
    assert finite(after.trained)
    # The base is the same numbers in a program fused another way.
    assert metrics[0]["penalty/frobenius"] == 0
    assert metrics[0]["penalty/drift"] == pytest.approx(0, abs=1e-6)
    assert np.abs(after.trained["up"]["b"]).max() > 0


def test_factors_decay_as_by_weight_decay_and_heads_do_not():
    decayed = AdamW(**{**vars(OPTIM), "weight_decay": 0.7})
    _, state, _ = train(
        [NONE, NONE, Penalties(factor_decay=0.7)],
        optims=[decayed, OPTIM, OPTIM],
        batches=BATCHES[:1],
    )
    whole, none, own = (jax.tree.map(lambda x: x[t], state.trained) for t in range(3))
    close(own["up"], whole["up"], 1e-6)
    np.testing.assert_array_equal(own["head"], none["head"])
    assert np.abs(whole["head"] - none["head"]).max() > 1e-4
    assert np.abs(whole["up"]["a"] - none["up"]["a"]).max() > 1e-4


@pytest.mark.parametrize("name", list(NONE.constants()))
@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
def test_weights_out_of_range_are_refused(name, value):
    with pytest.raises(BadInput, match=rf"penalty\.{name} = .* at least 0"):
        Penalties(**{name: value})


def test_what_cannot_be_penalised_is_said_before_compilation():
    with pytest.raises(BadInput, match=r"penalty\.frobenius.*penalty=none"):
        impose([NONE, ALL], {}, dict)
    with pytest.raises(BadInput, match="'up' has no gate"):
        closed({"up": {"scale": jnp.ones(())}})
    run = lambda t, rest: {"logits": t["x"]}
    at = {"x": jnp.ones(2)}, {}
    with pytest.raises(BadInput, match=r"one array of logits .*drift=0"):
        with_drift(run, run, at, jnp.ones(2), {"weight": jnp.ones(2)})
