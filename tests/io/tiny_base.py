"""A tiny base in the layout of Hugging Face."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lowrank.models.encoder import Classifier
from lowrank.models.zoo import SIZES

SPEC = SIZES["tiny_test"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": SPEC.vocab_size,
    "hidden_size": SPEC.d_model,
    "num_hidden_layers": SPEC.num_layers,
    "num_attention_heads": SPEC.num_heads,
    "intermediate_size": SPEC.d_ff,
    "max_position_embeddings": SPEC.max_positions,
}
ONE = {
    "ids": np.array([[5, 3, 9, 0]], np.int32),
    "mask": np.array([[1, 1, 1, 0]], bool),
}


def fresh(scan=True, num_classes=2):
    model = Classifier(SPEC, num_classes, pooling="pooler", scan=scan)
    return jax.eval_shape(model.init, jax.random.key(0), ONE)["params"]


def write(folder, tensors, config=CONFIG, size=SPEC.vocab_size):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="w0")
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
