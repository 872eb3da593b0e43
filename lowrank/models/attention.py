"""Causal attention: rotations, who sees whom, and products over grouped heads.

Masks come from positions and segments rather than from places in a row, so that packed
sequences, padding on either side, and a cache of keys are one rule.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowrank.models.blocks import MASKED, softmax, wide
from lowrank.models.decoder_spec import RopeScaling


def frequencies(
    d_head: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    r"""Radians per position of each pair of numbers.

    .. math:: f_i = \theta^{-2i / d_{head}}

    "linear" divides all by the factor. "llama3" divides those that turn fewer than
    `low` times within the original length, leaves those that turn more than `high`
    times, and goes linearly, in turns, from one to the other.

    Source: Su et al., 2021, https://arxiv.org/abs/2104.09864, section 3.2.2; Llama 3.1:
    https://github.com/meta-llama/llama-models, `apply_scaling`.
    """
    plain = theta ** -(np.arange(0, d_head, 2) / d_head)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original * plain / (2 * math.pi)
    part = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return part * plain + (1.0 - part) * slow


def angles(
    positions: Int[Array, "batch seq"],
    radians: Float[np.ndarray, " half"],
    dtype: Any,
) -> Float[Array, "2 batch 1 seq half"]:
    """Cosine and sine of every pair's angle at every position."""
    per_position = jnp.asarray(radians, dtype)[None, None, None]
    turned = positions[:, None, :, None].astype(dtype) * per_position
    return jnp.stack([jnp.cos(turned), jnp.sin(turned)])


def rotate(
    x: Float[Array, "batch heads seq d_head"],
    turned: Float[Array, "2 batch 1 seq half"],
) -> Float[Array, "batch heads seq d_head"]:
    r"""Rotates pair (i, i + d/2) by its angle, as Hugging Face's checkpoints want it.

    .. math:: (x_1 \cos - x_2 \sin,\; x_2 \cos + x_1 \sin)

    The paper pairs neighbours; checkpoints in that order are to be permuted.
    """
    cos, sin = turned.astype(wide(x.dtype))
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(pair, axis=-1).astype(x.dtype)


def sees(
    queries: Int[Array, "batch seq"],
    keys: Int[Array, "batch keys"],
    real: Bool[Array, "batch keys"],
    segments: tuple[Int[Array, "batch seq"], Int[Array, "batch keys"]] | None = None,
) -> Bool[Array, "batch seq keys"]:
    """Who sees whom: real keys at no later position, of one's own segment.

    Args:
      queries, keys: Positions.
      real: Which keys are tokens and no filling.
      segments: Of queries and keys, where rows hold several sequences.
    """
    allowed = (keys[:, None, :] <= queries[:, :, None]) & real[:, None, :]
    if segments is not None:
        own, others = segments
        allowed &= own[:, :, None] == others[:, None, :]
    return allowed


def near(
    queries: Int[Array, "batch seq"], keys: Int[Array, "batch keys"], window: int
) -> Bool[Array, "batch seq keys"]:
    """Keys that lie less than `window` positions back."""
    return queries[:, :, None] - keys[:, None, :] < window


def bias_of(
    allowed: Bool[Array, "batch seq keys"], dtype: Any
) -> Float[Array, "batch 1 1 seq keys"]:
    """What is added to scores: 0 where a query may look, else very little."""
    return jnp.where(allowed, 0.0, MASKED).astype(dtype)[:, None, None]


def attend(
    q: Float[Array, "batch heads seq d_head"],
    k: Float[Array, "batch kv_heads keys d_head"],
    v: Float[Array, "batch kv_heads keys d_head"],
    bias: Float[Array, "batch 1 1 seq keys"],
    *,
    scale: float,
    softcap: float | None = None,
    precision: Any = None,
) -> Float[Array, "batch heads seq d_head"]:
    r"""Attention of groups of query heads to the key head that they share.

    .. math:: softmax(cap(\text{scale} \cdot q k^T) + bias)\, v,
              \quad cap(s) = c \tanh(s / c)

    On a GPU, without a soft-cap and at the backend's own precision, it is
    `jax.nn.dot_product_attention`; elsewhere products run in (batch, head, seq, dim)
    order, for which XLA:CPU has batched matrix products. Scores are float32 at least.

    Source: Ainslie et al., 2023, https://arxiv.org/abs/2305.13245; soft-caps: Gemma 2,
    https://arxiv.org/abs/2408.00118, section 2.
    """
    batch, heads, seq, d_head = q.shape
    groups = k.shape[1]
    if softcap is None and precision is None and jax.default_backend() == "gpu":
        turn = lambda x: x.transpose(0, 2, 1, 3)
        mixed = jax.nn.dot_product_attention(
            turn(q), turn(k), turn(v), mask=bias[:, 0] > 0.5 * MASKED, scale=scale
        )
        return turn(mixed)
    # Scaling the query costs seq x d_head products a head, not seq x keys.
    q = (q * scale).reshape(batch, groups, heads // groups, seq, d_head)
    scores = jnp.einsum(
        "bgmqd,bgkd->bgmqk",
        q,
        k,
        precision=precision,
        preferred_element_type=bias.dtype,
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = softmax(scores + bias).astype(v.dtype)
    mixed = jnp.einsum("bgmqk,bgkd->bgmqd", weights, v, precision=precision)
    return mixed.reshape(batch, heads, seq, d_head)
