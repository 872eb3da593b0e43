"""A tiny Llama with words of its own, and meanings that can be said in them."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from lowrank.data.builders import rnnlg
from lowrank.io.decoder_configs import spec_from_config
from lowrank.models.decoder import LanguageModel

WORDS = [
    *("<unk>", "<end>", "<user>", "<assistant>", "Say", "this", "to", "a", "customer"),
    *("as", "one", "sentence", "or", "two", "is", "the", "in", "red", "blue", "big"),
    *("small", "inform", "color", "size", "name", "x", "y", "z", "(", ")", "=", ";"),
    *(",", ":"),
]
CONFIG = {
    "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_llama(root, words=(), **config):
    """A random model in the layout of Hugging Face, with its tokenizer; more words."""
    words = list(dict.fromkeys([*WORDS, *words]))
    config = CONFIG | {"vocab_size": len(words)} | config
    (root / "config.json").write_text(json.dumps(config))
    shape, family = spec_from_config(config, "here")
    one = {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)}
    params = jax.jit(LanguageModel(shape).init)(jax.random.key(0), one)["params"]
    save_file(dict(family.to_hf(params)), root / "model.safetensors")
    made = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    made.add_special_tokens([AddedToken(w) for w in ("<end>", "<user>", "<assistant>")])
    made.save(str(root / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


def write_meanings(root):
    """Files as RNNLG's, about the tiny world."""
    rows = [
        [f"inform(color={c};size={s};name={n})", f"{n} is {s} in {c}", "x"]
        for c in ("red", "blue")
        for s in ("big", "small")
        for n in ("x", "y", "z", "the", "a", "one", "two", "this")
    ]
    for number, name in enumerate(rnnlg.FILES):
        (root / name).write_text(json.dumps(rows[number::3]))
    return root


def talking_run(root):
    """Arguments of a small run of a language model that answers, and what it reads."""
    for name in ("llama", "data"):
        (root / name).mkdir()
    write_llama(root / "llama")
    write_meanings(root / "data")
    return (
        "experiment=laptop", f"base.source={root / 'llama'}", "delta.rank=4",
        f"data.path={root / 'data'}", f"run.cache={root / 'cache'}",
        f"run.root={root / 'runs'}", "evaluate.resamples=50", "evaluate.batch_size=8",
        "data.train_rows=null", "data.validation_rows=null", "data.test_rows=null",
        "data.batching.length=64", "data.batching.batch_size=8",
        "evaluate.answers=8", "delta.targets=decoder/**/kernel",
    )  # fmt: skip
