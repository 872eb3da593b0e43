"""A folder of a model is written whole, or not at all."""

import json
import tracemalloc

import jax
import numpy as np
import pytest

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.io.decoders import LLAMA
from lowrank.io.folders import INDEX, write_model
from lowrank.io.safetensors import Tensors
from lowrank.models.decoder import LanguageModel
from lowrank.models.decoder_spec import DecoderSpec

TENSORS = {f"w{n}": np.full((3, n + 1), n, np.float64) for n in range(4)}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("the base's own")
    return folder


def written(tmp_path, source, tensors=TENSORS, **more):
    config = {"model_type": "llama", "dtype": "bfloat16"}
    where = tmp_path / "out" / "model"
    return write_model(where, tensors, config, source, card="said", **more)


@pytest.mark.parametrize("max_shard", [10**6, 60, 1])
def test_what_was_written_is_read_again(tmp_path, source, max_shard):
    folder = written(tmp_path, source, max_shard=max_shard)
    with Tensors(folder) as stored:
        assert {*stored.shapes} == {*TENSORS}
        for name, value in TENSORS.items():
            np.testing.assert_array_equal(stored.read(name), value)
            assert stored.read(name).dtype == np.float32
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert (folder / INDEX).exists() == (len(files) > 1)
    # 12, 24, 36 and 48 bytes, in their order.
    assert len(files) == {10**6: 1, 60: 3, 1: 4}[max_shard]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "README.md").read_text() == "said"
    assert [one.name for one in folder.parent.iterdir()] == ["model"]


def test_nothing_is_written_over_and_nothing_broken_is_written(tmp_path, source):
    folder = written(tmp_path, source)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(BadInput, match="is not empty"):
        written(tmp_path, source)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    broken = {**TENSORS, "w1": np.full(3, np.nan)}
    with pytest.raises(BadInput, match="w1 holds values that are not finite"):
        write_model(tmp_path / "other", broken, {}, source, card="")
    assert not (tmp_path / "other").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, source, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank.io.folders.write_tensors", full)
    with pytest.raises(CannotWrite, match="No space left"):
        written(tmp_path, source)
    assert not any((tmp_path / "out").iterdir())


def test_only_one_tensor_is_held_while_a_model_is_written(tmp_path, source):
    """Of a model in our layout: stacked layers, transposed kernels, two shards."""
    spec = DecoderSpec(
        vocab_size=64, d_model=128, num_layers=8, num_heads=4, num_kv_heads=4,
        d_head=32, d_ff=256, max_positions=32,
    )  # fmt: skip
    params = LanguageModel(spec).init(
        jax.random.key(0),
        {"ids": np.zeros((1, 2), np.int32), "mask": np.ones((1, 2), bool)},
    )["params"]
    tensors = LLAMA.to_hf(params)
    layer = 4 * (4 * 128 * 128 + 3 * 128 * 256)
    tracemalloc.start()
    folder = written(tmp_path, source, tensors, max_shard=5 * layer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = sum(4 * value.size for value in jax.tree.leaves(params))
    assert peak < 2 * layer < whole / 3
    with Tensors(folder) as stored:
        assert stored.shapes == tensors.shapes
        for name, value in tensors.items():
            np.testing.assert_array_equal(stored.read(name), value)
