"""Language models of published shapes without weights: to rehearse, and to be timed.

`base.source=shape:NAME`. The fields are those of each model's config.json.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UnknownName, nearest
from lowrank.io.decoder_configs import spec_from_config
from lowrank.io.language import Language
from lowrank.models.decoder import LanguageModel
from lowrank.models.head import MOST_LOGITS

#: How a source begins that names a shape.
PREFIX = "shape:"
_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
#: Name -> config.json; "toy" is small enough for a test.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Llama 3.2 1B
    "llama3_1b": {
        **_LLAMA, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    # Llama 3 8B
    "llama3_8b": {
        **_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    # Llama 3 70B
    "llama3_70b": {
        **_LLAMA, "hidden_size": 8192, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
    "toy": {
        **_LLAMA, "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a shape.

    Raises:
      UnknownName: There is none of that name.
    """
    if name not in SHAPES:
        raise UnknownName(
            f"no shape is called {name!r}. Nearest: {nearest(name, SHAPES)}. There are "
            f"{', '.join(SHAPES)}."
        )
    return dict(SHAPES[name])


def shaped(
    name: str,
    *,
    scan: bool = True,
    remat: str = "none",
    dtype: str = "float32",
    weights: str = "float32",
    parts: int = 1,
) -> Language:
    """A language model whose weights are shapes, and which reads no text.

    Args:
      name: Of `SHAPES`.
      scan, remat, dtype, parts: As `language.load` takes them.
      weights: What the weights are stored in.

    Raises:
      UnknownName: There is no such shape.
    """
    config = config_of(name)
    shape, family = spec_from_config(config, name)
    options = (scan, remat, dtype, None, parts * MOST_LOGITS)
    model = LanguageModel(shape, *options)
    one = {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)}
    params = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    stored = jnp.dtype(weights)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), params)

    def applied(method: str | None) -> Any:
        return lambda params, *given: model.apply(
            {"params": params}, *given, method=method
        )

    return Language(
        name=name,
        apply=applied(None),
        scores=applied("scores"),
        read=applied("read"),
        params=params,
        tokenizer=None,
        fingerprint="",
        spec=shape,
        family=family,
        max_length=shape.max_positions,
        end=(),
        begin=None,
        chat_template=None,
        dtype=dtype,
        provenance={"source": PREFIX + name},
        hf_config=config,
    )
