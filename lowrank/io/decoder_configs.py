"""The shape of a causal decoder from its config.json, model type by model type.

Every field of the file is read, known to be irrelevant, or equal to the only value that
this code is right for; any other one is refused: it might change what the model
computes. Both spellings of rotations are read, `rope_theta` with `rope_scaling` and
transformers 5's `rope_parameters`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import BadInput, nearest
from lowrank.core.spec import check_fields
from lowrank.io.decoders import GEMMA, GPT2, LLAMA, MIXTRAL, QWEN_MOE
from lowrank.io.keymaps import Family, listed
from lowrank.models.decoder_spec import DecoderSpec, RopeScaling

#: config.json field -> field of `DecoderSpec`, for all but GPT-2.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_stddev",
}
_GPT2 = {
    "vocab_size": "vocab_size",
    "n_embd": "d_model",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_positions",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "init_stddev",
}
#: Read by `spec_from_config` itself.
_READ = (
    *("model_type", "num_key_value_heads", "head_dim", "hidden_act"),
    *("hidden_activation", "tie_word_embeddings", "pad_token_id", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
)
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Provenance, the dropout of the base's own training, other tokens, what a forward pass
# of transformers returns, losses that nobody adds here, and what generation asks for.
_IRRELEVANT = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version", "auto_map"),
        *("torch_dtype", "dtype", "gradient_checkpointing", "attention_dropout"),
        *("bos_token_id", "eos_token_id", "use_cache", "output_attentions"),
        *("output_hidden_states", "return_dict", "pretraining_tp", "id2label"),
        *("label2id", "output_router_logits", "router_aux_loss_coef"),
        *("router_jitter_noise", "cache_implementation", "is_llama_config"),
        *("rope_interleaved", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
        *("summary_type", "summary_use_proj", "task_specific_params", "n_ctx"),
        *("_sliding_window_pattern", "sliding_window_pattern"),
        *("transformers.js_config", "quantization_config_file"),
    )
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one model type is read.

    Attributes:
      family: Names of its weights.
      flags: Fields of `DecoderSpec` that the type decides.
      fields: Further fields that are taken over.
      fixed: Fields that this code is right for at one value only.
      tied: Whether the head is the embedding where the file does not say.
    """

    family: Family
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied: bool = False


_GEMMA = {"norm_offset": True, "post_norms": True, "embed_scale": True}
_SOFTCAPS = {
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
KINDS: Mapping[str, Kind] = {
    "llama": Kind(LLAMA, fields={"attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"}),
    "mistral": Kind(LLAMA),
    "qwen2": Kind(LLAMA, {"qkv_bias": True}),
    "qwen3": Kind(LLAMA, {"qk_norm": True}, {"attention_bias": "qkv_bias"}),
    "gemma2": Kind(
        GEMMA,
        _GEMMA,
        {**_SOFTCAPS, "attention_bias": "qkv_bias"},
        {"use_bidirectional_attention": (None, False)},
        tied=True,
    ),
    "gemma3_text": Kind(
        GEMMA,
        {**_GEMMA, "qk_norm": True},
        {**_SOFTCAPS, "attention_bias": "qkv_bias"},
        {"use_bidirectional_attention": (None, False)},
        tied=True,
    ),
    "mixtral": Kind(
        MIXTRAL,
        fields={
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "experts_per_token",
        },
    ),
    "qwen3_moe": Kind(
        QWEN_MOE,
        {"qk_norm": True, "norm_experts": False},
        {
            "num_experts": "num_experts",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "experts_per_token",
            "norm_topk_prob": "norm_experts",
            "attention_bias": "qkv_bias",
            "moe_intermediate_size": "d_ff",
        },
        {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
    "gpt2": Kind(
        GPT2,
        {
            "norm": "layer",
            "positions": "learned",
            "gated": False,
            "fused_qkv": True,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        fixed={
            "add_cross_attention": (False,),
            "reorder_and_upcast_attn": (False,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
        },
        tied=True,
    ),
}


def spec_from_config(
    config: Mapping[str, Any], where: str
) -> tuple[DecoderSpec, Family]:
    """The decoder's shape from a config.json, and how its weights are called.

    Raises:
      BadInput: A field is missing, has an unknown value, or is one whose meaning this
        code does not know.
    """
    kind = KINDS[config["model_type"]]
    own = _GPT2 if config["model_type"] == "gpt2" else _COMMON
    read = ("activation_function", "n_inner") if own is _GPT2 else ()
    known = {*own, *kind.fields, *kind.fixed, *_READ, *read, *_IRRELEVANT}
    if config["model_type"].startswith("gemma"):
        known.add("query_pre_attn_scalar")
    if unknown := sorted(set(config) - known):
        raise BadInput(
            f"{where} has fields of unknown meaning: {listed(unknown)}. They may "
            "change what the model computes, so they are refused; remove them if you "
            "know that they do not."
        )
    for name, right in kind.fixed.items():
        if (value := config.get(name, right[0])) not in right:
            raise BadInput(f"{where}: {name} must be {right[0]!r}, not {value!r}")
    needed = {name for name, ours in own.items() if not hasattr(DecoderSpec, ours)}
    if missing := sorted(needed - set(config)):
        raise BadInput(f"{where} lacks {', '.join(missing)}")
    fields = dict(kind.flags)
    for name, ours in {**own, **kind.fields}.items():
        if name in config and config[name] is not None:
            fields[ours] = config[name]
    try:
        fields |= _derived(config, fields, kind)
        check_fields(DecoderSpec, fields)
        return DecoderSpec(**fields), kind.family
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where} has a malformed or missing field: {error!r}") from None


def _derived(
    config: Mapping[str, Any], fields: Mapping[str, Any], kind: Kind
) -> dict[str, Any]:
    """What follows from several fields, or has several spellings."""
    heads = fields["num_heads"]
    found: dict[str, Any] = {
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "d_head": config.get("head_dim") or fields["d_model"] // heads,
        "tied": config.get("tie_word_embeddings", kind.tied),
        "pad_id": config.get("pad_token_id") or 0,
    }
    # Llama, Qwen3 and Gemma have one switch for all four maps; Qwen2 none for output.
    if "attention_bias" in kind.fields:
        found["output_bias"] = bool(fields.get("qkv_bias", False))
    if kind.family is GPT2:
        found["d_ff"] = config.get("n_inner") or 4 * fields["d_model"]
        named = config.get("activation_function", "gelu_new")
    else:
        named = config.get("hidden_activation") or config.get("hidden_act", "silu")
        found |= _rotations(config)
        found |= _windows(config, fields["num_layers"])
    if kind.family is GEMMA:
        found["query_scale"] = config.get("query_pre_attn_scalar", 256) ** -0.5
    if named not in _ACTIVATIONS:
        raise BadInput(
            f"the activation must be one of {', '.join(_ACTIVATIONS)}, not {named!r}. "
            f"Nearest: {nearest(str(named), _ACTIVATIONS)}."
        )
    return {**found, "activation": _ACTIVATIONS[named]}


def _rotations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bases and scaling of the rotations, from either spelling."""
    given = config.get("rope_parameters")
    if given is None:
        scaling = dict(config.get("rope_scaling") or {})
        theta = config.get("rope_theta", 10000.0)
        found = {"theta": float(theta), "rope_scaling": _scaling(scaling)}
        if (local := config.get("rope_local_base_freq")) is not None:
            found["local_theta"] = float(local)
        return found
    if "full_attention" in given:
        whole, local = given["full_attention"], given["sliding_attention"]
        if _scaling(local) is not None:
            raise BadInput("rotations of local layers must not be scaled")
        return {**_rotations({"rope_parameters": whole})} | {
            "local_theta": float(local["rope_theta"])
        }
    theta = given.get("rope_theta", 10000.0)
    return {"theta": float(theta), "rope_scaling": _scaling(given)}


def _scaling(given: Mapping[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(given["factor"]))
    if kind != "llama3":
        raise BadInput(
            f"rope_type must be default, linear or llama3, not {kind!r}; use "
            "base=python:package.module:load for others"
        )
    return RopeScaling(
        kind="llama3",
        factor=float(given["factor"]),
        low=float(given["low_freq_factor"]),
        high=float(given["high_freq_factor"]),
        original=int(given["original_max_position_embeddings"]),
    )


def _windows(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The window and which layers have it."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return {}
    kinds = config.get("layer_types") or _kinds(config, num_layers)
    if kinds is None:
        return {"window": window}
    if wrong := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise BadInput(
            f"layer_types may name full_attention and sliding_attention, not {wrong}"
        )
    return {"window": window, "local": [kind == "sliding_attention" for kind in kinds]}


def _kinds(config: Mapping[str, Any], num_layers: int) -> list[str] | None:
    """The kinds of layers where the file has rules for them; None: all alike."""
    kind = config["model_type"]
    if kind == "gemma2":
        local = lambda n: n % 2 == 0
    elif kind == "gemma3_text":
        every = config.get("sliding_window_pattern", 6)
        local = lambda n: (n + 1) % every != 0
    elif (first := config.get("max_window_layers")) is not None:
        local = lambda n: n >= first
    else:
        return None
    names = ("full_attention", "sliding_attention")
    return [names[local(number)] for number in range(num_layers)]
