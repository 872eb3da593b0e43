"""The shape of a causal decoder: one family, told apart by flags.

What the flags cover, and who needs them:

  Llama 2 and 3, SmolLM2    the defaults; `rope_scaling` from Llama 3.1 on
  Qwen2, Qwen2.5            `qkv_bias`
  Qwen3                     `qk_norm`, a head width of its own
  Mistral                   `window` on every layer
  Gemma 2                   `norm_offset`, `post_norms`, `embed_scale`, both soft-caps,
                            a `window` on every other layer, `query_scale`
  Gemma 3                   the same with `qk_norm` and `local_theta`, without soft-caps
  GPT-2                     `norm="layer"`, `positions="learned"`, no gate, `fused_qkv`
  Mixtral, Qwen3-MoE        `num_experts`
"""

import math
from collections.abc import Sequence
from typing import Literal

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@spec
class RopeScaling:
    """How rotations are slowed down for sequences longer than those of pretraining.

    Attributes:
      kind: "linear", every frequency over `factor`; or "llama3", low frequencies over
        `factor`, high ones as they are, those between interpolated.
      factor: How much longer sequences may be.
      low, high: Turns within the original length that bound what "llama3"
        interpolates.
      original: Positions of pretraining, for "llama3".
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise BadInput(f"RopeScaling.factor must be positive, not {self.factor}")
        if not 0 < self.low < self.high or self.original < 1:
            raise BadInput(
                "RopeScaling needs 0 < low < high and a positive original length, not "
                f"low = {self.low}, high = {self.high}, original = {self.original}"
            )


@spec
class DecoderSpec:
    """Everything about a decoder that its checkpoint fixes.

    Attributes:
      vocab_size: Rows of the token embedding.
      d_model: Width of the residual stream.
      num_layers: Transformer layers.
      num_heads, num_kv_heads: Heads of queries, and of keys and values; these divide
        those.
      d_head: Width of a head.
      d_ff: Width of the feed-forward part, or of one expert.
      max_positions: Longest sequence.
      activation: Of the feed-forward part.
      gated: Whether it is act(gate x) * (up x), or act(up x).
      norm: "rms" or "layer"; before each part, with `post_norms` also behind it.
      norm_eps: Added to the mean square.
      norm_offset: Whether RMS norms multiply with 1 + scale.
      qk_norm: An RMS norm of every query's and key's head.
      positions: "rope", rotations; or "learned", rows of a table.
      theta: Base of the rotations' frequencies.
      local_theta: That of layers with a window; None: the same, and unscaled.
      rope_scaling: See `RopeScaling`; None: none.
      query_scale: What scores are multiplied with; None: d_head ** -0.5.
      attention_softcap, logit_softcap: c in c tanh(x / c); None: none.
      window: Tokens that a local layer looks back at, itself among them; None: all.
      local: Which layers have the window; None: all, if there is one.
      qkv_bias, output_bias, mlp_bias: Whether these maps have biases.
      fused_qkv: One kernel for query, key and value.
      embed_scale: Whether token vectors are multiplied with sqrt(d_model).
      tied: Whether the head is the token embedding.
      num_experts: Experts of a layer; 0: one feed-forward part without a router.
      experts_per_token: Experts that a token goes to.
      norm_experts: Whether the weights of these add up to 1.
      pad_id: The token that fills short rows.
      init_stddev: Of the normal distribution that fresh weights are drawn from.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_head: int
    d_ff: int
    max_positions: int
    activation: Activation = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    positions: Literal["rope", "learned"] = "rope"
    theta: float = 10000.0
    local_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    local: Sequence[bool] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False
    embed_scale: bool = False
    tied: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    norm_experts: bool = True
    pad_id: int = 0
    init_stddev: float = 0.02

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"DecoderSpec.{name} must be positive, not {value}")
        if self.num_heads % self.num_kv_heads:
            raise BadInput(
                f"DecoderSpec.num_kv_heads = {self.num_kv_heads} must divide num_heads "
                f"= {self.num_heads}: every key serves the same number of queries"
            )
        if self.positions == "rope" and self.d_head % 2:
            raise BadInput(
                f"DecoderSpec.d_head = {self.d_head} must be even: rotations take "
                "numbers in pairs"
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise BadInput(
                "DecoderSpec.pad_id must be a row of the vocabulary, 0 to "
                f"{self.vocab_size - 1}, not {self.pad_id}"
            )
        self._check_windows()
        self._check_experts()

    def _check_windows(self) -> None:
        if self.local is not None and len(self.local) != self.num_layers:
            raise BadInput(
                f"DecoderSpec.local speaks of {len(self.local)} layers, num_layers is "
                f"{self.num_layers}"
            )
        if self.window is None and self.local is not None and any(self.local):
            raise BadInput("DecoderSpec.local marks layers, but window is None")

    def _check_experts(self) -> None:
        if self.num_experts < 0:
            raise BadInput(
                f"DecoderSpec.num_experts must be 0 or more, not {self.num_experts}"
            )
        most = self.num_experts
        if not (1 if most else 0) <= self.experts_per_token <= most:
            raise BadInput(
                f"DecoderSpec.experts_per_token = {self.experts_per_token} does not "
                f"suit num_experts = {most}"
            )

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers have the window."""
        if self.local is not None:
            return tuple(self.local)
        return (self.window is not None,) * self.num_layers

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return self.d_head**-0.5 if self.query_scale is None else self.query_scale


_POSITIVE = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_head"),
    *("d_ff", "max_positions", "norm_eps", "theta", "local_theta", "query_scale"),
    *("attention_softcap", "logit_softcap", "window", "init_stddev"),
)
