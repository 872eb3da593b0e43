"""Experts against a loop over tokens in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.models.decoder_spec import DecoderSpec
from lowrank.models.experts import Experts

SPEC = DecoderSpec(
    vocab_size=10, d_model=6, num_layers=1, num_heads=1, num_kv_heads=1, d_head=6,
    d_ff=5, max_positions=8, num_experts=4, experts_per_token=2, init_stddev=0.7,
)  # fmt: skip
X = jax.random.normal(jax.random.key(0), (2, 7, 6))


def by_hand(params, x, norm):
    weight = lambda name: np.asarray(params[name]["kernel"], np.float64)
    silu = lambda z: z / (1 + np.exp(-z))
    out = np.zeros(x.shape)
    for row in np.ndindex(x.shape[:2]):
        token = np.asarray(x[row], np.float64)
        scores = token @ weight("router")
        likely = np.exp(scores - scores.max())
        likely /= likely.sum()
        chosen = np.argsort(-likely)[: SPEC.experts_per_token]
        whole = likely[chosen].sum() if norm else 1.0
        for expert in chosen:
            gate, up = (token @ weight(name)[expert] for name in ("gate", "up"))
            own = (silu(gate) * up) @ weight("down")[expert]
            out[row] += likely[expert] / whole * own
    return out


@pytest.mark.parametrize("norm", [True, False])
def test_every_token_meets_its_experts(norm):
    shape = dataclasses.replace(SPEC, norm_experts=norm)
    layer = Experts(shape, jnp.float32, "highest")
    params = layer.init(jax.random.key(1), X)
    got = layer.apply(params, X)
    np.testing.assert_allclose(got, by_hand(params["params"], X, norm), atol=1e-5)


def test_no_token_is_lost_when_all_go_to_one_expert():
    layer = Experts(SPEC, jnp.float32, "highest")
    params = layer.init(jax.random.key(1), X)
    kernel = params["params"]["router"]["kernel"]
    params["params"]["router"]["kernel"] = jnp.zeros_like(kernel)
    same = jnp.broadcast_to(X[:1, :1], X.shape)
    got = np.asarray(layer.apply(params, same))
    want = by_hand(params["params"], np.asarray(same), True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got).min(axis=-1).max() > 0
