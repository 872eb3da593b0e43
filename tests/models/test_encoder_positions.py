"""Which rows of the position table an encoder reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.models.encoder import Embeddings
from lowrank.models.zoo import SIZES


def test_tokens_are_counted_from_behind_the_padding_id():
    """pad_id = 1: padding is at 1, and the first real token at 2, wherever it is."""
    shape = dataclasses.replace(SIZES["tiny_test"], positions="tokens", pad_id=1)
    model = Embeddings(shape, jnp.float32)
    ids = jnp.array([[1, 1, 5, 6], [5, 6, 1, 1]])
    params = model.init(jax.random.key(0), ids, jnp.zeros((1, 1), jnp.int32))["params"]
    table = params["position"]["embedding"]
    assert table.shape[0] == shape.max_positions + 2
    found = model.apply({"params": params}, ids, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(found[0, 2:], found[1, :2], atol=1e-6)
    x = params["word"]["embedding"][jnp.array([1, 1, 5, 6])]
    x += table[jnp.array([1, 1, 2, 3])] + params["token_type"]["embedding"][:1]
    mean, spread = x.mean(1, keepdims=True), x.std(1, keepdims=True)
    np.testing.assert_allclose(found[0], (x - mean) / spread, atol=1e-3)
