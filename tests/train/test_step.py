"""One step: exact under accumulation and padding, untouched by what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step


def one_step(optim, batch, dropout=0.0, change=None):
    adapted = toy.make(dropout)
    model = toy.model_of(adapted)
    step = make_step(model, cross_entropy, optim, 10, draws=adapted.draws)
    state = states.start(adapted.init_trained, adapted.dials(), [optim], [0])
    state = change(state) if change else state
    packed = jax.jit(over_trials(step, 1))
    return state, *packed(adapted.frozen(), state, toy.on_device(toy.stack([batch])))


def close(one, two, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), one, two
    )


def test_micro_batches_equal_one_large_batch():
    batch = toy.batch(1, rows=12)
    _, whole, m1 = one_step(AdamW(eps=1e-3), batch)
    _, parts, m2 = one_step(AdamW(eps=1e-3, accumulate=3), batch)
    close(whole.trained, parts.trained, rtol=1e-5)
    close(m1, m2, rtol=1e-5)


def test_padding_rows_change_nothing():
    full = toy.batch(1, rows=8, padding=3)
    short = {name: value[:5] for name, value in full.items()}
    _, one, _ = one_step(AdamW(eps=1e-3), full)
    _, two, _ = one_step(AdamW(eps=1e-3), short)
    close(one.trained, two.trained, rtol=1e-5)


def test_the_gradient_norm_is_before_clipping():
    _, _, metrics = one_step(AdamW(clip=1e-3), toy.batch(1))
    assert float(metrics["grad_norm"][0]) > 1e-2


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(poison):
    batch = toy.batch(1)
    batch["weight"][0] = poison
    before, after, metrics = one_step(AdamW(), batch)
    assert not bool(metrics["finite"][0])
    assert int(after.skipped[0]) == 1
    assert int(after.step) == 1
    for name in ("trained", "opt"):
        same = jax.tree.map(
            lambda a, b: np.array_equal(a, b),
            getattr(before, name),
            getattr(after, name),
        )
        assert jax.tree.all(same), name


def test_dropout_draws_anew_in_every_step_and_only_then():
    def at(step):
        return lambda state: state.replace(
            step=jnp.int32(step), trained=jax.tree.map(lambda x: x + 0.3, state.trained)
        )

    batch = toy.batch(1)
    loss = lambda step, rate: float(
        one_step(AdamW(), batch, dropout=rate, change=at(step))[2]["loss"][0]
    )
    assert loss(0, 0.5) == loss(0, 0.5)
    assert loss(0, 0.5) != loss(1, 0.5)
    assert loss(0, 0.0) == loss(1, 0.0)
