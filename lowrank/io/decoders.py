"""Causal decoders: names of their weights, family by family."""

from collections.abc import Mapping

from lowrank.io.keymaps import Family, Row, dense, norm

_CONSTANTS = {
    r"(.*\.)?rotary_emb\.inv_freq": "a constant, not a weight",
    r"h\.\d+\.attn\.(bias|masked_bias)": "a constant, not a weight",
    r"lm_head\.weight": "the head is the token embedding",
}
_LAYER = "layers.{layer}."
_OURS = "decoder/layer/"


def _llama(*more: Row, before_mlp: str = "post_attention_layernorm") -> tuple[Row, ...]:
    """What Llama's descendants agree about, and `more`."""
    attention = f"{_LAYER}self_attn."
    return (
        Row("decoder/embeddings/token/embedding", "embed_tokens.weight"),
        *norm(f"{_OURS}attention/norm", f"{_LAYER}input_layernorm"),
        *dense(f"{_OURS}attention/query", f"{attention}q_proj"),
        *dense(f"{_OURS}attention/key", f"{attention}k_proj"),
        *dense(f"{_OURS}attention/value", f"{attention}v_proj"),
        *dense(f"{_OURS}attention/output", f"{attention}o_proj"),
        Row(f"{_OURS}attention/query_norm/scale", f"{attention}q_norm.weight"),
        Row(f"{_OURS}attention/key_norm/scale", f"{attention}k_norm.weight"),
        *norm(f"{_OURS}mlp/norm", f"{_LAYER}{before_mlp}"),
        *more,
        *norm("decoder/norm", "norm"),
        *dense("head", "lm_head", bare=True),
    )


_MLP = (
    *dense(f"{_OURS}mlp/gate", f"{_LAYER}mlp.gate_proj"),
    *dense(f"{_OURS}mlp/up", f"{_LAYER}mlp.up_proj"),
    *dense(f"{_OURS}mlp/down", f"{_LAYER}mlp.down_proj"),
)


def _experts(router: str, module: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    return (
        Row(f"{_OURS}mlp/experts/router/kernel", f"{_LAYER}{router}.weight", True),
        *(
            Row(
                f"{_OURS}mlp/experts/{ours}/kernel",
                f"{_LAYER}{module}.{{expert}}.{theirs}.weight",
                True,
            )
            for ours, theirs in names.items()
        ),
    )


LLAMA = Family(name="Llama", prefix="model.", rows=_llama(*_MLP), unused=_CONSTANTS)
GEMMA = Family(
    name="Gemma",
    prefix="model.",
    rows=_llama(
        *_MLP,
        Row(
            f"{_OURS}attention/post_norm/scale",
            f"{_LAYER}post_attention_layernorm.weight",
        ),
        Row(
            f"{_OURS}mlp/post_norm/scale", f"{_LAYER}post_feedforward_layernorm.weight"
        ),
        before_mlp="pre_feedforward_layernorm",
    ),
    unused=_CONSTANTS,
)
MIXTRAL = Family(
    name="Mixtral",
    prefix="model.",
    rows=_llama(
        *_experts(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts",
            {"gate": "w1", "up": "w3", "down": "w2"},
        )
    ),
    unused=_CONSTANTS,
)
QWEN_MOE = Family(
    name="Qwen-MoE",
    prefix="model.",
    rows=_llama(
        *_experts(
            "mlp.gate",
            "mlp.experts",
            {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        )
    ),
    unused=_CONSTANTS,
)


def _conv(path: str, module: str) -> tuple[Row, Row]:
    """GPT-2's maps are stored as (in, out), like ours."""
    return (
        Row(f"{path}/kernel", f"{module}.weight"),
        Row(f"{path}/bias", f"{module}.bias"),
    )


GPT2 = Family(
    name="GPT-2",
    prefix="transformer.",
    rows=(
        Row("decoder/embeddings/token/embedding", "wte.weight"),
        Row("decoder/embeddings/position/embedding", "wpe.weight"),
        *norm(f"{_OURS}attention/norm", "h.{layer}.ln_1"),
        *_conv(f"{_OURS}attention/qkv", "h.{layer}.attn.c_attn"),
        *_conv(f"{_OURS}attention/output", "h.{layer}.attn.c_proj"),
        *norm(f"{_OURS}mlp/norm", "h.{layer}.ln_2"),
        *_conv(f"{_OURS}mlp/up", "h.{layer}.mlp.c_fc"),
        *_conv(f"{_OURS}mlp/down", "h.{layer}.mlp.c_proj"),
        *norm("decoder/norm", "ln_f"),
        *dense("head", "lm_head", bare=True),
    ),
    unused=_CONSTANTS,
)
