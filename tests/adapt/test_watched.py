"""Second moments of inputs in rank space, whatever a model does with its weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA

ROWS, SEQ, WIDTH, OUT, LAYERS, HEADS, RANK = 3, 5, 7, 6, 4, 2, 3


def plain(p, x):
    return x @ p["w"]


def heads(p, x):
    return jnp.einsum("bsd,dhk->bhsk", x, p["w"].reshape(WIDTH, HEADS, -1))


def turned(p, x):
    return jnp.einsum("od,bsd->bos", p["w"].T, x)


def scanned(p, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x, p["w"])[0]


def side_by_side(p, x):
    own = jnp.stack([x + layer for layer in range(LAYERS)])
    return jnp.einsum("lbsd,ldo->lbso", own, p["w"])


def twice(p, x):
    return x @ p["w"] + jnp.sin(x) @ p["w"]


def square(*lead):
    return (*lead, WIDTH, WIDTH)


def adapted(program, shape, x):
    x = jnp.asarray(x)
    w = jax.random.normal(jax.random.key(0), shape) / np.sqrt(WIDTH)
    model = attach(program, {"w": w}, x, rules=[Rule("w", LoRA(alpha=1.0), rank=RANK)])
    frozen, trained = model.init(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 2)
    trained = {"w": {
        name: x + 0.3 * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, trained["w"].items(), strict=True)
    }}  # fmt: skip
    return model, frozen, trained


def grams(model, frozen, trained, x, weight):
    """What is called the derivative of a loss on some of the rows."""
    dials = model.dials()
    gate, x = dials["w"]["gate"], jnp.asarray(x)

    def loss(gram):
        own = {"w": {**dials["w"], "gram": gram}}
        y = model.apply(frozen, trained, x, dials=own)
        lead = (1,) * (y.ndim - 3) if y.shape[0] != ROWS else ()
        rows = weight.reshape(*lead, ROWS, *(1,) * (y.ndim - 1 - len(lead)))
        return jnp.sum(jnp.sin(y) * rows)

    return jax.jit(jax.grad(loss))(jnp.zeros((*gate.shape, RANK)))


def by_hand(inputs, a):
    u = np.einsum("...d,rd->...r", np.asarray(inputs, np.float64), np.asarray(a))
    u = u.reshape(-1, RANK)
    return u.T @ u


X = np.random.default_rng(0).normal(size=(ROWS, SEQ, WIDTH)).astype(np.float32)
WEIGHT = np.array([1.0, 0.0, 2.0], np.float32)
REAL = X[WEIGHT > 0]


@pytest.mark.parametrize("program", [plain, heads, turned])
def test_rows_that_matter_are_counted_whatever_the_axes(program):
    model, *trees = adapted(program, (WIDTH, OUT), X)
    found = grams(model, *trees, X, WEIGHT)
    a = trees[1]["w"]["a"].reshape(RANK, WIDTH)
    np.testing.assert_allclose(found, by_hand(REAL, a), rtol=1e-4, atol=1e-4)


def test_every_scanned_layer_has_its_own():
    model, frozen, trained = adapted(scanned, square(LAYERS), X)
    found = grams(model, frozen, trained, X, WEIGHT)
    scale, x = float(model.dials()["w"]["scale"]), REAL
    for layer in range(LAYERS):
        a, b = (np.asarray(trained["w"][name][layer]) for name in ("a", "b"))
        np.testing.assert_allclose(found[layer], by_hand(x, a), rtol=1e-4, atol=1e-4)
        x = np.tanh(x @ np.asarray(frozen["w"][layer]) + scale * (x @ a.T) @ b)


def test_layers_that_one_product_computes_are_kept_apart():
    model, frozen, trained = adapted(side_by_side, (LAYERS, WIDTH, OUT), X)
    found = grams(model, frozen, trained, X, WEIGHT)
    a = trained["w"]["a"]
    assert a.shape == (LAYERS, RANK, WIDTH)
    expected = [by_hand(REAL + layer, own) for layer, own in enumerate(a)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-4)


def test_all_uses_of_a_weight_are_summed():
    model, frozen, trained = adapted(twice, (WIDTH, OUT), X)
    found = grams(model, frozen, trained, X, WEIGHT)
    a = trained["w"]["a"]
    expected = by_hand(REAL, a) + by_hand(np.sin(REAL), a)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_being_watched_changes_no_output():
    model, frozen, trained = adapted(scanned, square(LAYERS), X)
    dials = model.dials()
    gram = jnp.ones((LAYERS, RANK, RANK))
    own = {"w": {**dials["w"], "gram": gram}}
    run = jax.jit(
        lambda dials: model.apply(frozen, trained, jnp.asarray(X), dials=dials)
    )
    np.testing.assert_array_equal(run(dials), run(own))


def lookup(p, ids):
    return p["w"][ids]


def both_ways(p, x):
    return x @ p["w"] @ p["w"].T


@pytest.mark.parametrize(
    ("program", "x"),
    [(lookup, np.zeros((ROWS, SEQ), np.int32)), (both_ways, X)],
)
def test_uses_without_such_moments_are_refused_before_compilation(program, x):
    model, *trees = adapted(program, (WIDTH, OUT), x)
    with pytest.raises(BadInput, match=r"w: the second moments .*ranks\.importance"):
        grams(model, *trees, x, WEIGHT)
