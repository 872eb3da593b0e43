"""Shapes of language models whose weights need not be real to be timed.

The fields are those of the config.json of Llama 3.2 1B and Llama 3 8B; "toy" is small
enough for a test.
"""

from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UnknownName, nearest

_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Name -> config.json.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "toy": {
        **_LLAMA, "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a shape.

    Raises:
      UnknownName: There is none of that name.
    """
    if name not in SHAPES:
        raise UnknownName(
            f"bench: no shape is called {name!r}. Nearest: {nearest(name, SHAPES)}. "
            f"There are {', '.join(SHAPES)}."
        )
    return dict(SHAPES[name])


def model_flops(config: Mapping[str, Any], batch: int, seq: int, rank: int) -> float:
    """Matrix FLOPs that a training step of LoRA on all linear maps cannot do without.

    Forward, and backward to the activations, for weights that stand still; of factors
    their own gradients, too. Attention counts all pairs of places, as the literature on
    utilisation does (Chowdhery et al. 2022, app. B); what is computed again in the
    backward pass does not count.
    """
    width, d_ff = config["hidden_size"], config["intermediate_size"]
    narrow = width * config["num_key_value_heads"] // config["num_attention_heads"]
    maps = [(width, width), (width, narrow), (width, narrow), (width, width)]
    maps += [(width, d_ff), (width, d_ff), (d_ff, width)]
    weights = sum(d_in * d_out for d_in, d_out in maps)
    factors = sum(rank * (d_in + d_out) for d_in, d_out in maps)
    layer = 4 * weights + 6 * factors
    # Two products forward, four backward, of every query with every key.
    layer += 12 * width * seq
    head = 4 * width * config["vocab_size"]
    return float(batch * seq * (config["num_hidden_layers"] * layer + head))
