"""A step where it is easily wrong: halves of a batch, one bad number, its own rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.train import state as states
from lowrank.train.losses import Sums, cross_entropy
from lowrank.train.optim import AdamW, rate
from lowrank.train.step import make_step

PLAIN = {"warmup": 0.0, "schedule": "constant", "clip": None}


def bare(optim, model, loss, trained, draws=False, num_steps=10):
    """A step without trials and its state, for a model of one's own."""
    step = make_step(model, loss, optim, num_steps, draws=draws)
    state = states.start(lambda key: trained, {}, [optim], [0])
    fields = {
        name: value if name == "step" else jax.tree.map(lambda x: x[0], value)
        for name, value in vars(state).items()
    }
    return jax.jit(step), states.TrainState(**fields)


def same(one, two):
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


def test_micro_batches_of_unequal_weight_equal_one_large_batch():
    # All padding falls into the last part: means of means would be wrong.
    batch = toy.on_device(toy.batch(1, rows=12, padding=3))
    adapted = toy.make()
    found = []
    for parts in (1, 3):
        optim = AdamW(eps=1e-2, accumulate=parts, **PLAIN)
        trained = adapted.init_trained(jax.random.key(0))
        step, state = bare(optim, toy.model_of(adapted), cross_entropy, trained)
        state = state.replace(dials=adapted.dials())
        after, metrics = step(adapted.frozen(), state, batch)
        found.append((after.trained, metrics))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *found
    )


def test_every_micro_batch_draws_for_itself():
    def model(frozen, trained, batch, dials, key):
        return jax.random.uniform(key, batch["weight"].shape) + 0 * trained["w"]

    def loss(outputs, batch, constants):
        squares = {"square": (outputs**2).sum()}
        return Sums(outputs.sum(), batch["weight"].sum(), squares)

    optim = AdamW(accumulate=2, **PLAIN)
    step, state = bare(optim, model, loss, {"w": jnp.zeros(1)}, draws=True)
    _, metrics = step({}, state, {"weight": jnp.ones(2)})
    variance = float(metrics["square"] - metrics["loss"] ** 2)
    assert variance > 1e-4


def loss_only(w, bad):
    return w.sum() + jax.lax.stop_gradient(jnp.where(bad, jnp.inf, 0.0))


def gradient_only(w, bad):
    # The root is 0 at 0, and its slope infinite.
    return w.sum() + jnp.sqrt(jnp.where(bad, jax.lax.stop_gradient(-w) + w, 1.0)).sum()


@pytest.mark.parametrize("value", [loss_only, gradient_only])
def test_loss_and_gradient_each_suffice_to_hold_a_step_back(value):
    def model(frozen, trained, batch, dials, key):
        return value(trained["w"], batch["bad"])

    def loss(outputs, batch, constants):
        return Sums(outputs, jnp.float32(1), {})

    step, state = bare(AdamW(), model, loss, {"w": jnp.ones(3)})
    state, metrics = step({}, state, {"bad": jnp.array(False)})
    assert bool(metrics["finite"])
    assert float(np.abs(state.opt[1].mu["w"]).max()) > 0, "moments must be in play"
    after, metrics = step({}, state, {"bad": jnp.array(True)})
    assert not bool(metrics["finite"])
    assert np.isfinite(metrics["loss"]) == (value is gradient_only)
    assert np.isfinite(metrics["grad_norm"]) == (value is loss_only)
    same(state.trained, after.trained)
    same(state.opt, after.opt)
    assert (int(after.step), int(after.skipped)) == (2, 1)


def test_the_reported_rate_is_the_applied_one_also_after_a_skip():
    def model(frozen, trained, batch, dials, key):
        return trained["w"].sum() * batch["scale"]

    def loss(outputs, batch, constants):
        return Sums(outputs, jnp.float32(1), {})

    optim = AdamW(lr=0.1, warmup=0.5, clip=None)
    step, state = bare(optim, model, loss, {"w": jnp.ones(2)})
    schedule = rate(optim, jnp.float32(0.1), 10)
    applied = 0
    for scale in (1.0, np.nan, 1.0, np.inf, 1.0):
        before = state.trained["w"]
        state, metrics = step({}, state, {"scale": jnp.float32(scale)})
        assert float(metrics["lr"]) == pytest.approx(float(schedule(applied)))
        if np.isfinite(scale):
            # A constant gradient moves Adam by the rate itself.
            np.testing.assert_allclose(
                before - state.trained["w"], np.full(2, metrics["lr"]), rtol=1e-4
            )
            applied += 1


def test_a_batch_of_padding_alone_moves_nothing():
    adapted = toy.make()
    trained = adapted.init_trained(jax.random.key(0))
    step, state = bare(AdamW(**PLAIN), toy.model_of(adapted), cross_entropy, trained)
    state = state.replace(dials=adapted.dials())
    batch = toy.on_device(toy.batch(1, padding=8))
    after, metrics = step(adapted.frozen(), state, batch)
    assert bool(metrics["finite"])
    assert float(metrics["loss"]) == 0.0
    same(trained, after.trained)
