"""Sizes of corrections from thin factors are those of the dense matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.core.errors import BadInput
from lowrank.deltas.base import Delta
from lowrank.deltas.lora import LoRA
from lowrank.deltas.thin import departures, squared_norms, total

#: Primes, all different: a wrong axis cannot pass for the right one.
D_IN, LAYERS, HEADS, WIDTH, RANK, MAX_RANK = 7, 3, 2, 5, 2, 4
#: float32 against float64, of sums of some hundred products.
CLOSE = {"rtol": 2e-5, "atol": 1e-5}


def heads(p, x):
    """Layers stacked along the second axis of a weight with two output axes."""
    step = lambda c, w: (c, jnp.einsum("bi,ihk->bhk", x, w))
    return jax.lax.scan(step, 0.0, jnp.moveaxis(p["w"], 1, 0))[1]


@pytest.fixture(scope="module")
def case():
    """An adapted stack, its trained tree and dials of which nothing is silent."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": draw(D_IN, LAYERS, HEADS, WIDTH)}
    rule = Rule("w", LoRA(alpha=3.0), rank=RANK, max_rank=MAX_RANK)
    adapted = attach(heads, params, jnp.ones((1, D_IN)), rules=[rule])
    trained = jax.tree.map(lambda s: draw(*s.shape), adapted.trained_shapes())
    # The second layer has no component at all, the third one a soft gate.
    gate = jnp.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0.5, 0]])
    dials = {"w": {**adapted.dials()["w"], "gate": gate}}
    return adapted, params, trained, dials


def arrays(case):
    """(a, b, c) in float64 with layers first, read without the code under test."""
    _, _, trained, dials = case
    wide = lambda x: np.asarray(x, np.float64)
    a, b = wide(trained["w"]["a"]), wide(trained["w"]["b"])
    c = wide(dials["w"]["gate"]) * float(dials["w"]["scale"])
    return a, b.reshape(LAYERS, MAX_RANK, -1), c


def test_norms_and_gradients_are_the_dense_ones(case):
    adapted, params, trained, dials = case
    thin = adapted.thin()["w"]
    a, b, c = arrays(case)
    dense = np.einsum("lr,lri,lro->lio", c, a, b)
    # The merged model knows the layout of the weight.
    change = adapted.merge(adapted.frozen(), trained, dials)["w"] - params["w"]
    by_layer = np.moveaxis(np.asarray(change), 1, 0).reshape(LAYERS, D_IN, -1)
    np.testing.assert_allclose(by_layer, dense, rtol=1e-4, atol=1e-4)

    sizes = lambda factors: squared_norms(thin.terms(factors, dials["w"]))
    np.testing.assert_allclose(sizes(trained["w"]), (dense**2).sum((1, 2)), **CLOSE)
    found = jax.grad(lambda f: total([sizes(f)]))(trained["w"])
    da = 2 * c[..., None] * np.einsum("lio,lro->lri", dense, b)
    db = 2 * c[..., None] * np.einsum("lio,lri->lro", dense, a)
    for name, expected in (("a", da), ("b", db)):
        own = np.asarray(found[name]).reshape(expected.shape)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(own / scale, expected / scale, atol=1e-5)
        assert not own[c == 0].any(), "a closed component has a gradient of zero"
        assert own[c != 0].any(axis=-1).all()


def test_departures_count_open_components_alone(case):
    adapted, _, trained, dials = case
    thin = adapted.thin()["w"]
    a, b, c = arrays(case)
    value, pulls = np.zeros(LAYERS), [np.zeros_like(a), np.zeros_like(b)]
    for layer in range(LAYERS):
        own = c[layer] != 0
        for x, pull in zip((a, b), pulls, strict=True):
            rows = x[layer, own]
            gap = rows @ rows.T - np.eye(own.sum())
            value[layer] += (gap**2).sum()
            pull[layer, own] = 4 * gap @ rows
    each = lambda factors: departures(thin.terms(factors, dials["w"]))
    found = each(trained["w"])
    np.testing.assert_allclose(found, value, **CLOSE)
    assert found[1] == 0, "a layer without components has nothing to straighten"
    grads = jax.grad(lambda f: total([each(f)]))(trained["w"])
    for name, expected in zip("ab", pulls, strict=True):
        own = np.asarray(grads[name]).reshape(expected.shape)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(own / scale, expected / scale, atol=1e-5)
        assert not own[c == 0].any()


def test_shrinking_scales_open_layers_and_base_norms_are_per_layer(case):
    adapted, params, trained, dials = case
    thin = adapted.thin()["w"]
    by = jnp.array([0.5, 0.1, 1.0])
    small = thin.shrunk(trained["w"], dials["w"], by)
    before, after = (
        squared_norms(thin.terms(f, dials["w"])) for f in (trained["w"], small)
    )
    np.testing.assert_allclose(after, before * by**2, rtol=1e-6)
    np.testing.assert_array_equal(small["a"], trained["w"]["a"])
    shut = np.asarray(dials["w"]["gate"]) == 0
    np.testing.assert_array_equal(small["b"][shut], trained["w"]["b"][shut])
    expected = (np.asarray(params["w"], np.float64) ** 2).sum((0, 2, 3))
    np.testing.assert_allclose(thin.squares(params["w"]), expected, rtol=1e-6)


def test_no_dense_matrix_is_formed(case):
    adapted, _, trained, dials = case
    thin = adapted.thin()["w"]
    both = lambda f: sum(
        total([each(thin.terms(f, dials["w"]))]) for each in (squared_norms, departures)
    )
    text = jax.jit(jax.grad(both)).lower(trained["w"]).as_text()
    shapes = [
        sorted(map(int, s[:-1].split("x"))) for s in re.findall(r"<([\dx]+x)f", text)
    ]
    assert [LAYERS, MAX_RANK, D_IN] in shapes, "shapes must be seen to mean anything"
    assert not [s for s in shapes if D_IN in s and (WIDTH in s or HEADS * WIDTH in s)]


class Other(LoRA):
    """Not a sum of thin products, as far as anybody was told."""

    amplitude = Delta.amplitude


def test_a_delta_that_is_no_thin_product_is_refused():
    rules = [Rule("w", Other(), rank=1)]
    params = {"w": jnp.ones((3, 3))}
    adapted = attach(lambda p, x: x @ p["w"], params, jnp.ones((1, 3)), rules=rules)
    with pytest.raises(BadInput, match=r"'w' by Other .*amplitude.*norm_cap at zero"):
        adapted.thin()
