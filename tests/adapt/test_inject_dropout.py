"""Dropout on corrections: fresh for every site, layer, trip and use, and only then."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA

X = jnp.ones((4, 16))
ONE = jax.ShapeDtypeStruct((16, 16), jnp.float32)
STACK = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)


def built(apply, shapes, inputs=(X,), rate=0.5):
    """An adapted model whose layers and sites all hold the same numbers."""
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01), shapes)
    rules = [Rule("**", LoRA(alpha=2.0, dropout=rate), rank=2)]
    adapted = attach(apply, params, *inputs, rules=rules)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16)), rng.normal(size=(2, 16))
    trained = adapted.trained_shapes()
    for own in trained.values():
        own["a"] = jnp.asarray(np.broadcast_to(a, own["a"].shape), jnp.float32)
        own["b"] = jnp.asarray(np.broadcast_to(b, own["b"].shape), jnp.float32)
    frozen = adapted.frozen()
    return jax.jit(lambda key, x: adapted.apply(frozen, trained, x, key=key))


def apart(*outputs):
    """Whether all of several equally computed outputs differ from each other."""
    flat = [np.asarray(y).tobytes() for y in outputs]
    return len(set(flat)) == len(flat)


def sites(p, x):
    return x @ p["one"], x @ p["two"]


def uses(p, x):
    return x @ p["one"], x @ p["one"]


def layers(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0.0, p["stack"])[1]


def trips(p, x):
    return lax.scan(lambda c, _: (c, x @ p["one"]), 0.0, None, length=3)[1]


def carried(p, x):
    step = lambda c, _: (c, x @ c)
    return lax.scan(step, p["one"], None, length=3)[1]


def two_scans(p, x):
    first, second = trips(p, x), trips(p, x)
    return jnp.concatenate([first, second])


def nested(p, x):
    outer = lambda c, w: (c, lax.scan(lambda c, v: (c, x @ v), c, w)[1])
    w = p["stack"].reshape(3, 1, 16, 16)
    return lax.scan(outer, 0.0, w)[1].reshape(3, 4, 16)


def nested_trips(p, x):
    inner = lambda: lax.scan(lambda c, _: (c, x @ p["one"]), 0.0, None, length=2)[1]
    return lax.scan(lambda c, _: (c, inner()), 0.0, None, length=2)[1].reshape(4, 4, 16)


PLACES = [
    (sites, {"one": ONE, "two": ONE}),
    (uses, {"one": ONE}),
    (layers, {"stack": STACK}),
    (trips, {"one": ONE}),
    (carried, {"one": ONE}),
    (two_scans, {"one": ONE}),
    (nested, {"stack": STACK}),
    (nested_trips, {"one": ONE}),
]


@pytest.mark.parametrize(
    ("apply", "shapes"), PLACES, ids=lambda v: getattr(v, "__name__", "")
)
def test_every_place_draws_its_own_mask(apply, shapes):
    run = built(apply, shapes)
    silent = run(None, X)
    assert not apart(*silent), "without a key all places compute the same"
    key = jax.random.key(1)
    noisy = run(key, X)
    assert apart(*noisy)
    assert jnp.array_equal(jnp.stack([*noisy]), jnp.stack([*run(key, X)]))
    assert apart(*noisy, *run(jax.random.key(2), X))


def test_the_mean_over_keys_is_the_output_without_dropout():
    run = built(sites, {"one": ONE, "two": ONE}, rate=0.3)
    keys = jax.random.split(jax.random.key(0), 4000)
    mean = jax.vmap(lambda key: run(key, X)[0])(keys).mean(0)
    np.testing.assert_allclose(mean, run(None, X)[0], atol=0.15)


def test_a_rate_of_zero_draws_nothing():
    run = built(sites, {"one": ONE, "two": ONE}, rate=0.0)
    text = lambda run, key: str(jax.make_jaxpr(run)(key, X))
    assert "random_bits" not in text(run, jax.random.key(0))
    noisy = built(sites, {"one": ONE, "two": ONE}, rate=0.1)
    assert "random_bits" in text(noisy, jax.random.key(0))
    assert "random_bits" not in text(noisy, None)


@pytest.mark.parametrize("scan", [False, True])
def test_recomputation_draws_the_same_mask(scan):
    """The gradient through remat is the gradient without it, dropout included."""
    wrap = {
        False: lambda f: f,
        True: lambda f: jax.checkpoint(f, prevent_cse=not scan),
    }

    def model(remat):
        layer = wrap[remat](lambda c, w: (jnp.sin(c @ w), None))

        def apply(p, x):
            if scan:
                return lax.scan(layer, x, p["stack"])[0]
            return layer(layer(x, p["stack"][None].reshape(16, 16))[0], p["one"])[0]

        return apply

    stack = STACK if scan else jax.ShapeDtypeStruct((16, 16), jnp.float32)
    shapes = {"stack": stack} if scan else {"stack": stack, "one": ONE}
    results = []
    for remat in (False, True):
        params = oracle.filled(shapes, 0)
        rules = [Rule("**", LoRA(dropout=0.5), rank=2)]
        adapted = attach(model(remat), params, X, rules=rules)
        trained, dials = oracle.loud(adapted, 1)

        def loss(t, adapted=adapted, dials=dials):
            key = jax.random.key(5)
            y = adapted.apply(adapted.frozen(), t, X, dials=dials, key=key)
            return jnp.sum(y**2)

        results.append(jax.jit(jax.value_and_grad(loss))(trained))
    plain, remat = results
    assert oracle.leafwise(remat, plain) <= 1e-5


def test_lookups_drop_in_rank_space():
    table = lambda p, ids: p["one"][ids]
    ids = jnp.arange(5)
    run = built(table, {"one": ONE}, (ids,))
    assert apart(
        run(None, ids), run(jax.random.key(0), ids), run(jax.random.key(1), ids)
    )
