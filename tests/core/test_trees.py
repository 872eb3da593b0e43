"""Trees come apart and together again; a fingerprint sees every change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.core.trees import count, fingerprint, flatten, nbytes, shapes_of

TREE = {
    "a": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
    "b": [np.int32(4), jnp.ones(2, jnp.bfloat16)],
}


def test_flattening_is_undone_by_its_structure():
    flat, structure = flatten(TREE)
    assert list(flat) == ["a/w", "b/0", "b/1"]
    back = structure.unflatten({path: flat[path] for path in reversed(flat)})
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    assert back["b"][1] is TREE["b"][1]


def test_a_shared_joined_path_is_refused():
    with pytest.raises(BadInput, match="'a/b'"):
        flatten({"a": {"b": 1}, "a/b": 2})


def test_counting_needs_shapes_only():
    shapes = shapes_of({"w": jnp.ones((2, 3), jnp.bfloat16), "s": jnp.float32(1)})
    assert count(shapes) == 7
    assert nbytes(shapes) == 16


def test_a_fingerprint_is_of_values_not_of_holders():
    host = jax.tree.map(np.asarray, TREE)
    assert fingerprint(TREE) == fingerprint(host)
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("d",))
    spread = jax.NamedSharding(mesh, jax.P("d"))
    x = np.arange(8.0, dtype=np.float32)
    assert fingerprint({"x": jax.device_put(x, spread)}) == fingerprint({"x": x})
    back = np.arange(6.0, dtype=np.float32).reshape(3, 2).T
    assert fingerprint({"x": back}) == fingerprint({"x": back.copy()})
    assert fingerprint({"b": x, "a": x}) == fingerprint({"a": x, "b": x})


CHANGES = [
    {"x": np.zeros(3, np.float32)},
    {"y": np.zeros(3, np.float32)},
    {"x": np.zeros(3, np.int32)},
    {"x": np.zeros((3, 1), np.float32)},
    {"x": np.array([0, 0, -0.0], np.float32)},
    {"x": np.zeros(6, ml_dtypes.bfloat16)},
    {"x": np.zeros(1, np.float32)},
    {"x": np.float32(0)},
    {"x": np.zeros((0, 3), np.float32)},
    {"x": np.zeros(3, np.float32), "y": np.zeros(0, np.float32)},
    {"x": jax.random.key(0)},
    {"x": jax.random.key(1)},
]


def test_a_fingerprint_sees_every_change():
    prints = [fingerprint(tree) for tree in CHANGES]
    assert len(set(prints)) == len(CHANGES)
