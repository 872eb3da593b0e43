"""Files of strangers, mutated without end: an error of ours, or read whole.

Each kind of file is fuzzed in a child of its own, under a limit on its memory: a crash
of foreign code, or an allocation from a number in a header, ends only that child.
"""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lives import called, limit_memory
from tiny_hf import SPEC

from lowrank.core.errors import LowrankError
from lowrank.core.trees import flatten, shapes_of
from lowrank.data.builders.files import Reading, read_columns
from lowrank.data.splits import Split
from lowrank.data.tokens import tokenize
from lowrank.io.bert import spec_from_config
from lowrank.io.hub import read_tokenizer
from lowrank.io.peft import CONFIG, MODEL, read_adapter
from lowrank.io.safetensors import SINGLE, Tensors, read_json
from lowrank.run import stored

pytestmark = pytest.mark.faults

EXAMPLES = 150
EXTRA_BYTES = 2**30
#: Where a change goes: near the beginning, where headers are, or anywhere.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "repeat", "digit", "cut"]),
        st.booleans(),
        st.integers(0, 2**31),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)
HEADER = 400
TEXTS = ("word1 cat word2", "caf\u00e9 \u4e2d\u6587 \U0001f600", "x" * 500)
ROWS = Split(tuple("abc"), TEXTS, np.zeros(3, np.int32), None)


def mutate(data, edits):
    """`data` after some edits."""
    for kind, early, where, value in edits:
        if not data:
            break
        at = where % min(len(data), HEADER if early else len(data))
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + bytes([value]) * (1 + value % 4) + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + 1 + value % 8 :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + value] + data[at:]
        elif kind == "digit":
            digits = [n for n, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                at = digits[where % len(digits)]
                data = data[:at] + b"9" * (1 + value % 12) + data[at + 1 :]
        elif not early:
            data = data[:at]
    return data


def fuzz(kind, folder):
    """The body of a child: counts outcomes of reading mutated files."""
    file, read = READERS[kind](folder)
    original = file.read_bytes()
    counts = {"refused": 0, "read whole": 0}

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(EDITS)
    def attempt(edits):
        file.write_bytes(mutate(original, edits))
        try:
            read()
        except LowrankError:
            counts["refused"] += 1
        else:
            counts["read whole"] += 1

    # What is loaded once, with the thread pools and arenas it reserves, counts not.
    read()
    limit_memory(EXTRA_BYTES)
    attempt()
    return counts


def weights(folder):
    with Tensors(folder / "base") as tensors:
        expected = dict(tensors.shapes)

    def read():
        with Tensors(folder / "base") as tensors:
            for name, shape in tensors.shapes.items():
                value = tensors.read(name)
                assert value.shape == shape
                assert np.isfinite(value).all()
            assert len(tensors.shapes) <= 2 * len(expected)

    return folder / "base" / SINGLE, read


def architecture(folder):
    file = folder / "base" / "config.json"
    return file, lambda: spec_from_config(read_json(file), str(file))


def tokenizer(folder):
    file = folder / "base" / "tokenizer.json"

    def read():
        found = read_tokenizer(file, SPEC.vocab_size)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        tokens = tokenize(
            ROWS, found, max_length=16, data="rows", cache=folder / "cache"
        )
        assert len(tokens) == len(ROWS)
        assert tokens.ids.max() < SPEC.vocab_size

    return file, read


def adapter(folder, name):
    place = folder / "adapter"
    (place / "lowrank.json").unlink(missing_ok=True)

    def read():
        for one in read_adapter(place).corrections.values():
            assert one.a.shape[0] == one.b.shape[0] == one.rank
            assert np.isfinite(one.a).all()
            assert np.isfinite(one.b).all()
            assert np.isfinite(one.scale)

    return place / name, read


def trained(folder):
    from safetensors import safe_open

    file = folder / "trained.safetensors"
    with safe_open(file, "numpy") as opened:
        base = opened.metadata()["base"]
        like = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    like = shapes_of(like)

    def read():
        found = stored.read_trained(folder, like, base)
        assert flatten(found)[0].keys() == flatten(like)[0].keys()

    return file, read


def table(folder, name):
    file = folder / name

    def read():
        found = read_columns([(file, file.read_bytes())], Reading())
        assert len(found.texts) == len(found.labels) == len(found.places) > 0
        assert all(text.strip() for text in found.texts)
        assert all(label.strip() for label in found.labels)

    return file, read


READERS = {
    "safetensors of a base": weights,
    "config.json of a base": architecture,
    "tokenizer.json": tokenizer,
    "safetensors of an adapter": lambda folder: adapter(folder, MODEL),
    "adapter_config.json": lambda folder: adapter(folder, CONFIG),
    "trained.safetensors": trained,
    "CSV": lambda folder: table(folder, "table.csv"),
    "JSON lines": lambda folder: table(folder, "table.jsonl"),
    "Parquet": lambda folder: table(folder, "table.parquet"),
}


def write_tables(folder, csv):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    rows = [{"text": text, "label": label} for text, label in lines]
    shutil.copy(csv, folder / "table.csv")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "table.jsonl").write_text(text)
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.fault(
    "hostile weights, tokenizer, adapter and table files (fuzzed)",
    "refused with a clear error or read whole, within 1 GiB; no crash, nothing partial",
)
def test_hostile_files(world, undisturbed, tmp_path, outcomes, kind):
    shutil.copytree(world.base, tmp_path / "base")
    shutil.copytree(undisturbed / "adapter", tmp_path / "adapter")
    shutil.copy(undisturbed / "trained.safetensors", tmp_path)
    write_tables(tmp_path, world.table)
    counts = called(world, fuzz, (kind, tmp_path), tmp_path / "log")
    assert sum(counts.values()) >= EXAMPLES / 2
    assert counts["refused"] > 0
    for outcome, count in counts.items():
        outcomes[outcome] += count
