"""Checkpoints are read whole and exactly, or refused with file and reason."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save, save_file

from lowrank.core.errors import BadInput, UnknownName
from lowrank.io.safetensors import INDEX, SINGLE, Tensors, in_order, read_json

RNG = np.random.default_rng(0)
VALUES = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "b.weight": RNG.normal(size=(5,)).astype(np.float16),
    "c.weight": RNG.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HOMES = {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}


def write_shards(folder, index=None, homes=HOMES, values=VALUES):
    for shard in sorted({*homes.values()}):
        mine = {name: values[name] for name in homes if homes[name] == shard}
        save_file(mine, folder / shard)
    table = {"metadata": {}, "weight_map": HOMES if index is None else index}
    (folder / INDEX).write_text(json.dumps(table))


def write_header(file, header, body=b""):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("sharded", [False, True])
def test_values_come_back_in_the_stored_dtype(tmp_path, sharded):
    if sharded:
        write_shards(tmp_path)
    else:
        save_file(VALUES, tmp_path / SINGLE)
    with Tensors(tmp_path) as tensors:
        assert tensors.shapes == {name: value.shape for name, value in VALUES.items()}
        for name, value in VALUES.items():
            got = tensors.read(name)
            assert got.dtype == value.dtype
            np.testing.assert_array_equal(got, value)


def test_an_unknown_tensor_names_the_nearest(tmp_path):
    save_file(VALUES, tmp_path / SINGLE)
    with Tensors(tmp_path) as tensors, pytest.raises(UnknownName, match=r"a\.weight"):
        tensors.read("a.wieght")


@pytest.mark.parametrize(
    "index",
    [
        {**HOMES, "d.weight": SECOND},
        {name: HOMES[name] for name in ("a.weight", "c.weight")},
        {**HOMES, "b.weight": SECOND},
    ],
    ids=["names more than the shards hold", "names less", "names the wrong shard"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, index):
    write_shards(tmp_path, index)
    with pytest.raises(BadInput, match=r"disagree about 1 tensors: [bd]\.weight"):
        Tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_shards(tmp_path)
    save_file(
        {"c.weight": VALUES["c.weight"], "a.weight": VALUES["a.weight"]},
        tmp_path / SECOND,
    )
    with pytest.raises(BadInput, match="in two files"):
        Tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(BadInput, match=SECOND):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    write_shards(tmp_path, {**HOMES, "c.weight": shard})
    with pytest.raises(BadInput, match="plain"):
        Tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', "[" * 10_000])
def test_an_index_that_is_no_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(BadInput, match=INDEX.replace(".", r"\.")):
        Tensors(tmp_path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    file = tmp_path / SINGLE
    save_file(VALUES, file)
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"model\.safetensors is not a readable"):
            Tensors(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        lambda file: file.write_bytes(b"PK\x03\x04" + bytes(64)),
        lambda file: write_header(
            file,
            {"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 16]}},
            bytes(16),
        ),
        lambda file: write_header(
            file,
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
            bytes(8),
        ),
    ],
    ids=["header length", "a zip", "shape beyond the bytes", "reversed offsets"],
)
def test_a_hostile_file_is_refused(tmp_path, spoil):
    spoil(tmp_path / SINGLE)
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        Tensors(tmp_path)


def test_an_odd_name_is_refused(tmp_path):
    save_file({"../../etc/passwd": np.zeros(1, np.float32)}, tmp_path / SINGLE)
    with pytest.raises(BadInput, match="odd name"):
        Tensors(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(tmp_path, value):
    save_file({"a": np.array([1.0, value], np.float32)}, tmp_path / SINGLE)
    with Tensors(tmp_path) as tensors, pytest.raises(BadInput, match="NaN or infinity"):
        tensors.read("a")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float64])
def test_only_float_weights_are_read(tmp_path, dtype):
    save_file({"a": np.zeros(2, dtype)}, tmp_path / SINGLE)
    with Tensors(tmp_path) as tensors, pytest.raises(BadInput, match="F16, BF16, F32"):
        tensors.read("a")


def test_no_checkpoint_and_two_checkpoints_are_refused(tmp_path):
    with pytest.raises(BadInput, match="not a folder"):
        Tensors(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="Pickled"):
        Tensors(tmp_path)
    write_shards(tmp_path)
    save_file(VALUES, tmp_path / SINGLE)
    with pytest.raises(BadInput, match="both"):
        Tensors(tmp_path)


def test_json_that_is_missing_or_no_object_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(BadInput, match="not readable JSON"):
        read_json(tmp_path / "config.json")


def test_equal_tensors_are_equal_files(tmp_path):
    """The package orders metadata by chance; ours go by name, nothing else moves."""
    metadata = {name: str(n) for n, name in enumerate("hgfedcba")}
    files = {in_order(save(VALUES, metadata)) for _ in range(20)}
    assert len(files) == 1
    (tmp_path / "one.safetensors").write_bytes(*files)
    with safe_open(tmp_path / "one.safetensors", "numpy") as stored:
        assert stored.metadata() == metadata
        for name, value in VALUES.items():
            np.testing.assert_array_equal(stored.get_tensor(name), value)
