"""Parameter trees as flat mappings from joined path to leaf, and facts about them.

The three trees of a run are flat: `frozen` and `trained` can then be merged with
``|``, cut by pattern and written to a file without a model at hand. `flatten` keeps
the structure aside so that the model gets back exactly the tree it knows.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput
from lowrank.core.paths import path_of


class Structure:
    """How to put a flat mapping back into the tree it came from."""

    def __init__(self, treedef: Any, paths: tuple[str, ...]):
        self.treedef = treedef
        self.paths = paths

    def unflatten(self, leaves: Mapping[str, Any]) -> PyTree:
        """The tree with the leaf of every path taken from `leaves`."""
        return jax.tree.unflatten(self.treedef, [leaves[path] for path in self.paths])


def flatten(tree: PyTree) -> tuple[dict[str, Any], Structure]:
    """Splits `tree` into {joined path: leaf} and its structure.

    Raises:
      BadInput: Two leaves have the same joined path, as when a key contains "/".
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat: dict[str, Any] = {}
    for keys, leaf in pairs:
        path = path_of(keys)
        if path in flat:
            raise BadInput(
                f"two weights share the joined path {path!r}; rename one of the keys "
                "(a key may contain '/', but joined paths must be unique)"
            )
        flat[path] = leaf
    return flat, Structure(treedef, tuple(flat))


def count(tree: PyTree) -> int:
    """Number of scalars in the arrays of `tree`; needs shapes only."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes held by the arrays of `tree`; needs shapes and dtypes only."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def shapes_of(tree: PyTree) -> PyTree:
    """The tree with every array replaced by its `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def fingerprint(tree: PyTree, read: Callable[[Any], Any] = jax.device_get) -> str:
    """sha256 over path, dtype, shape and bytes of every leaf, in path order.

    The same values give the same fingerprint whatever device or sharding holds
    them, so it tells whether two runs start from the same base.

    Args:
      tree: The leaves.
      read: Brings a leaf to the host, whole.
    """
    digest = hashlib.sha256()
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in sorted((path_of(keys), leaf) for keys, leaf in pairs):
        digest.update(leaf_digest(path, leaf, read).encode())
    return digest.hexdigest()


def leaf_digest(
    path: str, leaf: Any, read: Callable[[Any], Any] = jax.device_get
) -> str:
    """sha256 of one named leaf: its path, dtype, shape and bytes."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(read(leaf))
    digest = hashlib.sha256(f"{path}\0{array.dtype}\0{array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
