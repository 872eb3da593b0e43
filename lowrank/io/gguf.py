"""GGUF files, turned once into the folder that every other base comes in.

What is read: Llama's architecture (Llama, SmolLM2, Mistral), in any of the formats that
the package `gguf` dequantizes, with a byte-level BPE vocabulary. llama.cpp stores query
and key with rotated pairs side by side; they are put back to halves. Weights are
written in float32: they are the dequantized ones, not those of the release that was
quantized.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lowrank.core.errors import BadInput
from lowrank.io.files import cached_folder
from lowrank.io.safetensors import SINGLE, write_tensors

#: Version of what is written; a part of the folder's name.
VERSION = 1
_HEAD = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: How text is cut before it is merged, by the file's name for it.
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CUTS = {"smollm": [_DIGITS, _BYTES], "gpt-2": [_BYTES]}
_SPECIAL = 3


def converted(file: Path, sha256: str, cache: Path) -> Path:
    """The folder that stands for a GGUF file; made unless it is there.

    Args:
      file: The GGUF file.
      sha256: Of its bytes.
      cache: Parent of the folder.

    Raises:
      BadInput: It is no GGUF file, or of a kind that is not read; or the package
        `gguf` is missing.
      CannotWrite: The cache cannot be written.
    """
    folder = cache / f"gguf-{sha256[:16]}-{VERSION}"
    if folder.is_dir():
        return folder
    library = _library()
    try:
        reader = library.GGUFReader(str(file))
    # The package raises whatever its parsing meets.
    except Exception as error:
        raise BadInput(f"{file} is not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, {tensor.name for tensor in reader.tensors}, file)
    tokenizer, settings = _tokenizer(fields, file)
    tensors = {_name(tensor.name, file): tensor for tensor in reader.tensors}
    # The file has the fastest axis first.
    shapes = {n: tuple(map(int, t.shape[::-1])) for n, t in tensors.items()}
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }

    def read(name: str) -> np.ndarray:
        found = library.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        value = np.ascontiguousarray(found, np.float32)
        turned = heads.get(name.split(".")[-2])
        return value if turned is None else halves(value, turned)

    def fill(partial: Path) -> None:
        with open(partial / SINGLE, "wb") as stream:
            write_tensors(stream, shapes, read)
        _write(partial / "config.json", config)
        _write(partial / "tokenizer_config.json", settings)
        tokenizer.save(str(partial / "tokenizer.json"))

    return cached_folder(folder, fill)


def halves(
    weight: Float[np.ndarray, "d_out d_in"], heads: int
) -> Float[np.ndarray, "d_out d_in"]:
    """Rows of every head from pairs (0 1) (2 3) ... to the halves that are rotated.

    llama.cpp turns neighbours, Hugging Face's models turn number i with i + d / 2; the
    rows 0 2 4 ... of a head become its first half.
    """
    d_out, d_in = weight.shape
    pairs = weight.reshape(heads, d_out // heads // 2, 2, d_in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(d_out, d_in))


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise BadInput(
            "a GGUF file needs the extra: pip install 'lowrank[gguf]'"
        ) from None


def _name(theirs: str, file: Path) -> str:
    if theirs in _HEAD:
        return _HEAD[theirs]
    block, _, rest = theirs.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    if part not in _LAYER or kind not in ("weight", "bias") or not block.isdigit():
        raise BadInput(f"{file} holds a tensor of unknown purpose: {theirs!r}")
    return f"model.layers.{int(block)}.{_LAYER[part]}.{kind}"


def _config(fields: Mapping[str, Any], names: set[str], file: Path) -> dict[str, Any]:
    """A config.json for what the file describes."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise BadInput(
            f"{file} holds the architecture {kind!r}; only 'llama' is read from GGUF. "
            "Use the safetensors release of this model."
        )
    if "rope_freqs.weight" in names:
        raise BadInput(
            f"{file} scales its rotations by a table; use the safetensors release"
        )
    wanted = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    if missing := [name for name in wanted.values() if f"llama.{name}" not in fields]:
        raise BadInput(f"{file} lacks llama.{', llama.'.join(missing)}")
    found = {name: fields[f"llama.{theirs}"] for name, theirs in wanted.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{name: _plain(value) for name, value in found.items()},
        "rope_theta": _plain(fields.get("llama.rope.freq_base", 10000.0)),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "bos_token_id": _plain(fields.get("tokenizer.ggml.bos_token_id")),
        "eos_token_id": _plain(fields.get("tokenizer.ggml.eos_token_id")),
        "pad_token_id": _plain(fields.get("tokenizer.ggml.padding_token_id")),
        "torch_dtype": "float32",
    }


def _tokenizer(
    fields: Mapping[str, Any], file: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE of the file, and the settings that stand beside it."""
    kind, cut = (
        fields.get("tokenizer.ggml.model"),
        fields.get("tokenizer.ggml.pre", "gpt-2"),
    )
    if kind != "gpt2" or cut not in _CUTS:
        raise BadInput(
            f"{file} has a tokenizer of kind {kind!r}, cut as {cut!r}; read are 'gpt2' "
            f"cut as {', '.join(map(repr, _CUTS))}. Use the safetensors release."
        )
    tokens = list(fields["tokenizer.ggml.tokens"])
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_CUTS[cut])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", ())
    special = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _SPECIAL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    ids = {
        "bos_token": "tokenizer.ggml.bos_token_id",
        "eos_token": "tokenizer.ggml.eos_token_id",
        "pad_token": "tokenizer.ggml.padding_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id",
    }
    settings: dict[str, Any] = {
        name: tokens[int(fields[theirs])]
        for name, theirs in ids.items()
        if theirs in fields
    }
    settings["add_bos_token"] = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, settings


def _plain(value: Any) -> Any:
    """A number as JSON has it; the file's floats are of 32 bits, 1e-5 say."""
    value = value.item() if hasattr(value, "item") else value
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _write(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
