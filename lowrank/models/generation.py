"""Text token by token: a prompt is read once, then every token with a cache of keys.

A way to choose is a function (logits, keys) -> tokens: `greedy`, or what `sampling`
returns. Everything is traced: one program for any prompts of a shape, and under `vmap`
for the trials of a pack.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lowrank.core.errors import BadInput
from lowrank.models.decoder import Cache

#: (batch, cache) -> logits of every token, or of the places "at" that the batch names,
#: one per row; and the cache with them.
Read = Callable[[Mapping[str, Any], Cache], tuple[Array, Cache]]
#: (logits, a key per row) -> tokens.
Choose = Callable[
    [Float[Array, "batch vocab"], Key[Array, " batch"]], Int[Array, " batch"]
]


def greedy(
    logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]
) -> Int[Array, " batch"]:
    """The likeliest token; of equal ones the first."""
    del keys
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sampling(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Choose:
    r"""Draws from :math:`softmax(logits / T)`, cut to its likeliest tokens.

    Args:
      temperature: T.
      top_k: Only the k likeliest tokens; None: all.
      top_p: Only as many of the likeliest as together have this probability, at least
        one; None: all. Cut after `top_k`.

    Source: Holtzman et al., 2020, https://arxiv.org/abs/1904.09751

    Raises:
      BadInput: A number is out of its range.
    """
    if not temperature > 0:
        raise BadInput(
            f"temperature = {temperature} must be positive; the likeliest token always "
            "is generation by `greedy`"
        )
    if top_k is not None and top_k < 1:
        raise BadInput(f"top_k = {top_k} must be at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"top_p = {top_p} must be above 0 and at most 1, or None")

    def choose(
        logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]
    ) -> Int[Array, " batch"]:
        logits = logits / temperature
        if top_k is not None and top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if top_p is not None:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            likely = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(likely, axis=-1) - likely
            least = jnp.where(before < top_p, ranked, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        # By rows: who else is answered at the same time decides nothing.
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    return choose


def generate(
    read: Read,
    prompts: Mapping[str, Any],
    cache: Cache,
    *,
    steps: int,
    end: Int[Array, " ends"],
    pad: int,
    choose: Choose = greedy,
    key: Key[Array, "*rows"] | None = None,
) -> tuple[Int[Array, "batch steps"], Bool[Array, "batch steps"]]:
    """Goes on where prompts end, until every row has ended or `steps` are done.

    Args:
      read: The model.
      prompts: "ids" and "mask", (batch, seq), padded on either side.
      cache: Empty, with room for the prompts and `steps` tokens.
      steps: The most tokens.
      end: Tokens that end a row.
      pad: Stands where a row has ended.
      choose: How tokens are chosen.
      key: For choices that draw: one, or one per row.

    Returns:
      Tokens, the ending one among them, and which of them are real.
    """
    key = jax.random.key(0) if key is None else key
    fold = jax.random.fold_in
    prompts = {name: jnp.asarray(x) for name, x in prompts.items()}
    mask = prompts["mask"]
    batch, seq = mask.shape
    if (places := cache.real.shape[1]) < seq + steps:
        raise BadInput(
            f"a cache of {places} places does not hold prompts of {seq} and {steps} "
            f"tokens more; make one of {seq + steps}"
        )
    keys = key if key.ndim else jax.vmap(fold, (None, 0))(key, jnp.arange(batch))
    # The last real token, whichever side the padding is on.
    last = seq - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    logits, cache = read({**prompts, "at": last}, cache)
    logits = logits[:, 0]

    def unfinished(state: tuple) -> Array:
        number, _, ended, *_ = state
        return (number < steps) & ~jnp.all(ended)

    def step(state: tuple) -> tuple:
        number, logits, ended, cache, ids, real = state
        chosen = choose(logits, jax.vmap(fold, (0, None))(keys, number))
        chosen = jnp.where(ended, pad, chosen)
        ids = ids.at[:, number].set(chosen)
        real = real.at[:, number].set(~ended)
        one = {"ids": chosen[:, None], "mask": ~ended[:, None]}
        ended |= jnp.any(chosen[:, None] == end[None], axis=1)
        logits, cache = read(one, cache)
        return number + 1, logits[:, 0], ended, cache, ids, real

    ids = jnp.full((batch, steps), pad, jnp.int32)
    start = (
        jnp.zeros((), jnp.int32),
        logits,
        ~jnp.any(mask, axis=1),
        cache,
        ids,
        jnp.zeros(ids.shape, jnp.bool_),
    )
    *_, ids, real = jax.lax.while_loop(unfinished, step, start)
    return ids, real
