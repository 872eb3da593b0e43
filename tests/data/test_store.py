"""Prepared data is whole or absent, and damage is named instead of read."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from lowrank.core.errors import BadInput, CannotWrite, Corrupt
from lowrank.data import store
from lowrank.data.builders.files import Columns
from lowrank.data.builders.table import Table

ROWS = 40


def make(folder: Path) -> Table:
    # Long texts of random letters: the file spans several blocks of 64 KiB.
    rng = random.Random(0)
    labels = ["yes" if n % 3 else "no" for n in range(ROWS)]
    columns = Columns(
        ids=None,
        texts=[f"{n} {rng.randbytes(6000).hex()}" for n in range(ROWS)],
        labels=labels,
        groups=None,
        places=[f"made:{n}" for n in range(ROWS)],
    )
    return Table(
        columns={"train": columns},
        classes=["no", "yes"],
        data_dir=folder,
        file_format=store.FILE_FORMAT,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return store.prepare(make, tmp_path_factory.mktemp("store"), "made", {"n": 1})


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def shard(folder: Path) -> Path:
    (found,) = folder.rglob("*.array_record*")
    return found


def test_rows_come_back_in_the_order_given(whole):
    classes, splits = store.read(whole)
    assert classes == ("no", "yes")
    train = splits["train"]
    assert [int(text.split()[0]) for text in train["text"]] == list(range(ROWS))
    assert train["id"] == [f"train/{n}" for n in range(ROWS)]
    assert train["label"] == [int(n % 3 > 0) for n in range(ROWS)]


def test_preparing_again_reads_what_is_there(whole):
    def never(folder):
        raise AssertionError("prepared twice")

    assert store.prepare(never, whole.parent, "made", {"n": 1}) == whole


def test_another_key_is_another_folder(whole):
    assert store.prepare(make, whole.parent, "made", {"n": 2}) != whole


def test_a_copy_elsewhere_is_read(copy):
    assert len(store.read(copy)[1]["train"]["id"]) == ROWS


@pytest.mark.parametrize("size", [0, 100, 65536, 2 * 65536, "half", "all but one"])
@pytest.mark.fault(
    "prepared data cut short",
    "exit 78 naming the file",
)
def test_a_truncated_file_is_named(copy, size):
    path = shard(copy)
    full = path.stat().st_size
    assert full > 3 * 65536
    os.truncate(path, {"half": full // 2, "all but one": full - 1}.get(size, size))
    with pytest.raises(Corrupt, match=path.name):
        store.read(copy)


@pytest.mark.parametrize("size", [0, 100, 65536, 2 * 65536, "half", "all but one"])
def test_a_truncated_file_without_a_manifest_never_gives_rows(copy, size):
    """As for data sets that TFDS prepared: 64 KiB blocks may read as None rows."""
    path = shard(copy)
    full = path.stat().st_size
    os.truncate(path, {"half": full // 2, "all but one": full - 1}.get(size, size))
    builder = tfds.builder_from_directory(path.parent)
    with pytest.raises(Corrupt, match=r"Delete .*table"):
        store.read_split(builder, "train", {"text": "text", "label": "label"})


@pytest.mark.fault(
    "data cut at a block border, which reads as None",
    "refused; None never leaves the reader",
)
def test_rows_that_decode_to_none_are_refused(copy):
    builder = tfds.builder_from_directory(shard(copy).parent)

    class Hollow:
        def __len__(self):
            return ROWS

        def __getitems__(self, rows):
            return [{"text": None, "label": None} for _ in rows]

    builder.as_data_source = lambda split: Hollow()
    with pytest.raises(Corrupt, match=r"row 0 .* has no 'text'"):
        store.read_split(builder, "train", {"text": "text", "label": "label"})


def test_a_split_with_fewer_rows_than_prepared_is_refused(copy):
    builder = tfds.builder_from_directory(shard(copy).parent)
    builder.as_data_source = lambda split: Short()

    class Short:
        def __len__(self):
            return ROWS - 1

        def __getitems__(self, rows):
            return [{"text": "t", "label": 0} for _ in rows]

    with pytest.raises(Corrupt, match=f"holds {ROWS - 1} rows of the {ROWS}"):
        store.read_split(builder, "train", {"text": "text", "label": "label"})


def test_a_data_set_appears_in_one_step(tmp_path, monkeypatch):
    def refuse(source, target):
        assert (source / store.MANIFEST).is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.raises(CannotWrite, match="No space left"):
        store.prepare(make, tmp_path, "made", {})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.fault(
    "a flipped bit in prepared data",
    "exit 78 naming the file",
)
def test_a_flipped_bit_is_named(copy):
    path = shard(copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="sha256"):
        store.read(copy)


def test_a_lost_file_and_a_broken_manifest_are_named(copy):
    lost = next(copy.rglob("features.json"))
    lost.unlink()
    with pytest.raises(Corrupt, match=r"features\.json"):
        store.read(copy)
    (copy / store.MANIFEST).write_text("{")
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        store.read(copy)


def test_a_folder_without_a_manifest_is_made_again(whole, tmp_path):
    folder = tmp_path / whole.name
    folder.mkdir()
    (folder / "half").write_text("a leftover")
    made = store.prepare(make, tmp_path, "made", {"n": 1})
    assert made == folder
    assert len(store.read(made)[1]["train"]["id"]) == ROWS
    assert not (folder / "half").exists()


def test_a_failed_preparation_leaves_nothing_to_read(tmp_path):
    def fails(folder):
        (folder / "started").write_text("x")
        raise BadInput("rows are wrong")

    with pytest.raises(BadInput, match="rows are wrong"):
        store.prepare(fails, tmp_path, "made", {})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.fault(
    "kill -9 while data is prepared",
    "cleaned up and done again",
)
def test_a_killed_preparation_is_cleaned_up_and_done_again(tmp_path, caplog):
    code = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[2])
import test_store
from lowrank.data import store
from lowrank.data.builders.table import Table
rows = Table._generate_examples
def slow(self, split, columns):
    for number, row in enumerate(rows(self, split, columns)):
        if number == 5:
            pathlib.Path(sys.argv[1], "reached").touch()
            time.sleep(60)
        yield row
Table._generate_examples = slow
store.prepare(test_store.make, pathlib.Path(sys.argv[1]), "made", {})
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    )
    try:
        give_up = time.monotonic() + 60
        while not (tmp_path / "reached").exists() and child.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].startswith(".preparing-")
    made = store.prepare(make, tmp_path, "made", {})
    assert "killed preparation" in caplog.text
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [made]
    assert len(store.read(made)[1]["train"]["id"]) == ROWS


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="LOWRANK_CACHE"):
        store.prepare(make, tmp_path / "file" / "data", "made", {})


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    assert store.cache_folder("tokens") == tmp_path / "tokens"
    assert store.cache_folder("tokens", tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv("LOWRANK_CACHE")
    assert store.cache_folder("data") == Path.home() / ".cache" / "lowrank" / "data"
