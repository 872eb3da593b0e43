"""The oracle a user can run sees errors, and only errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.adapt import verify
from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.core.errors import LowrankError
from lowrank.deltas.lora import LoRA

X = jnp.linspace(-1, 1, 18).reshape(3, 6)
W = jnp.linspace(-1, 1, 48).reshape(6, 8)
RULES = [Rule("w", LoRA(), rank=2)]


class Deaf(LoRA):
    """A delta whose use and dense form disagree."""

    def __call__(self, call):
        return call.product() + 0.99 * (super().__call__(call) - call.product())


class Numb(LoRA):
    """A delta with right outputs and wrong gradients."""

    def __call__(self, call):
        y = super().__call__(call)
        return y - 0.5 * (y - jax.lax.stop_gradient(y))


def test_a_right_delta_passes():
    adapted = attach(lambda p, x: x @ p["w"], {"w": W}, X, rules=RULES)
    report = adapted.verify(jax.random.key(0), X)
    assert 0 < max(report.output_error, report.gradient_error) <= 1e-5


@pytest.mark.parametrize("delta", [Deaf(), Numb()])
def test_a_wrong_delta_is_caught(delta):
    rules = [Rule("w", delta, rank=2)]
    adapted = attach(lambda p, x: x @ p["w"], {"w": W}, X, rules=rules)
    with pytest.raises(LowrankError, match="departs from the merged one"):
        adapted.verify(jax.random.key(0), X, tolerance=1e-3)


def test_not_a_number_is_no_agreement():
    adapted = attach(lambda p, x: x @ p["w"] * jnp.nan, {"w": W}, X, rules=RULES)
    with pytest.raises(LowrankError, match="nan"):
        adapted.verify(jax.random.key(0), X)


def test_gradients_that_are_zero_in_theory_raise_no_alarm():
    """An attention key's bias moves all scores of a row alike: softmax ignores it."""
    model = nn.MultiHeadDotProductAttention(2, qkv_features=8)
    x = jnp.sin(jnp.arange(48.0)).reshape(2, 4, 6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape)), shapes)
    apply = lambda p, x: model.apply({"params": p}, x)
    rules = [Train("**/bias"), Rule("**/kernel", LoRA(), rank=2)]
    attach(apply, params, x, rules=rules).verify(jax.random.key(0), x)


def test_distance_measures_each_leaf_by_its_own_size():
    big, small = np.full(3, 100.0), np.full(3, 10.0)
    ours = {"big": big, "small": small * 1.01}
    assert verify.distance(ours, {"big": big, "small": small}) == pytest.approx(0.01)


def test_distance_knows_infinities_and_nan():
    logits = np.array([1.0, -np.inf])
    assert verify.distance([logits], [logits]) == 0
    assert np.isnan(verify.distance([np.array([np.nan])], [np.array([1.0])]))
    assert not verify.distance([np.array([1.0, 2.0])], [logits]) < 1e9
    assert verify.distance([np.array([1e-9])], [np.array([0.0])]) > 1
