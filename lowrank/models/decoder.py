"""A causal decoder and the language model on top of it; `decoder_spec` has the flags.

Paths of its weights, with layers scanned (one stacked leaf) or unrolled (layer_3):

  decoder/embeddings/{token,position}/embedding        position: learned ones only
  decoder/layer/attention/norm/{scale,bias}
  decoder/layer/attention/{query,key,value,output}/{kernel,bias}
  decoder/layer/attention/qkv/{kernel,bias}            fused_qkv
  decoder/layer/attention/{query_norm,key_norm,post_norm}/scale
  decoder/layer/mlp/norm/{scale,bias}
  decoder/layer/mlp/{gate,up,down}/{kernel,bias}
  decoder/layer/mlp/experts/router/kernel
  decoder/layer/mlp/experts/{gate,up,down}/kernel      one matrix per expert
  decoder/layer/mlp/post_norm/scale
  decoder/norm/{scale,bias}
  head/kernel                                          untied
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lowrank.core.errors import BadInput
from lowrank.models.attention import angles, bias_of, frequencies, near, sees
from lowrank.models.blocks import wide
from lowrank.models.decoder_layer import Layer, View, norm
from lowrank.models.decoder_spec import DecoderSpec
from lowrank.models.head import MOST_LOGITS, label_scores
from lowrank.models.options import (
    PAIRED,
    Precision,
    check_choice,
    compute_dtype,
    rematerialized,
)

#: See `options.PAIRED`; rows of the vocabulary, and the width of its vectors.
PARTITION = (
    *PAIRED,
    ("decoder/embeddings/*/embedding", ("tensor", "fsdp")),
    ("head/kernel", ("fsdp", "tensor")),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of what a decoder has read: a tree of arrays, or of shapes.

    Attributes:
      keys, values: Of every layer, (layers, batch, kv_heads, places, d_head).
      positions: Of every place in its sequence, (batch, places).
      real: Which places hold a token, (batch, places).
      length: Places that are taken, the same in every row.
    """

    keys: Any
    values: Any
    positions: Any
    real: Any
    length: Any


def empty_cache(
    shape: DecoderSpec, batch: int, places: int, dtype: str = "float32"
) -> Cache:
    """A cache with room for `places` tokens in every row."""
    size = (shape.num_layers, batch, shape.num_kv_heads, places, shape.d_head)
    zeros = jnp.zeros(size, compute_dtype(dtype))
    return Cache(
        keys=zeros,
        values=zeros,
        positions=jnp.zeros((batch, places), jnp.int32),
        real=jnp.zeros((batch, places), jnp.bool_),
        length=jnp.zeros((), jnp.int32),
    )


class Embeddings(nn.Module):
    """Token vectors, with learned positions added where there are some.

    An id outside the vocabulary gives NaN, never another token's vector.
    """

    spec: DecoderSpec
    dtype: Any

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch seq"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq d_model"]:
        shape = self.spec

        def rows(name: str, count: int, index: Array) -> Array:
            table = nn.Embed(
                count,
                shape.d_model,
                dtype=self.dtype,
                embedding_init=nn.initializers.normal(shape.init_stddev),
                name=name,
            )
            return table(index)

        x = rows("token", shape.vocab_size, ids)
        if shape.embed_scale:
            # Rounded to the compute dtype, as the checkpoints were trained.
            x *= jnp.asarray(shape.d_model**0.5, self.dtype)
        if shape.positions == "learned":
            x += rows("position", shape.max_positions, positions)
        return x


class Decoder(nn.Module):
    """Token ids to normalized hidden states.

    Attributes:
      spec: The decoder's shape.
      scan, remat, dtype, precision: As in `encoder.Encoder`.
    """

    spec: DecoderSpec
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    precision: str | None = None

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        mask: Bool[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segments: Int[Array, "batch seq"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], Cache | None]:
        """Hidden states, and the cache with what was read.

        Args:
          ids: Tokens.
          mask: True on real ones.
          positions: Of every token in its sequence; None: real ones are counted, from
            where the cache ends.
          segments: Numbers of the sequences that share a row; None: one per row.
          cache: What was read before; None: nothing, and nothing is kept.
        """
        check_choice("precision", self.precision, Precision)
        if cache is not None and segments is not None:
            raise BadInput(
                "segments do not go with a cache, which holds one sequence per row"
            )
        shape, dtype = self.spec, compute_dtype(self.dtype)
        if positions is None:
            positions = counted(mask, cache)
        x = Embeddings(shape, dtype, name="embeddings")(ids, positions)
        keys, real = positions, mask
        if cache is not None:
            at = cache.length
            keys, real = (
                jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
                for old, new in ((cache.positions, positions), (cache.real, mask))
            )
        views = self._views(positions, keys, real, segments)
        past = None if cache is None else (cache.keys, cache.values)
        length = None if cache is None else cache.length
        x, kept = self._layers(x, views, length, past)
        x = norm(shape, dtype, "norm")(x)
        if cache is None:
            return x, None
        taken = cache.length + ids.shape[1]
        return x, Cache(*kept, positions=keys, real=real, length=taken)

    def _views(
        self, positions: Array, keys: Array, real: Array, segments: Array | None
    ) -> tuple[View, View]:
        """What layers add to scores, and how they rotate: global ones, and local."""
        shape, dtype = self.spec, wide(compute_dtype(self.dtype))
        pair = None if segments is None else (segments, segments)
        allowed = sees(positions, keys, real, pair)
        bias = nearby = bias_of(allowed, dtype)
        if shape.window is not None:
            nearby = bias_of(allowed & near(positions, keys, shape.window), dtype)
        if shape.positions == "learned":
            return (bias, nearby), (None, None)
        turned = turned_nearby = angles(
            positions, frequencies(shape.d_head, shape.theta, shape.rope_scaling), dtype
        )
        if shape.local_theta is not None:
            radians = frequencies(shape.d_head, shape.local_theta)
            turned_nearby = angles(positions, radians, dtype)
        return (bias, nearby), (turned, turned_nearby)

    def _layers(
        self, x: Array, views: tuple[View, View], length: Array | None, past: Any
    ) -> tuple[Array, Any]:
        shape = self.spec
        common = (shape, compute_dtype(self.dtype), self.precision)
        layer = rematerialized(Layer, self.remat, self.scan)
        if self.scan:
            mixed = len({*shape.local_layers}) > 1
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0 if mixed else nn.broadcast, 0),  # type: ignore[arg-type]
                length=shape.num_layers,
            )
            local = jnp.array(shape.local_layers) if mixed else shape.local_layers[0]
            return stack(*common, name="layer")(x, views, length, local, past)
        kept = []
        for index, local in enumerate(shape.local_layers):
            own = jax.tree.map(lambda leaf, n=index: leaf[n], past)
            one = layer(*common, name=f"layer_{index}")
            x, new = one(x, views, length, local, own)
            kept.append(new)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *kept)


class LanguageModel(nn.Module):
    """A decoder and its head.

    A batch is a mapping with "ids" (int, (batch, seq)), "mask" (bool, the same shape,
    True on real tokens), and optionally "positions" and "segments" (int); other keys
    are ignored.

    Attributes:
      spec, scan, remat, dtype, precision: As in `Decoder`.
      most_logits: Logits that exist at once while scores are computed, on all devices
        together.
    """

    spec: DecoderSpec
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    precision: str | None = None
    most_logits: int = MOST_LOGITS

    def setup(self) -> None:
        self.decoder = Decoder(
            self.spec, self.scan, self.remat, self.dtype, self.precision
        )
        if not self.spec.tied:
            self.head = nn.Dense(
                self.spec.vocab_size,
                use_bias=False,
                dtype=compute_dtype(self.dtype),
                precision=self.precision,
                kernel_init=nn.initializers.normal(self.spec.init_stddev),
            )

    def __call__(self, batch: Mapping[str, Any]) -> Float[Array, "batch seq vocab"]:
        """Logits, in float32 at least."""
        return self.logits(self.hidden(batch))

    def hidden(self, batch: Mapping[str, Any]) -> Float[Array, "batch seq d_model"]:
        """Normalized hidden states, padding included."""
        return self.decoder(**_inputs(batch, self.spec))[0]

    def read(
        self, batch: Mapping[str, Any], cache: Cache
    ) -> tuple[Float[Array, "batch seq vocab"], Cache]:
        """Logits of tokens that follow what the cache holds, and it with these.

        Args:
          batch: With "at" besides, (batch,): the one place of each row whose logits are
            wanted, which leaves (batch, 1, vocab); all of them if it is left out.
          cache: What was read before.
        """
        hidden, kept = self.decoder(**_inputs(batch, self.spec), cache=cache)
        assert kept is not None
        if "at" in batch:
            # Of a prompt, all logits are the largest array by far, and but one is used.
            at = jnp.asarray(batch["at"])[:, None, None]
            hidden = jnp.take_along_axis(hidden, at, axis=1)
        return self.logits(hidden), kept

    def scores(self, batch: Mapping[str, Any]) -> dict[str, Float[Array, "batch seq"]]:
        """What losses need of every token, without all logits at once; see `head`.

        Args:
          batch: With "label" besides: the token that is to follow, (batch, seq).
        """
        hidden = self.hidden(batch)
        label = jnp.asarray(batch["label"])
        sizes = (self.spec.vocab_size, self.most_logits)
        return label_scores(self.logits, hidden, label, *sizes)

    def logits(
        self, hidden: Float[Array, "*rows d_model"]
    ) -> Float[Array, "*rows vocab"]:
        """What the head makes of hidden states, in float32 at least."""
        if self.spec.tied:
            table = self.decoder.variables["params"]["embeddings"]["token"]["embedding"]
            dtype = compute_dtype(self.dtype)
            scores = jnp.dot(hidden, table.astype(dtype).T, precision=self.precision)
        else:
            scores = self.head(hidden)
        scores = scores.astype(wide(scores.dtype))
        if (cap := self.spec.logit_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        return scores


def counted(
    mask: Bool[Array, "batch seq"], cache: Cache | None = None
) -> Int[Array, "batch seq"]:
    """Positions of real tokens, 0 1 2 ..., going on where the cache ends."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    if cache is not None:
        positions += cache.real.sum(axis=1, keepdims=True)
    return positions.astype(jnp.int32)


def _inputs(batch: Mapping[str, Any], shape: DecoderSpec) -> dict[str, Any]:
    if missing := {"ids", "mask"} - set(batch):
        raise BadInput(
            f"a batch needs 'ids' and 'mask'; {sorted(missing)} missing from "
            f"{sorted(batch)}"
        )
    names = ("ids", "mask", "positions", "segments")
    found = {name: jnp.asarray(batch[name]) for name in names if name in batch}
    ids, mask = found["ids"], found["mask"]
    if ids.ndim != 2 or mask.dtype != jnp.bool_:
        raise BadInput(
            "batch['ids'] is (batch, seq) and batch['mask'] boolean of the same shape; "
            f"got {ids.shape} and {mask.shape} {mask.dtype}. Map over a trials axis "
            "with jax.vmap."
        )
    for name, value in found.items():
        if value.shape != ids.shape:
            raise BadInput(
                f"batch['{name}'] has shape {value.shape}, batch['ids'] {ids.shape}"
            )
    if ids.shape[1] > shape.max_positions:
        raise BadInput(
            f"a sequence has {ids.shape[1]} tokens, but the decoder knows "
            f"{shape.max_positions} positions; truncate to that length"
        )
    return found
