"""The parts of a Transformer layer: activations, masks, attention, feed-forward.

Every contraction with a weight is a plain dot of an activation with one 2-D kernel,
so that low-rank corrections find it. Weights are float32 whatever the compute dtype;
LayerNorm, softmax and the activation's inner arithmetic are at least float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

#: What a masked score gets added. Far below any score, and far above -inf: a row
#: that is all padding becomes uniform attention instead of NaN.
MASKED = -1e30
_SQRT_HALF = 0.5**0.5
_DENSITY_AT_ZERO = 0.3989422804014327  # 1 / sqrt(2 pi)


def wide(dtype: Any) -> jnp.dtype:
    """The dtype for sums and exponentials beside a compute dtype: float32 or more."""
    return jnp.promote_types(dtype, jnp.float32)


def without_ones(x: Float[Array, "..."], last: int = 1) -> Float[Array, "..."]:
    """`x` without those axes before the `last` ones that have one entry.

    XLA:CPU (jaxlib 0.10) takes several times as long to multiply and sum along an axis
    where another has one entry: that of a batch of one row, of one token, or of every
    example by itself. Without such axes this is `x`.
    """
    first = [n for n in x.shape[:-last] if n != 1]
    return x.reshape(*first, *x.shape[-last:])


@jax.custom_jvp
def gelu(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    r"""The exact GELU, :math:`x \Phi(x)` with the normal distribution's Phi.

    Its own derivative rule, :math:`\Phi(x) + x \phi(x)`, keeps one array for the
    backward pass where automatic differentiation keeps three; on XLA:CPU that saves
    a third of an encoder's temporaries and a tenth of its time.

    Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415
    """
    value, _ = _gelu_and_slope(x)
    return value


def _gelu_and_slope(x: Array) -> tuple[Array, Array]:
    z = x.astype(wide(x.dtype))
    below = 0.5 * (1.0 + lax.erf(z * _SQRT_HALF))
    slope = below + z * (jnp.exp(-0.5 * z * z) * _DENSITY_AT_ZERO)
    return (z * below).astype(x.dtype), slope.astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    value, slope = _gelu_and_slope(primals[0])
    return value, slope * tangents[0]


def gelu_tanh(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The tanh approximation of GELU (GPT-2, some BERT checkpoints)."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@jax.custom_jvp
def softmax(scores: Float[Array, "*rows keys"]) -> Float[Array, "*rows keys"]:
    r"""Softmax over the last axis, :math:`e^{s - m} / \sum e^{s - m}`, m the maximum.

    Its own derivative rule, :math:`p (t - \sum p t)`, keeps the result for the backward
    pass and nothing else, where JAX's keeps the exponentials beside it.
    """
    raised = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return raised / jnp.sum(raised, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    p = softmax(primals[0])
    (t,) = tangents
    return p, p * (t - jnp.sum(p * t, axis=-1, keepdims=True))


def mask_bias(mask: Bool[Array, "batch seq"], dtype: Any) -> Float[Array, "b 1 1 s"]:
    """What is added to attention scores so that nobody looks at padding.

    Args:
      mask: True on real tokens.
      dtype: The dtype of the scores.
    """
    bias = jnp.where(mask, 0.0, MASKED).astype(dtype)
    return bias[:, None, None, :]


class SelfAttention(nn.Module):
    r"""Multi-head self-attention with residual and LayerNorm behind it.

    .. math:: LN(x + W_o\, softmax(q k^T / \sqrt{d_{head}} + bias)\, v)

    Four kernels of shape (d_model, d_model) with biases: query, key, value, output.
    The two products run in (batch, head, seq, dim) order, for which XLA:CPU has
    batched matrix products; (batch, seq, head, dim) is measurably slower there.

    Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762

    Attributes:
      num_heads: Heads; they divide d_model.
      norm_eps: Added to the variance in LayerNorm.
      init_stddev: Of the normal distribution that fresh kernels are drawn from.
      dtype: Compute dtype.
      precision: Of every product; None is the backend's own.
    """

    num_heads: int
    norm_eps: float
    init_stddev: float
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        bias: Float[Array, "batch 1 1 seq"],
    ) -> Float[Array, "batch seq d_model"]:
        mixed = attend(self, x, bias)
        return add_and_norm(self, x, linear(self, "output", x.shape[-1])(mixed))


class FeedForward(nn.Module):
    r"""Two linear maps, token by token, with residual and LayerNorm behind them.

    .. math:: LN(x + W_{down}\, act(W_{up}\, x))

    Attributes:
      d_ff: Width between the two maps.
      activation: A name in `ACTIVATIONS`.
      norm_eps: Added to the variance in LayerNorm.
      init_stddev: Of the normal distribution that fresh kernels are drawn from.
      dtype: Compute dtype.
      precision: Of both products.
    """

    d_ff: int
    activation: str
    norm_eps: float
    init_stddev: float
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        hidden = ACTIVATIONS[self.activation](linear(self, "up", self.d_ff)(x))
        return add_and_norm(self, x, linear(self, "down", x.shape[-1])(hidden))


def attend(
    module: Any, x: Array, bias: Array | None = None, use_bias: bool = True
) -> Array:
    r"""What heads mix, :math:`softmax(q k^T / \sqrt{d_{head}} + bias)\, v`.

    Args:
      module: Whose heads; has num_heads, dtype, precision and init_stddev. The kernels
        query, key and value become its own.
      x: (batch, seq, d_model).
      bias: Added to the scores; None where everything may be looked at.
      use_bias: Whether the three maps have biases.
    """
    batch, seq, d_model = x.shape
    d_head = d_model // module.num_heads

    def heads(name: str) -> Array:
        y = linear(module, name, d_model, use_bias)(x)
        y = y.reshape(batch, seq, module.num_heads, d_head)
        return y.transpose(0, 2, 1, 3)

    # Scaling the query costs seq x d_head products a head, not seq x seq.
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk",
        heads("query") * d_head**-0.5,
        heads("key"),
        precision=module.precision,
        preferred_element_type=wide(module.dtype) if bias is None else bias.dtype,
    )
    weights = softmax(scores if bias is None else scores + bias)
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(module.dtype),
        heads("value"),
        precision=module.precision,
    )
    return mixed.transpose(0, 2, 1, 3).reshape(batch, seq, d_model)


def linear(module: Any, name: str, d_out: int, use_bias: bool = True) -> nn.Dense:
    """A dense map under `name` with the dtype, precision and init of `module`."""
    return nn.Dense(
        d_out,
        use_bias=use_bias,
        dtype=module.dtype,
        precision=module.precision,
        kernel_init=nn.initializers.normal(module.init_stddev),
        name=name,
    )


class LayerNorm(nn.Module):
    r"""LayerNorm, :math:`(x - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot scale + bias`.

    Computed in float32 at least. Flax's own keeps more for the backward pass: with
    this one a MiniLM-sized encoder needs a fifth less temporary memory on XLA:CPU.

    Source: Ba et al., 2016, https://arxiv.org/abs/1607.06450

    Attributes:
      epsilon: Added to the variance, the mean of squared deviations.
      dtype: Of the result.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        width, shape = x.shape[-1:], x.shape
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        x = without_ones(x.astype(wide(self.dtype)))
        x -= x.mean(axis=-1, keepdims=True)
        x *= lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        along = lambda vector: jnp.expand_dims(vector, range(x.ndim - 1))
        return (x * along(scale) + along(bias)).astype(self.dtype).reshape(shape)


class RMSNorm(nn.Module):
    r"""RMSNorm, :math:`x / \sqrt{\overline{x^2} + \epsilon} \cdot scale`.

    Computed in float32 at least, and cast after the scale, as Gemma does; Llama's code
    casts before it, which is the same in float32.

    Source: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467

    Attributes:
      epsilon: Added to the mean of squares.
      dtype: Of the result.
      offset: Whether it is 1 + scale that multiplies, and scale starts at 0.
    """

    epsilon: float
    dtype: Any
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        fresh = nn.initializers.zeros if self.offset else nn.initializers.ones
        shape = x.shape
        scale = self.param("scale", fresh, x.shape[-1:])
        x = without_ones(x.astype(wide(self.dtype)))
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        if self.offset:
            scale = 1.0 + scale
        x *= lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype).reshape(shape)


def add_and_norm(module: Any, x: Array, y: Array) -> Array:
    """LayerNorm of the sum of a residual `x` and a branch `y` of `module`."""
    return LayerNorm(module.norm_eps, module.dtype, name="norm")(x + y)
