"""Rows are tokenized once, as the tokenizer would, and the cache never lies."""

import logging

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.data import tokens as tokens_file
from lowrank.data.splits import Split
from lowrank.data.tokens import tokenize

LENGTHS = [1, 5, 3, 12, 6]


@pytest.fixture
def split():
    texts = [" ".join(f"w{(n + k) % 50}" for k in range(n)) for n in LENGTHS]
    ids = tuple(f"r{n}" for n in range(len(texts)))
    return Split(ids, tuple(texts), np.zeros(len(texts), np.int32))


@pytest.fixture
def plain(tokenizer):
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def test_rows_are_what_the_tokenizer_gives_without_its_padding(split, tokenizer):
    made = tokenize(split, tokenizer, max_length=32, data="d")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    assert len(made) == len(split)
    assert made.lengths.tolist() == [n + 2 for n in LENGTHS]
    for number, text in enumerate(split.texts):
        assert made.row(number).tolist() == tokenizer.encode(text).ids
    assert made.num_truncated == 0
    assert made.num_suffix == 1
    assert made.pad_id == 0


def test_the_given_tokenizer_is_not_changed(split, tokenizer):
    before = tokenizer.to_str()
    tokenize(split, tokenizer, max_length=4, data="d")
    assert tokenizer.to_str() == before


def test_truncation_keeps_closing_tokens_and_is_reported(split, plain, caplog):
    with caplog.at_level(logging.WARNING):
        made = tokenize(split, plain, max_length=7, data="d")
    assert made.num_truncated == 2
    assert "2 of 5 rows are longer than 7 tokens" in caplog.text
    assert made.report() == {
        "rows": 5,
        "num_truncated": 2,
        "max_length": 7,
        "lengths": {"min": 3.0, "median": 7.0, "p95": 7.0, "max": 7.0},
    }
    plain.enable_truncation(7)
    for number, text in enumerate(split.texts):
        assert made.row(number).tolist() == plain.encode(text).ids
        assert made.row(number)[-1] == 3


def test_the_second_time_the_cache_answers(split, tokenizer, monkeypatch, tmp_path):
    first = tokenize(split, tokenizer, max_length=7, data="d", cache=tmp_path)
    monkeypatch.setattr(tokens_file, "_encode", None)
    again = tokenize(split, tokenizer, max_length=7, data="d", cache=tmp_path)
    np.testing.assert_array_equal(again.ids, first.ids)
    np.testing.assert_array_equal(again.offsets, first.offsets)
    assert (again.fingerprint, again.num_truncated) == (first.fingerprint, 2)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_whatever_changes_the_ids_changes_the_key(split, tokenizer, tmp_path):
    def key(rows=split, length=7, data="d"):
        made = tokenize(rows, tokenizer, max_length=length, data=data, cache=tmp_path)
        return made.fingerprint

    keys = [key(), key(length=8), key(data="e"), key(rows=split.take([0, 1]))]
    tokenizer.add_tokens(["w1 w2"])
    keys.append(key())
    assert len(set(keys)) == len(keys) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_cache_is_noticed_and_made_again(
    split, tokenizer, tmp_path, caplog, damage
):
    first = tokenize(split, tokenizer, max_length=32, data="d", cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(first.ids.tobytes()[:16]) + 5] ^= 4
    elif damage == "other":
        tokenize(split, tokenizer, max_length=31, data="d", cache=tmp_path)
        (other,) = set(tmp_path.iterdir()) - {path}
        content = bytearray(other.read_bytes())
    size = {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))
    path.write_bytes(content[:size])
    again = tokenize(split, tokenizer, max_length=32, data="d", cache=tmp_path)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(again.ids, first.ids)
    assert tokens_file._load(path, again.fingerprint) is not None


def test_a_pickle_in_the_cache_is_not_opened(split, tokenizer, tmp_path, caplog):
    tokenize(split, tokenizer, max_length=32, data="d", cache=tmp_path)
    (path,) = tmp_path.iterdir()

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("canary").touch, ())

    np.savez(path, ids=np.array([Evil()], object), offsets=[0], facts=[0])
    (tmp_path / "canary").unlink(missing_ok=True)
    assert len(tokenize(split, tokenizer, max_length=32, data="d", cache=tmp_path)) == 5
    assert "is damaged" in caplog.text
    assert not (tmp_path / "canary").exists()


def test_no_room_for_text_and_rows_without_tokens_are_refused(split, plain):
    with pytest.raises(BadInput, match="no room for text beside 2"):
        tokenize(split, plain, max_length=2, data="d")
    # Without a token for the unknown, one model fails and another gives nothing.
    failing = tokenizers.Tokenizer(models.WordLevel({"x": 0}))
    with pytest.raises(BadInput, match="cannot encode rows 'r0'"):
        tokenize(split, failing, max_length=2, data="d")
    silent = tokenizers.Tokenizer(models.BPE({"x": 0}, []))
    with pytest.raises(BadInput, match="row 'r0' has no tokens"):
        tokenize(split, silent, max_length=2, data="d")


def test_a_cache_that_cannot_be_written_says_what_to_do(split, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="LOWRANK_CACHE"):
        tokenize(
            split, tokenizer, max_length=9, data="d", cache=tmp_path / "file" / "tokens"
        )
