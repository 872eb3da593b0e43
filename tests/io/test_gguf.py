"""GGUF files: what llama.cpp permuted is put back, and what is not read is refused."""

import hashlib
import json
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from lowrank.core.errors import BadInput
from lowrank.io import gguf as ours
from lowrank.io.language import load
from lowrank.io.safetensors import Tensors
from lowrank.io.sources import locate

WORDS = ["<unk>", "<s>", "<end>", *(chr(c) for c in range(97, 123)), "\u0120", "ab"]
HEADS, KV, WIDTH, FF, LAYERS = 4, 2, 16, 24, 2
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def pairs(weight, heads):
    """llama.cpp's order of a head's rows: number i beside number i + d / 2."""
    d_out, d_in = weight.shape
    halves = weight.reshape(heads, 2, d_out // heads // 2, d_in)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(d_out, d_in))


def weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.3 * rng.normal(size=shape)).astype(np.float32)
    found = {
        "token_embd.weight": draw(len(WORDS), WIDTH),
        "output_norm.weight": 1 + draw(WIDTH),
    }
    for n in range(LAYERS):
        shapes = {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_gate": (FF, WIDTH),
            "ffn_up": (FF, WIDTH), "ffn_down": (WIDTH, FF),
        }  # fmt: skip
        found |= {f"blk.{n}.{name}.weight": draw(*s) for name, s in shapes.items()}
    return found


def write(path, *, tensors=None, arch="llama", pre="smollm", more=()):
    """A GGUF file as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in (weights() if tensors is None else tensors).items():
        part = name.split(".")[-2]
        heads = {"attn_q": HEADS, "attn_k": KV}.get(part)
        writer.add_tensor(name, pairs(value, heads) if heads else value)
    for name, value in more:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "tiny.gguf")


def test_weights_come_in_the_order_that_is_rotated(file, tmp_path):
    folder, provenance = locate(str(file), tmp_path / "cache")
    assert provenance["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    want = weights()
    with Tensors(folder) as tensors:
        read = lambda name: tensors.read(name)
        np.testing.assert_array_equal(
            read("model.layers.1.self_attn.q_proj.weight"), want["blk.1.attn_q.weight"]
        )
        np.testing.assert_array_equal(
            read("model.layers.0.self_attn.k_proj.weight"), want["blk.0.attn_k.weight"]
        )
        np.testing.assert_array_equal(
            read("model.embed_tokens.weight"), want["token_embd.weight"]
        )
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"]


def test_it_is_a_base_with_its_tokenizer(file, tmp_path):
    base = load(str(file), cache=tmp_path / "cache")
    assert base.end == (2,)
    assert base.begin is None
    assert base.chat_template == TEMPLATE
    assert base.spec.theta == 500.0
    ids = base.tokenizer.encode("<s>ab c<end>").ids
    assert [WORDS[n] for n in ids] == ["<s>", "ab", "\u0120", "c", "<end>"]
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "ab c"
    batch = {"ids": np.array([ids]), "mask": np.ones((1, len(ids)), bool)}
    logits = jax.jit(base.apply)(base.params, batch)
    assert logits.shape == (1, 5, len(WORDS))
    assert np.isfinite(logits).all()


def test_it_is_converted_once(file, tmp_path, monkeypatch):
    first, _ = locate(str(file), tmp_path / "cache")
    monkeypatch.setattr(ours, "_library", lambda: pytest.fail("was read again"))
    assert locate(str(file), tmp_path / "cache")[0] == first
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'"),
        ({"pre": "llama-bpe"}, "cut as 'llama-bpe'"),
        (
            {"more": [("blk.0.strange.weight", np.ones(2, np.float32))]},
            "'blk.0.strange",
        ),
        ({"more": [("rope_freqs.weight", np.ones(2, np.float32))]}, "by a table"),
    ],
)
def test_what_is_not_read_is_refused_and_leaves_nothing(tmp_path, options, text):
    file = write(tmp_path / "odd.gguf", **options)
    with pytest.raises(BadInput, match=text):
        locate(str(file), tmp_path / "cache")
    cache = tmp_path / "cache"
    assert not cache.exists() or not [*cache.iterdir()]


def test_a_damaged_file_is_refused(file, tmp_path):
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BadInput, match="not a readable GGUF file"):
        locate(str(file), tmp_path / "cache")


def test_without_the_package_the_extra_is_named(file, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(ours.importlib, "import_module", missing)
    with pytest.raises(BadInput, match=r"lowrank\[gguf\]"):
        locate(str(file), tmp_path / "cache")


def test_the_tokenizer_file_is_one(file, tmp_path):
    folder, _ = locate(str(file), tmp_path / "cache")
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == len(
        WORDS
    )


def test_only_one_tensor_is_held_while_a_file_is_converted(tmp_path):
    """The package maps the file; ours are the tensors in float32."""
    rng = np.random.default_rng(0)
    big = {
        name: rng.normal(size=value.shape).astype(np.float32)
        for name, value in weights().items()
    }
    width = 20_000
    for n in range(LAYERS):
        for name in ("ffn_gate", "ffn_up"):
            big[f"blk.{n}.{name}.weight"] = rng.normal(size=(width, WIDTH)).astype("f4")
        big[f"blk.{n}.ffn_down.weight"] = rng.normal(size=(WIDTH, width)).astype("f4")
    file = write(tmp_path / "big.gguf", tensors=big)
    tracemalloc.start()
    folder = ours.converted(file, "a" * 64, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = 4 * width * WIDTH
    assert peak < 2.5 * one < sum(value.nbytes for value in big.values()) / 2
    with Tensors(folder) as stored:
        for n in range(LAYERS):
            np.testing.assert_array_equal(
                stored.read(f"model.layers.{n}.mlp.up_proj.weight"),
                big[f"blk.{n}.ffn_up.weight"],
            )
