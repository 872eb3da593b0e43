"""Rank dropout: one mask per step, site and layer, over whole components."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA

D, RANK, LAYERS, RATE = 7, 3, 4, 0.4
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(RANK, D)), RNG.normal(size=(RANK, D))
X = jnp.asarray(RNG.normal(size=(2, D)), jnp.float32)
ONE = jax.ShapeDtypeStruct((D, D), jnp.float32)
STACK = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32)


def built(apply, shapes, rate=RATE, max_rank=RANK, **options):
    """The model as a function of a key; all sites and layers hold the same numbers."""
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes)
    delta = LoRA(alpha=2.0, rank_dropout=rate, **options)
    adapted = attach(
        apply, params, X, rules=[Rule("**", delta, rank=RANK, max_rank=max_rank)]
    )
    trained = adapted.trained_shapes()
    for own in trained.values():
        for name, value in (("a", A), ("b", B)):
            held = np.ones((max_rank, D))
            held[:RANK] = value
            shape = own[name].shape
            own[name] = jnp.asarray(np.broadcast_to(held, shape), jnp.float32)
    frozen, dials = adapted.frozen(), adapted.dials()

    def run(key, rates=None):
        own = dials
        if rates is not None:
            own = {p: {**d, "rank_dropout": rates} for p, d in dials.items()}
        return adapted.apply(frozen, trained, X, dials=own, key=key)

    return run


def masked():
    """Output of one layer by which components are kept, in float64."""
    scale = 2.0 / RANK / (1 - RATE)
    base, x = np.full((D, D), 0.1), np.asarray(X, np.float64)
    return {
        kept: x @ (base + scale * np.einsum("r,ri,ro->io", np.array(kept), A, B))
        for kept in itertools.product((0, 1), repeat=RANK)
    }


def kept_of(y):
    """Which components an output was computed with."""
    gaps = {kept: np.abs(y - expected).max() for kept, expected in masked().items()}
    kept = min(gaps, key=gaps.__getitem__)
    # Rounding of float32 only; two masks are much further apart.
    assert gaps[kept] < 1e-4
    return kept


def sites(p, x):
    return jnp.stack([x @ p["one"], x @ p["two"]])


def layers(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0.0, p["stack"])[1]


def uses(p, x):
    loop = lax.scan(lambda c, _: (c, x @ p["one"]), 0.0, None, length=2)[1]
    return jnp.concatenate([loop, (x @ p["one"])[None]])


@pytest.mark.parametrize(
    ("apply", "shapes", "places"),
    [(sites, {"one": ONE, "two": ONE}, 2), (layers, {"stack": STACK}, LAYERS)],
)
def test_outputs_are_those_of_masks_drawn_per_step_and_place(apply, shapes, places):
    run = jax.jit(jax.vmap(built(apply, shapes)))
    steps = 400
    found = np.asarray(run(jax.random.split(jax.random.key(0), steps)))
    masks = np.array([[kept_of(y) for y in step] for step in found])
    assert masks.shape == (steps, places, RANK)
    flat = masks.reshape(steps, -1)
    # Five standard deviations of a mean, and of a correlation, of 400 draws.
    assert np.abs(flat.mean(0) - (1 - RATE)).max() < 5 * 0.5 / steps**0.5
    apart = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(apart).max() < 5 / steps**0.5


def test_all_uses_of_a_weight_share_the_mask():
    run = jax.jit(built(uses, {"one": ONE}))
    masks = [{kept_of(y) for y in run(jax.random.key(n))} for n in range(12)]
    assert all(len(one) == 1 for one in masks)
    assert len(set.union(*masks)) > 2


def test_padding_changes_no_mask():
    keys = jax.random.split(jax.random.key(1), 6)
    few, many = (
        jax.vmap(built(layers, {"stack": STACK}, max_rank=most))(keys)
        for most in (RANK, 6)
    )
    np.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-5)


def test_a_rate_of_zero_draws_nothing_and_evaluation_neither():
    text = lambda run, key: str(jax.make_jaxpr(run)(key))
    key, shapes = jax.random.key(0), {"stack": STACK}
    assert "random_bits" in text(built(layers, shapes), key)
    assert "random_bits" not in text(built(layers, shapes), None)
    assert "random_bits" not in text(built(layers, shapes, rate=0.0), key)


def test_inputs_are_dropped_only_where_asked():
    """A mask of components alone never touches an input, whatever else may draw."""
    count = lambda **o: str(
        jax.make_jaxpr(built(sites, {"one": ONE, "two": ONE}, **o))(jax.random.key(0))
    ).count("random_bits")
    assert count(dropout=0.3) == 2 * count() == 2 * count(dropout=0.3, rate=0.0)


def test_trials_have_rates_of_their_own():
    run = built(layers, {"stack": STACK})
    rates = jnp.array([0.0, 0.7])
    keys = jnp.stack([jax.random.key(5)] * 2)
    pack = jax.vmap(run)(keys, rates)
    for trial in range(2):
        alone = run(keys[trial], rates[trial])
        np.testing.assert_allclose(pack[trial], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pack[0], run(None), rtol=1e-5, atol=1e-5)
    assert not np.allclose(pack[0], pack[1])
