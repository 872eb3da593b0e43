"""The optimizer is optax's AdamW, and its constants are data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank.core.errors import BadInput
from lowrank.train.optim import AdamW, init, rate, tables, transformation


def constants(optim):
    return {name: jnp.float32(value) for name, value in optim.constants().items()}


def test_the_rate_climbs_from_the_first_step_and_ends_at_zero():
    optim = AdamW(lr=1.0, warmup=0.2, schedule="linear")
    values = [float(rate(optim, jnp.float32(1.0), 10)(jnp.int32(t))) for t in range(11)]
    expected = [0.5, 1.0, *(1 - t / 8 for t in range(9))]
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_other_shapes_end_where_they_should(schedule, last):
    optim = AdamW(lr=1.0, warmup=0.0, schedule=schedule)
    found = rate(optim, jnp.float32(1.0), 10)
    assert float(found(jnp.int32(0))) == pytest.approx(1.0)
    assert float(found(jnp.int32(10))) == pytest.approx(last, abs=1e-6)


def run(tx, grads, params, steps=5):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


TREE = {
    "site": {"a": jnp.full((2, 3), 0.5)},
    "head": jnp.full((3, 2), 0.5),
    "bias": jnp.ones(2),
}
GRADS = jax.tree.map(lambda x: jnp.linspace(-1, 1, x.size).reshape(x.shape) * 3, TREE)


def test_it_equals_adamw_where_they_coincide():
    optim = AdamW(lr=1e-2, warmup=0.0, schedule="constant", clip=None)
    ours = run(transformation(optim, constants(optim), 10), GRADS, TREE)
    theirs = run(optax.adamw(1e-2, weight_decay=0.0), GRADS, TREE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_clipping_is_by_the_global_norm():
    optim = AdamW(lr=1e-2, warmup=0.0, schedule="constant", clip=0.5, eps=1.0)
    ours = run(transformation(optim, constants(optim), 10), GRADS, TREE, steps=1)
    scale = 0.5 / float(optax.global_norm(GRADS))
    small = jax.tree.map(lambda g: g * scale, GRADS)
    free = AdamW(lr=1e-2, warmup=0.0, schedule="constant", clip=None, eps=1.0)
    theirs = run(transformation(free, constants(free), 10), small, TREE, steps=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_decay_is_decoupled_and_spares_vectors():
    optim = AdamW(lr=0.1, warmup=0.0, schedule="constant", weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, TREE)
    moved = run(transformation(optim, constants(optim), 10), zeros, TREE, steps=1)
    np.testing.assert_allclose(moved["head"], 0.5 * (1 - 0.05), rtol=1e-6)
    np.testing.assert_allclose(moved["site"]["a"], 0.5 * (1 - 0.05), rtol=1e-6)
    np.testing.assert_array_equal(moved["bias"], 1.0)


@pytest.mark.parametrize("stack", [(), (4,)])
def test_factors_decay_by_what_their_axes_are_for_stacked_or_not(stack):
    roles = {
        "a": ("rank", "in"), "b": ("rank", "out"), "diagonal": ("rank",),
        "magnitude": ("out",),
    }  # fmt: skip
    own = {name: ("stack",) * len(stack) + one for name, one in roles.items()}
    tree = {"site": {n: jnp.ones(stack + (2,) * len(r)) for n, r in roles.items()}}
    optim = AdamW(lr=0.1, warmup=0.0, schedule="constant", weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    tx = transformation(optim, constants(optim), 10, roles={"site": own})
    moved = run(tx, zeros, tree, steps=1)["site"]
    for name in ("a", "b"):
        np.testing.assert_allclose(moved[name], 0.95, rtol=1e-6)
    for name in ("diagonal", "magnitude"):
        np.testing.assert_array_equal(moved[name], 1.0)


def test_whole_weights_have_a_rate_of_their_own():
    kw = {"warmup": 0.0, "schedule": "constant", "clip": None}
    plain, own = AdamW(lr=1e-2, **kw), AdamW(lr=1e-2, head_lr=3e-2, **kw)
    one = run(transformation(plain, constants(plain), 10), GRADS, TREE, steps=1)
    two = run(transformation(own, constants(own), 10), GRADS, TREE, steps=1)
    np.testing.assert_array_equal(one["site"]["a"], two["site"]["a"])
    np.testing.assert_allclose(
        two["head"] - TREE["head"], 3 * (one["head"] - TREE["head"]), rtol=1e-4
    )


ROLES = {
    "site": {"a": ("rank", "in"), "b": ("rank", "out")},
    "other": {"u": ("out", "rank"), "v": ("in", "rank"), "m": ("out",)},
}
FACTORS = {
    "site": {"a": jnp.full((2, 3), 0.5), "b": jnp.full((2, 5), 0.5)},
    "other": {"u": jnp.ones((5, 2)), "v": jnp.ones((3, 2)), "m": jnp.ones(5)},
    "head": jnp.full((3, 2), 0.5),
}


def updates(optim, steps=1, **more):
    """What the optimizer makes of the same gradients for a while, at one place."""
    grads = jax.tree.map(
        lambda x: jnp.linspace(-1, 1, x.size).reshape(x.shape) * 3, FACTORS
    )
    numbers = {**constants(optim), **more}
    tx = transformation(optim, numbers, 10, roles=ROLES)
    state = tx.init(FACTORS)
    for _ in range(steps):
        moved, state = jax.jit(tx.update)(grads, state, FACTORS)
    return moved


@pytest.mark.parametrize("ratio", [16.0, 0.3])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_b_moves_exactly_so_many_times_as_far(ratio, kind):
    """To the bit: under Adam, and under a step that is nearly the gradient's."""
    # With such an eps a step is lr g / eps.
    eps = 1e6 if kind == "sgd" else 1e-8
    kw = {"weight_decay": 0.1, "clip": None, "eps": eps}
    for steps in (1, 4):
        one = updates(AdamW(**kw), steps)
        two = updates(AdamW(b_ratio=ratio, **kw), steps)
        for path, name in (("site", "b"), ("other", "u")):
            expected = np.float32(ratio) * np.asarray(one[path].pop(name))
            np.testing.assert_array_equal(two[path].pop(name), expected)
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_ratio_of_one_in_a_pack_is_the_plain_run_to_the_bit():
    plain, ratio = AdamW(weight_decay=0.1), AdamW(b_ratio=4.0)
    alone, (one, two) = tables([plain]), tables([plain, ratio])
    assert [*alone[0]] == [*plain.constants()]
    assert "b_ratio" not in alone[0]
    assert (one.pop("b_ratio"), two["b_ratio"]) == (1.0, 4.0)
    assert one == plain.constants()
    found = updates(plain, 3, b_ratio=jnp.float32(1.0))
    jax.tree.map(np.testing.assert_array_equal, found, updates(plain, 3))


def test_a_ratio_needs_to_know_the_axes():
    optim = AdamW(b_ratio=4.0)
    tx = transformation(optim, constants(optim), 10)
    with pytest.raises(BadInput, match=r"site/a .*roles=adapted\.roles\(\)"):
        tx.update(GRADS, tx.init(TREE), TREE)


def test_the_state_does_not_depend_on_the_constants():
    one, two = AdamW(lr=1e-2), AdamW(lr=1.0, b1=0.5, b_ratio=2.0)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), init(one, TREE), init(two, TREE)
    )
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    "field",
    [
        {"lr": 0.0}, {"lr": -1.0}, {"b1": 1.0}, {"eps": 0.0}, {"warmup": 1.0},
        {"clip": 0.0}, {"epochs": 0}, {"accumulate": 0}, {"label_smoothing": 1.0},
        {"weight_decay": -0.1}, {"head_lr": 0.0}, {"b_ratio": 0.0},
        {"b_ratio": float("inf")},
    ],
)  # fmt: skip
def test_constants_out_of_range_are_refused(field):
    with pytest.raises(BadInput, match=f"optim.{next(iter(field))}"):
        AdamW(**field)
