"""A Vision Transformer encoder and the classifier on top of it.

Pre-LayerNorm Transformer encoder over square patches, with learned positions and one
class token before the patches: ViT, and DINOv2 with its layer scale. Sources:
Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929; Oquab et al., 2023,
https://arxiv.org/abs/2304.07193; Touvron et al., 2021 (layer scale),
https://arxiv.org/abs/2103.17239

Paths of its weights, with layers scanned (one stacked leaf) or unrolled:

  encoder/class_token
  encoder/patches/{kernel,bias}
  encoder/position/embedding
  encoder/layer/attention_norm/{scale,bias}                          scanned
  encoder/layer_3/attention_norm/{scale,bias}                        unrolled
  encoder/layer/attention/{query,key,value,output}/{kernel,bias}
  encoder/layer/attention_scale                                      layer_scale=True
  encoder/layer/mlp_norm/{scale,bias}
  encoder/layer/mlp/{up,down}/{kernel,bias}
  encoder/layer/mlp_scale                                            layer_scale=True
  encoder/norm/{scale,bias}
  head/{kernel,bias}

The kernel of the patches is a matrix: a patch is read row by row, and of each place its
channels. Hugging Face has a convolution there, of the same numbers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.models.blocks import ACTIVATIONS, LayerNorm, attend, linear, wide
from lowrank.models.encoder import Activation
from lowrank.models.options import (
    PAIRED,
    Precision,
    check_choice,
    compute_dtype,
    rematerialized,
)
from lowrank.models.resampling import bicubic

#: See `options.PAIRED`.
PARTITION = PAIRED

Pooling = Literal["cls", "mean", "both"]
_POSITIVE = (
    *("image_size", "patch_size", "num_channels", "d_model", "num_layers"),
    *("num_heads", "d_ff", "norm_eps", "init_stddev"),
)


@spec
class VisionSpec:
    """The shape of a Vision Transformer: everything that its checkpoint fixes.

    Attributes:
      image_size: Side of the square images that its positions were learned for.
      patch_size: Side of a patch, in pixels.
      num_channels: Numbers per pixel.
      d_model: Width of the residual stream.
      num_layers: Transformer layers.
      num_heads: Attention heads; they divide d_model.
      d_ff: Width of the feed-forward part.
      activation: Of the feed-forward part; "gelu" is the exact one.
      norm_eps: Added to the variance in LayerNorm.
      layer_scale: Whether each branch is multiplied, feature by feature, before it is
        added.
      qkv_bias: Whether query, key and value have biases.
      init_stddev: Of the normal distribution that fresh weights are drawn from.
    """

    image_size: int
    patch_size: int
    num_channels: int = 3
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    layer_scale: bool = False
    qkv_bias: bool = True
    init_stddev: float = 0.02

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise BadInput(
                    f"VisionSpec.{name} must be positive, not {getattr(self, name)}"
                )
        for name, whole, part in (
            ("num_heads", "d_model", self.num_heads),
            ("patch_size", "image_size", self.patch_size),
        ):
            if getattr(self, whole) % part:
                raise BadInput(
                    f"VisionSpec.{name} must divide {whole}: {getattr(self, whole)} is "
                    f"not a multiple of {part}"
                )

    @property
    def grid(self) -> int:
        """Patches along a side of the images that positions were learned for."""
        return self.image_size // self.patch_size


class Attention(nn.Module):
    """Multi-head self-attention of normalized states; see `blocks.attend`.

    Attributes:
      num_heads: Heads; they divide d_model.
      init_stddev, dtype, precision: As in `blocks.SelfAttention`.
      qkv_bias: Whether query, key and value have biases.
    """

    num_heads: int
    init_stddev: float
    dtype: Any
    precision: Any
    qkv_bias: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        mixed = attend(self, x, use_bias=self.qkv_bias)
        return linear(self, "output", x.shape[-1])(mixed)


class FeedForward(nn.Module):
    r"""Two linear maps, token by token: :math:`W_{down}\, act(W_{up}\, x)`.

    Attributes:
      d_ff: Width between the two maps.
      activation: A name in `blocks.ACTIVATIONS`.
      init_stddev, dtype, precision: As in `blocks.FeedForward`.
    """

    d_ff: int
    activation: str
    init_stddev: float
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        hidden = ACTIVATIONS[self.activation](linear(self, "up", self.d_ff)(x))
        return linear(self, "down", x.shape[-1])(hidden)


class Layer(nn.Module):
    r"""Attention, then the feed-forward part; shaped for `nn.scan`.

    .. math:: y = x + s_1 \odot A(LN(x)), \quad z = y + s_2 \odot F(LN(y))

    The scales s are 1 without layer scale.
    """

    spec: VisionSpec
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"], _: None = None
    ) -> tuple[Float[Array, "batch seq d_model"], None]:
        shape = self.spec
        common = {
            "init_stddev": shape.init_stddev,
            "dtype": self.dtype,
            "precision": self.precision,
        }
        attention = Attention(
            shape.num_heads, qkv_bias=shape.qkv_bias, name="attention", **common
        )
        mlp = FeedForward(shape.d_ff, shape.activation, name="mlp", **common)
        for name, branch in (("attention", attention), ("mlp", mlp)):
            y = branch(LayerNorm(shape.norm_eps, self.dtype, name=f"{name}_norm")(x))
            if shape.layer_scale:
                scale = self.param(
                    f"{name}_scale", nn.initializers.ones, (shape.d_model,)
                )
                y *= scale[None, None].astype(self.dtype)
            x += y
        return x, None


class Encoder(nn.Module):
    """Pixels to hidden states: of the class token, then of the patches, row by row.

    Positions of images of another size are interpolated by cubics, as transformers
    does it (`interpolate_pos_encoding`).

    Attributes:
      spec: The encoder's shape.
      scan, remat, dtype, precision: As in `encoder.Encoder`.
    """

    spec: VisionSpec
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    precision: str | None = None

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch seq d_model"]:
        check_choice("precision", self.precision, Precision)
        shape, dtype = self.spec, compute_dtype(self.dtype)
        rows, columns = (side // shape.patch_size for side in pixels.shape[1:3])
        normal = nn.initializers.normal(shape.init_stddev)
        project = nn.Dense(
            shape.d_model,
            dtype=wide(dtype),
            precision=self.precision,
            kernel_init=normal,
            name="patches",
        )
        x = project(_patches(pixels, shape.patch_size))
        first = self.param("class_token", normal, (shape.d_model,))
        first = jnp.broadcast_to(first[None, None], (len(x), 1, shape.d_model))
        x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        table = Positions(shape, name="position")(rows, columns)
        x = (x + table[None].astype(x.dtype)).astype(dtype)
        layer = rematerialized(Layer, self.remat, self.scan)
        if self.scan:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=shape.num_layers,
            )
            x, _ = stack(shape, dtype, self.precision, name="layer")(x, None)
        else:
            for index in range(shape.num_layers):
                one = layer(shape, dtype, self.precision, name=f"layer_{index}")
                x, _ = one(x, None)
        return LayerNorm(shape.norm_eps, dtype, name="norm")(x)


class Positions(nn.Module):
    """A vector for the class token and one for each patch, for a grid of any size."""

    spec: VisionSpec

    @nn.compact
    def __call__(self, rows: int, columns: int) -> Float[Array, "seq d_model"]:
        side, width = self.spec.grid, self.spec.d_model
        table = self.param(
            "embedding",
            nn.initializers.normal(self.spec.init_stddev),
            (1 + side * side, width),
        )
        if (rows, columns) == (side, side):
            return table
        down = jnp.asarray(bicubic(side, rows), table.dtype)
        across = jnp.asarray(bicubic(side, columns), table.dtype)
        grid = table[1:].reshape(side, side, width)
        # The sums of a few numbers of like size: no reason to be less exact here.
        grid = jnp.einsum("ir,rcd->icd", down, grid, precision="highest")
        grid = jnp.einsum("jc,icd->ijd", across, grid, precision="highest")
        return jnp.concatenate([table[:1], grid.reshape(rows * columns, width)])


class Classifier(nn.Module):
    """A Vision Transformer, a pooling of its hidden states and a linear head.

    A batch is a mapping with "pixels" (float, (batch, height, width, channels),
    normalized as the encoder was trained); other keys are ignored.

    Attributes:
      spec: The encoder's shape.
      num_classes: Width of the head.
      pooling: "cls", the class token; "mean" over patches; "both", one beside the
        other, as Dinov2ForImageClassification has it.
      scan, remat, dtype, precision: As in `Encoder`.
    """

    spec: VisionSpec
    num_classes: int
    pooling: str = "cls"
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    precision: str | None = None

    def setup(self) -> None:
        check_choice("pooling of a Vision Transformer", self.pooling, Pooling)
        if self.num_classes < 1:
            raise BadInput(f"num_classes must be at least 1, not {self.num_classes}")
        self.encoder = Encoder(
            self.spec, self.scan, self.remat, self.dtype, self.precision
        )
        self.head = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            dtype=wide(compute_dtype(self.dtype)),
            precision=self.precision,
        )

    def __call__(self, batch: Mapping[str, Any]) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.head(self.features(batch))

    def features(self, batch: Mapping[str, Any]) -> Float[Array, "batch features"]:
        """Pooled hidden states; d_model of them, or twice as many for "both"."""
        x = self.hidden(batch).astype(wide(self.dtype))
        first, patches = x[:, 0], x[:, 1:].mean(axis=1)
        if self.pooling == "both":
            return jnp.concatenate([first, patches], axis=-1)
        return first if self.pooling == "cls" else patches

    def hidden(self, batch: Mapping[str, Any]) -> Float[Array, "batch seq d_model"]:
        """The final LayerNorm's output."""
        return self.encoder(_pixels(batch, self.spec))


def _patches(
    pixels: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch patches values"]:
    batch, height, width, channels = pixels.shape
    rows, columns = height // side, width // side
    cut = pixels.reshape(batch, rows, side, columns, side, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def _pixels(batch: Mapping[str, Any], shape: VisionSpec) -> Array:
    if "pixels" not in batch:
        raise BadInput(
            f"a batch of images needs 'pixels'; there are {sorted(batch)}. A base of "
            "images reads data of images, as data=digits"
        )
    pixels = jnp.asarray(batch["pixels"])
    if pixels.ndim != 4 or pixels.shape[-1] != shape.num_channels:
        raise BadInput(
            f"batch['pixels'] is (batch, height, width, {shape.num_channels}), not "
            f"{pixels.shape}. Map over a trials axis with jax.vmap."
        )
    height, width = pixels.shape[1:3]
    if not height or not width or height % shape.patch_size or width % shape.patch_size:
        raise BadInput(
            f"images of {height} x {width} pixels are not cut into patches of "
            f"{shape.patch_size} x {shape.patch_size}; resize them to a multiple"
        )
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise BadInput(
            f"batch['pixels'] holds {pixels.dtype}; a model reads normalized floats"
        )
    return pixels
