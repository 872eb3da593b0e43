"""Random keys derived from a root seed and from names, never from an order.

Adding a site, a layer or a component must not change what the others draw, so a
key is folded from the *name* of what it is for, not split off a running stream.
"""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lowrank.core.arrays import Key
from lowrank.core.errors import BadInput


def name_hash(name: str) -> int:
    """A 31-bit number for `name`, the same in every process and version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def key_for(root: Key, *names: str | int | Int[Array, ""]) -> Key:
    """Folds each of `names` into `root`, in order.

    Text is hashed; integers (a layer, a step) are folded as they are.

    Raises:
      BadInput: `root` is an array of raw key data, as `jax.random.PRNGKey` gives.
    """
    if not jax.dtypes.issubdtype(root.dtype, jax.dtypes.prng_key):
        raise BadInput(
            "a random key is made by jax.random.key(seed), not an array of "
            f"{root.dtype}; wrap raw key data with jax.random.wrap_key_data"
        )
    for name in names:
        data = name_hash(name) if isinstance(name, str) else name
        root = jax.random.fold_in(root, data)
    return root


def numbered_keys(key: Key, count: int) -> Array:
    """`count` keys of which the first n do not depend on `count`.

    `jax.random.split` makes no such promise; initial factors need it, so that a
    component starts from the same values whatever `max_rank` is.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))
