"""Importances against references in NumPy; the spectrum against the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import equal, layout

from lowrank.allocate import signals
from lowrank.allocate.importance import IMPORTANCES, corrected
from lowrank.allocate.signals import SIGNALS
from lowrank.core.errors import BadInput
from lowrank.deltas.thin import Terms

D_IN, D_OUT = 5, 7
CONSTANTS = {"decay": jnp.float32(0.85), "deviation_decay": jnp.float32(0.7)}
KEY = jax.random.key(0)


def opened(slots):
    return jnp.ones(slots.num_components)


def factors_of(slots, rng, diagonal=False):
    found = {}
    for one in slots.competitors:
        lead = (*one.stack, one.max_rank)
        draw = lambda *rest, lead=lead: jnp.asarray(
            rng.normal(size=(*lead, *rest)), jnp.float32
        )
        found[one.path] = {"a": draw(D_IN), "b": draw(D_OUT)}
        if diagonal:
            found[one.path]["values"] = draw()
    return found


def adalora(ws, gs, beta1, beta2):
    """Scores of one layer's triplets in float64, from the paper's equations alone.

    ws, gs: per step (P (m, r), lam (r,), Q (r, n)) and their gradients.
    """
    bars = None
    for w, g in zip(ws, gs, strict=True):
        sizes = [np.abs(x * dx) for x, dx in zip(w, g, strict=True)]
        if bars is None:
            bars = [(np.zeros_like(x), np.zeros_like(x)) for x in sizes]
        new = []
        for (i_bar, u_bar), size in zip(bars, sizes, strict=True):
            i_bar = beta1 * i_bar + (1 - beta1) * size
            u_bar = beta2 * u_bar + (1 - beta2) * np.abs(size - i_bar)
            new.append((i_bar, u_bar))
        bars = new
    p, lam, q = (i * u for i, u in bars)
    return lam + p.mean(axis=0) + q.mean(axis=1)


@pytest.mark.parametrize("diagonal", [False, True], ids=["LoRA", "PLambdaQ"])
def test_sensitivity_is_that_of_the_paper_for_20_steps(diagonal):
    """S1. float32 against float64: relative error of some ten products."""
    slots, rng = layout(), np.random.default_rng(0)
    importance = IMPORTANCES["sensitivity"]
    trees = [factors_of(slots, rng, diagonal) for _ in range(40)]
    memory = importance.init(slots, jax.eval_shape(lambda: trees[0]))
    observe = jax.jit(lambda m, w, g: importance.observe(
        slots, m, {"factors": w, "gradients": g}, CONSTANTS))  # fmt: skip
    for step in range(20):
        memory = observe(memory, trees[step], trees[20 + step])
    found = np.asarray(importance.values(slots, memory, opened(slots), CONSTANTS, KEY))
    wide = lambda x: np.asarray(x, np.float64)
    for layer, name in enumerate(slots.names):
        path = name.split("[")[0]
        inside = slots.layer == layer
        if not inside.any():
            continue
        place = layer - slots.names.index(
            next(n for n in slots.names if n.startswith(path))
        )

        def triple(tree, path=path, place=place):
            a, b = (wide(tree[path][n]).reshape(-1, *tree[path][n].shape[-2:])[place]
                    for n in ("a", "b"))  # fmt: skip
            lam = np.zeros(len(a))
            if diagonal:
                lam = wide(tree[path]["values"]).reshape(-1, len(a))[place]
            return b.T, lam, a

        expected = adalora(
            [triple(t) for t in trees[:20]], [triple(t) for t in trees[20:]], 0.85, 0.7
        )
        np.testing.assert_allclose(found[inside], expected, rtol=2e-5)
    assert (found > 0).all()


def test_sensitivity_fades_as_its_rate_says_and_forgets_at_birth():
    slots, rng = equal(2, max_rank=2), np.random.default_rng(1)
    importance = IMPORTANCES["sensitivity"]
    w, g = factors_of(slots, rng), factors_of(slots, rng)
    observe = lambda m, g: importance.observe(
        slots, m, {"factors": w, "gradients": g}, CONSTANTS
    )
    memory = observe(importance.init(slots, w), g)
    mean = memory["mean"]["l0"]["a"]
    zero = jax.tree.map(jnp.zeros_like, g)
    for _ in range(3):
        memory = observe(memory, zero)
    np.testing.assert_allclose(memory["mean"]["l0"]["a"], 0.85**3 * mean, rtol=1e-5)
    born = jnp.array([False, True, False, False])
    values = importance.values(slots, memory, opened(slots), CONSTANTS, KEY)
    young = importance.values(
        slots, importance.forget(slots, memory, born), opened(slots), CONSTANTS, KEY
    )
    np.testing.assert_array_equal(young, np.where(born, 0, values))


@pytest.mark.parametrize(("since", "most"), [(1, 3.5), (4, 1.8), (12, 1.2)])
def test_the_sensitivity_of_a_newborn_is_at_least_that_of_an_equal(since, most):
    """Uncorrected, it is a seventh after one measurement, a half after four."""
    slots, rng = equal(64, max_rank=2), np.random.default_rng(2)
    importance = IMPORTANCES["sensitivity"]
    w = factors_of(slots, rng)
    memory = importance.init(slots, w)
    observe = jax.jit(lambda m, g: importance.observe(
        slots, m, {"factors": w, "gradients": g}, CONSTANTS))  # fmt: skip
    born = jnp.asarray(slots.position == 1)
    for step in range(40 + since):
        if step == 40:
            memory = importance.forget(slots, memory, born)
        # All components alike: no gradient has to do with whose it is.
        memory = observe(memory, factors_of(slots, rng))
    values = importance.values(slots, memory, opened(slots), CONSTANTS, KEY)
    assert 0.9 < values[born].mean() / values[~born].mean() < most
    # One with no measurement yet says nothing.
    memory = importance.forget(slots, memory, born)
    values = importance.values(slots, memory, opened(slots), CONSTANTS, KEY)
    assert not values[born].any()
    assert (values[~born] > 0).all()


def test_the_old_keep_the_paper_s_sensitivity_where_others_are_born():
    slots, rng = equal(2, max_rank=2), np.random.default_rng(3)
    importance = IMPORTANCES["sensitivity"]
    w, gradients = factors_of(slots, rng), [factors_of(slots, rng) for _ in range(6)]
    born = jnp.array([False, True, False, False])
    found = []
    for forgets in (False, True):
        memory = importance.init(slots, w)
        for step, g in enumerate(gradients):
            if forgets and step == 3:
                memory = importance.forget(slots, memory, born)
            given = {"factors": w, "gradients": g}
            memory = importance.observe(slots, memory, given, CONSTANTS)
        found.append(importance.values(slots, memory, opened(slots), CONSTANTS, KEY))
    np.testing.assert_array_equal(found[0][~born], found[1][~born])


def test_sensitivity_needs_the_factors():
    with pytest.raises(BadInput, match="pass the trained tree"):
        IMPORTANCES["sensitivity"].init(equal(1), None)


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("fisher", "gate_fisher"),
        ("gradient", "gate_gradient"),
        ("norm", "norms"),
        ("activation", "activations"),
    ],
)
def test_smoothed_signals_are_means_of_what_was_seen(name, signal):
    slots, rng = equal(2), np.random.default_rng(2)
    importance = IMPORTANCES[name]
    assert importance.signals == {signal}
    memory = importance.init(slots, None)
    assert not importance.ready(memory)
    seen = rng.normal(size=(6, 8)).astype(np.float32)
    for x in seen:
        memory = importance.observe(slots, memory, {signal: jnp.asarray(x)}, CONSTANTS)
    weights = 0.85 ** np.arange(5, -1, -1.0)
    expected = np.abs((weights[:, None] * seen).sum(0) / weights.sum())
    values = importance.values(slots, memory, opened(slots), CONSTANTS, KEY)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert importance.ready(memory)
    # A component that is born is as good as its first measurement.
    born = jnp.arange(8) == 3
    memory = importance.forget(slots, memory, born)
    assert importance.values(slots, memory, opened(slots), CONSTANTS, KEY)[3] == 0
    memory = importance.observe(
        slots, memory, {signal: jnp.asarray(seen[0])}, CONSTANTS
    )
    np.testing.assert_allclose(
        importance.values(slots, memory, opened(slots), CONSTANTS, KEY)[3],
        abs(seen[0, 3]),
        rtol=1e-5,
    )


def test_no_decay_is_the_latest_and_nothing_seen_is_zero():
    assert corrected(jnp.float32(3), jnp.int32(1), jnp.float32(0)) == 3
    assert corrected(jnp.float32(0), jnp.int32(0), jnp.float32(0)) == 0


def terms(rng, layers=3, rank=4, d_in=D_IN, d_out=D_OUT):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    c = draw(layers, rank) * jnp.array([1.0, 1, 0, 1])[None, :rank]
    return Terms(draw(layers, rank, d_in), draw(layers, rank, d_out), c)


def dense(t):
    return np.einsum(
        "lr,lri,lro->lio", *(np.asarray(x, np.float64) for x in (t.c, t.a, t.b))
    )


def test_norms_are_those_of_the_rank_one_terms():
    """S4."""
    t = terms(np.random.default_rng(3))
    each = np.einsum(
        "lr,lri,lro->lrio", *(np.asarray(x, np.float64) for x in (t.c, t.a, t.b))
    )
    expected = np.sqrt((each**2).sum((2, 3)))
    np.testing.assert_allclose(signals.norms(t), expected, rtol=1e-5)


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 7), (7, 3), (2, 3), (4, 4), (1, 9)])
def test_spectra_are_those_of_the_dense_correction(d_in, d_out):
    t = terms(np.random.default_rng(4), d_in=d_in, d_out=d_out)
    found = jax.jit(signals.spectra)({"w": t})["w"]
    expected = np.linalg.svd(dense(t), compute_uv=False)
    full = np.zeros((3, 4))
    width = min(4, expected.shape[1])
    full[:, :width] = expected[:, :width]
    # Absolute: singular values that are zero come out at rounding of the largest.
    np.testing.assert_allclose(found, full, atol=2e-5 * expected.max())


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_the_ranks_of_a_spectrum_are_ordered(seed, rank):
    values = np.random.default_rng(seed).gamma(0.3, size=8).astype(np.float32)
    values[rank:] = 0
    stable = float(signals.stable_rank(jnp.asarray(values)))
    effective = float(signals.effective_rank(jnp.asarray(values)))
    count = (values > 0).sum()
    if count:
        assert 1 - 1e-5 <= stable <= effective * (1 + 1e-5) <= count * (1 + 2e-5)
    else:
        assert stable == effective == 0


def test_flat_spectra_have_full_rank_and_none_has_zero():
    flat = jnp.array([[2.0, 2, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(signals.stable_rank(flat), [3, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(signals.effective_rank(flat), [3, 1, 0], rtol=1e-5)


def test_spectra_of_sites_of_all_shapes_are_those_of_each_alone():
    rng, sites = np.random.default_rng(8), {}
    for path, (layers, rank, d_in, d_out) in {
        "a": (2, 3, 6, 4), "b": (1, 5, 6, 9), "c": (3, 3, 6, 4), "d": (2, 4, 2, 9),
    }.items():  # fmt: skip
        draw = lambda *shape, own=(layers, rank): jnp.asarray(
            rng.normal(size=(*own, *shape)), jnp.float32
        )
        sites[path] = Terms(a=draw(d_in), b=draw(d_out), c=draw())
    for path, values in jax.jit(signals.spectra)(sites).items():
        terms = sites[path]
        dense = np.einsum("lr,lri,lro->lio", *(np.asarray(x, np.float64)
                          for x in (terms.c, terms.a, terms.b)))  # fmt: skip
        rank = terms.c.shape[-1]
        expected = np.linalg.svd(dense, compute_uv=False)[:, :rank]
        missing = ((0, 0), (0, rank - expected.shape[1]))
        np.testing.assert_allclose(values, np.pad(expected, missing), atol=1e-5)
    assert signals.spectra({}) == {}


@pytest.mark.parametrize(
    ("name", "second"), [("effective_rank", 4 / 3**0.75), ("stable_rank", 10 / 9)]
)
def test_the_rank_of_a_spectrum_is_shared_out_by_norms(name, second):
    slots = equal(2)
    importance = IMPORTANCES[name]
    memory = importance.init(slots, None)
    given = {
        "norms": jnp.array([3.0, 1, 0, 0, 1, 1, 1, 1]),
        "spectrum": jnp.array([2.0, 2, 0, 0, 3, 1, 0, 0]),
    }
    for _ in range(3):
        memory = importance.observe(slots, memory, given, CONSTANTS)
    values = importance.values(slots, memory, opened(slots), CONSTANTS, KEY)
    expected = [1.5, 0.5, 0, 0, *[second / 4] * 4]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("left", [2.0, np.nan], ids=["remembered", "no number"])
def test_what_died_holds_back_no_share_of_its_layer(left):
    """The open components of a layer share its effective rank, whatever died there."""
    slots = equal(2)
    importance = IMPORTANCES["effective_rank"]
    memory = importance.init(slots, None)
    given = {
        "norms": jnp.array([2.0, 2, left, left, 1, 1, 0, 0]),
        "spectrum": jnp.array([2.0, 2, 0, 0, 1, 1, 0, 0]),
    }
    memory = importance.observe(slots, memory, given, CONSTANTS)
    gates = jnp.array([1.0, 1, 0, 0, 1, 1, 0, 0])
    # Measured once more since: a shut component has no norm, and its mean fades.
    given["norms"] = given["norms"] * gates
    memory = importance.observe(slots, memory, given, CONSTANTS)
    values = importance.values(slots, memory, gates, CONSTANTS, KEY)
    np.testing.assert_allclose(values[gates > 0], [1, 1, 1, 1], rtol=1e-5)


def test_explained_variance_is_that_of_the_inputs():
    """S7: inputs of true rank q have q directions; shares sum to one."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 6))
    gram = jnp.asarray(x.T @ x / 200, jnp.float32)
    found = np.asarray(signals.explained_variance(gram, 8))
    expected = np.linalg.svd(x, compute_uv=False) ** 2
    # Eigenvalues in float32 are good to rounding of the largest one.
    np.testing.assert_allclose(found[:3], expected[:3] / expected.sum(), atol=1e-5)
    assert (found[3:] < 1e-5).all()
    assert found.sum() == pytest.approx(1, abs=1e-5)
    stacked = signals.explained_variance(jnp.stack([gram, 2 * gram]), 2)
    np.testing.assert_allclose(stacked[1], stacked[0], rtol=1e-5)


def test_latest_takes_what_is_harmful_for_nothing_and_shows_nan():
    slots = equal(1)
    importance = IMPORTANCES["ablation"]
    given = {"ablation": jnp.array([0.5, -0.1, jnp.nan, 0])}
    memory = importance.observe(slots, importance.init(slots, None), given, CONSTANTS)
    values = importance.values(slots, memory, opened(slots), CONSTANTS, KEY)
    np.testing.assert_array_equal(values, [0.5, 0, np.nan, 0])


def test_random_draws_belong_to_sites():
    """What else competes changes nothing, the key everything."""
    importance = IMPORTANCES["random"]
    draw = lambda slots, key: importance.values(
        slots, {}, opened(slots), CONSTANTS, key
    )
    few, more = equal(2), equal(3)
    np.testing.assert_array_equal(draw(few, KEY), draw(more, KEY)[:8])
    assert (draw(few, KEY) != draw(few, jax.random.key(1))).all()


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_asks_for_known_signals_only(name):
    assert IMPORTANCES[name].signals <= {*SIGNALS}
    assert IMPORTANCES[name].memory


@pytest.mark.parametrize("name", IMPORTANCES)
def test_memories_of_trials_are_mapped_over(name):
    """S5 and G5: mapped over is one by one, and layers in another order are too."""
    slots, rng = equal(3), np.random.default_rng(6)
    importance = IMPORTANCES[name]
    flat = lambda: jnp.asarray(rng.gamma(1.0, size=(2, 12)), jnp.float32)
    factors = [factors_of(slots, rng) for _ in range(4)]
    pair = lambda i: jax.tree.map(lambda *x: jnp.stack(x), factors[i], factors[i + 1])
    given = {n: flat() for n in SIGNALS} | {"factors": pair(0), "gradients": pair(2)}
    given = {n: given[n] for n in importance.signals}
    rates = {
        "decay": jnp.array([0.5, 0.9]),
        "deviation_decay": jnp.array([0.6, 0.8]),
    }
    keys = jax.random.split(KEY, 2)

    def twice(given, rates, key):
        memory = importance.init(slots, factors[0])
        for _ in range(2):
            memory = importance.observe(slots, memory, given, rates)
        return importance.values(slots, memory, opened(slots), rates, key)

    together = jax.jit(jax.vmap(twice))(given, rates, keys)
    for trial in range(2):
        of = lambda tree, trial=trial: jax.tree.map(lambda x: x[trial], tree)
        alone = twice(of(given), of(rates), keys[trial])
        np.testing.assert_allclose(together[trial], alone, rtol=1e-6)
        if name == "random":
            continue
        order = np.array([2, 0, 1])
        turn = lambda x, order=order: x.reshape(3, 4)[order].reshape(-1)
        moved = {
            n: {f"l{i}": x[f"l{j}"] for i, j in enumerate(order)}
            if isinstance(x, dict)
            else turn(x)
            for n, x in of(given).items()
        }
        other = twice(moved, of(rates), keys[trial])
        np.testing.assert_allclose(other, turn(alone), rtol=1e-6)
