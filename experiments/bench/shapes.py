"""Shapes that are timed without real weights, and the work that they cannot avoid."""

from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UnknownName, nearest
from lowrank.io import shapes

#: Name -> name of a shape of `lowrank.io.shapes`.
SHAPES: Mapping[str, str] = {"1b": "llama3_1b", "8b": "llama3_8b", "toy": "toy"}


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
    return shapes.config_of(SHAPES[name])


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
