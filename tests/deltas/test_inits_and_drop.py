"""Factors start component by component; dropout keeps means and dies cleanly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.deltas import inits
from lowrank.deltas.base import drop

KEY = jax.random.key(3)


@pytest.mark.parametrize("draw", [inits.uniform(9), inits.normal(0.5)])
def test_components_do_not_depend_on_their_number(draw):
    few, many = draw(KEY, (2, 3, 3)), draw(KEY, (7, 3, 3))
    np.testing.assert_array_equal(few, many[:2])
    assert len({row.tobytes() for row in np.asarray(many)}) == 7


def test_uniform_is_bounded_by_the_root_of_its_inputs():
    drawn = inits.uniform(16)(KEY, (8, 5000))
    assert float(jnp.abs(drawn).max()) == pytest.approx(0.25, rel=1e-3)
    assert float(drawn.std()) == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.005)


def test_normal_has_its_deviation():
    drawn = inits.normal(0.5)(KEY, (8, 5000))
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.02)


def test_zeros_are_zero():
    assert not jnp.any(inits.zeros(KEY, (3, 4)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropping_keeps_the_mean(rate):
    x = jnp.linspace(0.5, 2.0, 4)
    keys = jax.random.split(KEY, 20000)
    mean = jax.vmap(lambda key: drop(x, jnp.float32(rate), key))(keys).mean(0)
    np.testing.assert_allclose(mean, x, rtol=0.08)


def test_survivors_are_scaled_up_and_the_others_are_zero():
    y = drop(jnp.ones(1000), jnp.float32(0.75), KEY)
    assert {float(v) for v in np.unique(y)} == {0.0, 4.0}
    assert float((y == 0).mean()) == pytest.approx(0.75, abs=0.05)


def test_a_rate_of_zero_changes_no_bit():
    x = jax.random.normal(KEY, (50,))
    np.testing.assert_array_equal(drop(x, jnp.float32(0.0), KEY), x)


def test_a_rate_of_one_gives_zeros_and_zero_gradients():
    x = jnp.ones(20)
    run = lambda x: drop(x, jnp.float32(1.0), KEY)
    assert not jnp.any(run(x))
    assert not jnp.any(jax.grad(lambda x: run(x).sum())(x))


def test_dropping_keeps_the_dtype():
    assert drop(jnp.ones(3, jnp.bfloat16), jnp.float32(0.5), KEY).dtype == jnp.bfloat16
