"""The folder of a tiny base, as Hugging Face lays one out."""

import json

from safetensors.numpy import save_file

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


def write_folder(folder, tensors, tokenizer, config=CONFIG):
    """Writes weights, config and tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
