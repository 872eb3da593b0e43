"""A BERT-family encoder and the classifier on top of it.

Post-LayerNorm Transformer encoder with learned positions: BERT, MiniLM, RoBERTa.
Sources: Devlin et al., 2018, https://arxiv.org/abs/1810.04805; Liu et al., 2019,
https://arxiv.org/abs/1907.11692

Paths of its weights, with layers scanned (one stacked leaf) or unrolled:

  encoder/embeddings/{word,position,token_type}/embedding
  encoder/embeddings/norm/{scale,bias}
  encoder/layer/attention/{query,key,value,output}/{kernel,bias}      scanned
  encoder/layer_3/attention/{query,key,value,output}/{kernel,bias}    unrolled
  encoder/layer/attention/norm/{scale,bias}
  encoder/layer/mlp/{up,down}/{kernel,bias}
  encoder/layer/mlp/norm/{scale,bias}
  pooler/{kernel,bias}                                                pooling="pooler"
  head/{kernel,bias}
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.models.blocks import (
    FeedForward,
    LayerNorm,
    SelfAttention,
    mask_bias,
    wide,
    without_ones,
)
from lowrank.models.options import (
    PAIRED,
    Precision,
    check_choice,
    compute_dtype,
    rematerialized,
)

#: See `options.PAIRED`; rows of a vocabulary, and the width of its vectors.
PARTITION = (*PAIRED, ("encoder/embeddings/*/embedding", ("tensor", "fsdp")))

Activation = Literal["gelu", "gelu_tanh", "relu"]
Pooling = Literal["mean", "cls", "pooler"]
Positions = Literal["places", "tokens"]


@spec
class EncoderSpec:
    """The shape of an encoder: everything that its checkpoint fixes.

    Attributes:
      vocab_size: Rows of the word embedding.
      d_model: Width of the residual stream.
      num_layers: Transformer layers.
      num_heads: Attention heads; they divide d_model.
      d_ff: Width of the feed-forward part.
      max_positions: Longest sequence.
      num_token_types: Rows of the token-type (segment) embedding.
      activation: Of the feed-forward part; "gelu" is the exact one.
      norm_eps: Added to the variance in LayerNorm.
      pad_id: The token id that fills short rows.
      positions: What is counted: the "places" of a row, from 0; or its "tokens" that
        are no padding, from pad_id + 1, while padding has position pad_id (RoBERTa,
        whose table so has pad_id + 1 rows more than sequences have positions).
      init_stddev: Of the normal distribution that fresh weights are drawn from.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    max_positions: int
    num_token_types: int = 2
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    pad_id: int = 0
    positions: Positions = "places"
    init_stddev: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "d_ff",
            "max_positions",
            "num_token_types",
            "norm_eps",
            "init_stddev",
        ):
            if not getattr(self, name) > 0:
                raise BadInput(
                    f"EncoderSpec.{name} must be positive, not {getattr(self, name)}"
                )
        if self.d_model % self.num_heads:
            raise BadInput(
                f"EncoderSpec.num_heads must divide d_model: {self.d_model} is not a "
                f"multiple of {self.num_heads}"
            )
        check_choice("positions", self.positions, Positions)
        if not 0 <= self.pad_id < self.vocab_size:
            raise BadInput(
                f"EncoderSpec.pad_id must be a row of the vocabulary, 0 to "
                f"{self.vocab_size - 1}, not {self.pad_id}"
            )


class Embeddings(nn.Module):
    """Word, position and token-type vectors, summed and normalized.

    An id outside the vocabulary gives NaN, never another token's vector.
    """

    spec: EncoderSpec
    dtype: Any

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        type_ids: Int[Array, "#batch #seq"],
    ) -> Float[Array, "batch seq d_model"]:
        shape = self.spec

        def rows(name: str, count: int, index: Array) -> Array:
            table = nn.Embed(
                count,
                shape.d_model,
                dtype=wide(self.dtype),
                embedding_init=nn.initializers.normal(shape.init_stddev),
                name=name,
            )
            return table(index)

        x = rows("word", shape.vocab_size, ids)
        if shape.positions == "tokens":
            real = (ids != shape.pad_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + shape.pad_id
            x += rows("position", shape.max_positions + shape.pad_id + 1, positions)
        else:
            x += rows("position", shape.max_positions, jnp.arange(ids.shape[1])[None])
        x += rows("token_type", shape.num_token_types, type_ids)
        return LayerNorm(shape.norm_eps, self.dtype, name="norm")(x)


class Layer(nn.Module):
    """Self-attention, then the feed-forward part; shaped for `nn.scan`."""

    spec: EncoderSpec
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        bias: Float[Array, "batch 1 1 seq"],
    ) -> tuple[Float[Array, "batch seq d_model"], None]:
        shape = self.spec
        common = {
            "norm_eps": shape.norm_eps,
            "init_stddev": shape.init_stddev,
            "dtype": self.dtype,
            "precision": self.precision,
        }
        attention = SelfAttention(shape.num_heads, name="attention", **common)
        mlp = FeedForward(shape.d_ff, shape.activation, name="mlp", **common)
        return mlp(attention(x, bias)), None


class Encoder(nn.Module):
    """Token ids to hidden states.

    Attributes:
      spec: The encoder's shape.
      scan: One stacked leaf per weight and one traced layer, against `num_layers`
        leaves and layers. Scanning compiles faster; the values are the same.
      remat: What the backward pass recomputes: "none", "full" (a layer keeps only
        its input) or "dots" (products with weights are kept, the rest recomputed).
      dtype: Compute dtype; weights are float32 in any case.
      precision: Of every product; "highest" for comparisons, None for speed.
    """

    spec: EncoderSpec
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    precision: str | None = None

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        mask: Bool[Array, "batch seq"],
        type_ids: Int[Array, "#batch #seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        check_choice("precision", self.precision, Precision)
        dtype = compute_dtype(self.dtype)
        if type_ids is None:
            type_ids = jnp.zeros((1, 1), jnp.int32)
        x = Embeddings(self.spec, dtype, name="embeddings")(ids, type_ids)
        bias = mask_bias(mask, wide(dtype))
        layer = rematerialized(Layer, self.remat, self.scan)
        if self.scan:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # type: ignore[arg-type]
                length=self.spec.num_layers,
            )
            x, _ = stack(self.spec, dtype, self.precision, name="layer")(x, bias)
            return x
        for index in range(self.spec.num_layers):
            one = layer(self.spec, dtype, self.precision, name=f"layer_{index}")
            x, _ = one(x, bias)
        return x


class Classifier(nn.Module):
    """An encoder, a pooling of its hidden states and a linear head, in float32.

    A batch is a mapping with "ids" (int, (batch, seq)), "mask" (bool, the same
    shape, True on real tokens) and optionally "type_ids"; other keys are ignored.

    Attributes:
      spec: The encoder's shape.
      num_classes: Width of the head.
      pooling: "mean" over real tokens; "cls", the first token; "pooler", a dense map
        and tanh on the first token, as BertForSequenceClassification has it.
      scan, remat, dtype, precision: As in `Encoder`.
    """

    spec: EncoderSpec
    num_classes: int
    pooling: str = "mean"
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    precision: str | None = None

    def setup(self) -> None:
        check_choice("pooling", self.pooling, Pooling)
        if self.num_classes < 1:
            raise BadInput(f"num_classes must be at least 1, not {self.num_classes}")
        self.encoder = Encoder(
            self.spec, self.scan, self.remat, self.dtype, self.precision
        )
        dtype = wide(compute_dtype(self.dtype))
        options = {"dtype": dtype, "precision": self.precision}
        if self.pooling == "pooler":
            init = nn.initializers.normal(self.spec.init_stddev)
            self.pooler = nn.Dense(self.spec.d_model, kernel_init=init, **options)
        self.head = nn.Dense(
            self.num_classes, kernel_init=nn.initializers.zeros, **options
        )

    def __call__(self, batch: Mapping[str, Any]) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.head(self.features(batch))

    def features(self, batch: Mapping[str, Any]) -> Float[Array, "batch d_model"]:
        """Pooled hidden states; a row without a real token gives zeros for "mean"."""
        x = self.hidden(batch).astype(wide(self.dtype))
        if self.pooling == "mean":
            mask = jnp.asarray(batch["mask"])[:, :, None].astype(x.dtype)
            total = without_ones(x * mask, last=2).sum(axis=-2).reshape(len(x), -1)
            return total / jnp.maximum(mask.sum(axis=1), 1.0)
        first = x[:, 0, :]
        return jnp.tanh(self.pooler(first)) if self.pooling == "pooler" else first

    def hidden(self, batch: Mapping[str, Any]) -> Float[Array, "batch seq d_model"]:
        """The last layer's output, padding included."""
        return self.encoder(*_inputs(batch, self.spec))


def _inputs(
    batch: Mapping[str, Any], shape: EncoderSpec
) -> tuple[Array, Array, Array | None]:
    if missing := {"ids", "mask"} - set(batch):
        raise BadInput(
            f"a batch needs 'ids' and 'mask'; {sorted(missing)} missing from "
            f"{sorted(batch)}"
        )
    ids, mask = jnp.asarray(batch["ids"]), jnp.asarray(batch["mask"])
    if ids.ndim != 2 or mask.shape != ids.shape or mask.dtype != jnp.bool_:
        raise BadInput(
            "batch['ids'] is (batch, seq) and batch['mask'] boolean of the same shape; "
            f"got {ids.shape} and {mask.shape} {mask.dtype}. Map over a trials axis "
            "with jax.vmap."
        )
    if ids.shape[1] > shape.max_positions:
        raise BadInput(
            f"a sequence has {ids.shape[1]} tokens, but the encoder knows "
            f"{shape.max_positions} positions; truncate to that length"
        )
    type_ids = batch.get("type_ids")
    return ids, mask, None if type_ids is None else jnp.asarray(type_ids)
