"""Tiny random decoders of every family, as transformers makes and saves them."""

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the 0.02 of a fresh model, so that attention is far from uniform.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
#: Name -> (config class, model class, fields of the config).
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama_linear": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama_biased": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2_windows": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 8,
        },
    ),
}
LENGTHS = np.array([14, 9, 1])


def made(name, folder):
    config, model, fields = FAMILIES[name]
    torch.manual_seed(0)
    fields = {**COMMON, **fields}
    if name == "gpt2":
        fields = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4,
                  "n_positions": 64, "initializer_range": 0.3, "bos_token_id": 1,
                  "eos_token_id": 2}  # fmt: skip
    own = getattr(transformers, model)(getattr(transformers, config)(**fields))
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    own.eval().save_pretrained(folder)
    return own


def tokenizer_beside(folder, vocab_size=99):
    """A tokenizer.json, without which a folder is no base."""
    words = {f"w{index}": index for index in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )


def batch_of(seq=14):
    ids = np.random.default_rng(0).integers(3, 99, (len(LENGTHS), seq))
    mask = np.arange(seq)[None] < LENGTHS[:, None]
    return {"ids": np.where(mask, ids, 0).astype(np.int32), "mask": mask}
