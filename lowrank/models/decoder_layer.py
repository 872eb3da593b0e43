"""The layer of a causal decoder: attention, then feed-forward or experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lowrank.models.attention import attend, rotate
from lowrank.models.blocks import ACTIVATIONS, LayerNorm, RMSNorm
from lowrank.models.decoder_spec import DecoderSpec
from lowrank.models.experts import Experts

#: What a layer may see and how it is rotated: for all tokens, and for those nearby.
View = tuple[Any, Any]


def norm(shape: DecoderSpec, dtype: Any, name: str) -> nn.Module:
    """The normalization that a decoder has everywhere."""
    if shape.norm == "layer":
        return LayerNorm(shape.norm_eps, dtype, name=name)
    return RMSNorm(shape.norm_eps, dtype, shape.norm_offset, name=name)


class _Part(nn.Module):
    """What the parts of a layer have in common."""

    spec: DecoderSpec
    dtype: Any
    precision: Any

    def _norm(self, name: str) -> nn.Module:
        return norm(self.spec, self.dtype, name)

    def _linear(self, name: str, d_out: int, bias: bool) -> nn.Module:
        return nn.Dense(
            d_out,
            use_bias=bias,
            dtype=self.dtype,
            precision=self.precision,
            kernel_init=nn.initializers.normal(self.spec.init_stddev),
            name=name,
        )

    def _added(self, x: Array, y: Array) -> Array:
        """The residual stream with a part's answer."""
        return x + (self._norm("post_norm")(y) if self.spec.post_norms else y)


class Attention(_Part):
    """Causal self-attention of grouped heads, normalized before; with residual."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        bias: Float[Array, "batch 1 1 seq places"],
        turned: Float[Array, "2 batch 1 seq half"] | None,
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Float[Array, "batch seq d_model"], tuple[Array, Array] | None]:
        shape = self.spec
        q, k, v = self._heads(self._norm("norm")(x))
        if shape.qk_norm:
            q, k = self._norm("query_norm")(q), self._norm("key_norm")(k)
        if turned is not None:
            q, k = rotate(q, turned), rotate(k, turned)
        kept = None
        if past is not None:
            *stored, length = past
            k, v = (
                _put(old, new, length) for old, new in zip(stored, (k, v), strict=True)
            )
            kept = k, v
        mixed = attend(
            q,
            k,
            v,
            bias,
            scale=shape.scale,
            softcap=shape.attention_softcap,
            precision=self.precision,
        )
        mixed = mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        out = self._linear("output", shape.d_model, shape.output_bias)(mixed)
        return self._added(x, out), kept

    def _heads(self, x: Array) -> list[Array]:
        """Queries, keys and values in (batch, head, seq, dim) order."""
        shape = self.spec
        counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        widths = [count * shape.d_head for count in counts]
        if shape.fused_qkv:
            joined = self._linear("qkv", sum(widths), shape.qkv_bias)(x)
            parts = jnp.split(joined, [widths[0], widths[0] + widths[1]], axis=-1)
        else:
            parts = [
                self._linear(name, width, shape.qkv_bias)(x)
                for name, width in zip(("query", "key", "value"), widths, strict=True)
            ]
        return [
            part.reshape(*x.shape[:2], count, shape.d_head).transpose(0, 2, 1, 3)
            for part, count in zip(parts, counts, strict=True)
        ]


def _put(old: Array, new: Array, length: Array) -> Array:
    """A cache with new entries behind those that it has."""
    new = new.astype(old.dtype)
    return jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=2)


class FeedForward(_Part):
    r"""Token by token, normalized before; with residual.

    .. math:: x + W_{down}\, (act(W_{gate}\, x) \odot W_{up}\, x)

    Without a gate it is :math:`x + W_{down}\, act(W_{up}\, x)`.

    Source: Shazeer, 2020, https://arxiv.org/abs/2002.05202, equation 6
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        shape = self.spec
        y = self._norm("norm")(x)
        if shape.num_experts:
            experts = Experts(shape, self.dtype, self.precision, name="experts")
            return self._added(x, experts(y))
        act = ACTIVATIONS[shape.activation]
        hidden = self._linear("up", shape.d_ff, shape.mlp_bias)(y)
        if shape.gated:
            hidden *= act(self._linear("gate", shape.d_ff, shape.mlp_bias)(y))
        else:
            hidden = act(hidden)
        out = self._linear("down", shape.d_model, shape.mlp_bias)(hidden)
        return self._added(x, out)


class Layer(_Part):
    """Attention, then the feed-forward part; shaped for `nn.scan`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        views: tuple[View, View],
        length: Int[Array, ""] | None,
        local: Bool[Array, ""] | bool,
        past: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "batch seq d_model"], tuple[Array, Array] | None]:
        bias, turned = (_chosen(local, *view) for view in views)
        common = (self.spec, self.dtype, self.precision)
        own = None if past is None or length is None else (*past, length)
        x, kept = Attention(*common, name="attention")(x, bias, turned, own)
        return FeedForward(*common, name="mlp")(x), kept


def _chosen(local: Array | bool, whole: Any, nearby: Any) -> Any:
    if isinstance(local, bool):
        return nearby if local else whole
    return None if whole is None else jnp.where(local, nearby, whole)
