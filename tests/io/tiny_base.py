"""A tiny base whose tokenizer knows its words by their numbers."""

import jax
import numpy as np
from tiny_hf import CONFIG, SPEC, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers

from lowrank.models.encoder import Classifier

ONE = {
    "ids": np.array([[5, 3, 9, 0]], np.int32),
    "mask": np.array([[1, 1, 1, 0]], bool),
}


def fresh(scan=True, num_classes=2):
    model = Classifier(SPEC, num_classes, pooling="pooler", scan=scan)
    return jax.eval_shape(model.init, jax.random.key(0), ONE)["params"]


def write(folder, tensors, config=CONFIG, size=SPEC.vocab_size):
    words = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="w0")
    tokenizer.enable_truncation(4)
    return write_folder(folder, tensors, tokenizer, config)
