"""A mixture of experts: every token goes to a few feed-forward parts, no token is lost.

Tokens are sorted by expert, and one ragged product per map serves all experts: as many
operations as tokens have experts, whatever the number of these.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lowrank.models.blocks import ACTIVATIONS, wide
from lowrank.models.decoder_spec import DecoderSpec


class Experts(nn.Module):
    r"""The feed-forward part of a layer with experts.

    .. math:: \sum_{e \in top_k(p)} w_e\,
              W^e_{down} (act(W^e_{gate} x) \odot W^e_{up} x),
              \quad p = softmax(W_{router}\, x)

    w is p itself, or p over its sum among the chosen (`norm_experts`). The router is
    computed in float32 at least. Without a loss that balances the load: the router of a
    base is frozen.

    Source: Jiang et al., 2024, https://arxiv.org/abs/2401.04088, section 2.1

    Attributes:
      spec, dtype, precision: As in `decoder.Decoder`.
    """

    spec: DecoderSpec
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        shape = self.spec
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self._routed(rows)
        each = shape.experts_per_token
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=shape.num_experts)
        sizes = sizes.astype(jnp.int32)
        token = order // each
        act = ACTIVATIONS[shape.activation]
        sorted_rows = rows[token]
        up = self._map("up", shape.d_ff, sorted_rows, sizes)
        gate = self._map("gate", shape.d_ff, sorted_rows, sizes)
        out = self._map("down", shape.d_model, act(gate) * up, sizes)
        out *= weights.reshape(-1)[order][:, None].astype(out.dtype)
        return jnp.zeros_like(rows).at[token].add(out).reshape(x.shape)

    def _routed(self, rows: Array) -> tuple[Array, Array]:
        """Weights and numbers of every token's experts."""
        shape = self.spec
        router = nn.Dense(
            shape.num_experts,
            use_bias=False,
            dtype=wide(self.dtype),
            precision=self.precision,
            kernel_init=nn.initializers.normal(shape.init_stddev),
            name="router",
        )
        likely = jax.nn.softmax(router(rows), axis=-1)
        weights, chosen = jax.lax.top_k(likely, shape.experts_per_token)
        if shape.norm_experts:
            weights /= weights.sum(axis=-1, keepdims=True)
        return weights, chosen

    def _map(self, name: str, d_out: int, rows: Array, sizes: Array) -> Array:
        """Every row through the map of its expert."""
        shape = (self.spec.num_experts, rows.shape[-1], d_out)
        kernel = _Stack(shape, self.spec.init_stddev, name=name)()
        return jax.lax.ragged_dot(
            rows.astype(self.dtype),
            kernel.astype(self.dtype),
            sizes,
            precision=self.precision,
        )


class _Stack(nn.Module):
    """One kernel per expert, under a name of its own."""

    shape: tuple[int, int, int]
    init_stddev: float

    @nn.compact
    def __call__(self) -> Float[Array, "experts d_in d_out"]:
        fresh = nn.initializers.normal(self.init_stddev)
        return self.param("kernel", fresh, self.shape)
