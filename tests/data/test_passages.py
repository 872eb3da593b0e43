"""Plain texts: documents on one side of every split, every token predicted once."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build
from lowrank.data.packing import one_by_one
from lowrank.data.passages import documents, windows
from lowrank.data.splits import Split
from lowrank.data.tasks import CATALOGUE

WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh"]
TEXTS = [" ".join("abcdefgh"[: 1 + n % 8]) + f" {n}" for n in range(40)]


def tokenizer():
    words = {word: n for n, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def rows(texts):
    ids = tuple(f"doc{n}" for n in range(len(texts)))
    return Split(ids, tuple(texts), np.zeros(len(texts), np.int32), ids)


def loaded(**fields):
    return build({"name": "text", **fields}, CATALOGUE, "data").load()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_token_but_the_first_is_predicted_once(lengths, length, begins):
    texts = [" ".join("abcdefgh"[n % 8] for n in range(size)) for size in lengths]
    begin = 1 if begins else None
    if max(lengths) + begins < 2:
        with pytest.raises(BadInput, match="two tokens"):
            windows(tokenizer(), rows(texts), length, begin=begin)
        return
    spoken, ids, groups = windows(tokenizer(), rows(texts), length, begin=begin)
    found = one_by_one(spoken, 0)
    assert found["ids"].shape[1] <= length
    assert len(ids) == len(groups) == len(spoken)
    for name, text in zip(rows(texts).ids, texts, strict=True):
        whole = tokenizer().encode(text).ids
        wanted = whole if begins else whole[1:]
        own = [n for n, group in enumerate(groups) if group == name]
        labels = [found["label"][n][found["weight"][n] > 0] for n in own]
        assert np.concatenate([*labels, []]).tolist() == wanted


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_file_is_cut_by_document(tmp_path, suffix):
    path = tmp_path / f"own{suffix}"
    path.write_text(
        {
            ".txt": "\n\n".join(TEXTS),
            ".jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS),
            ".csv": "\n".join(["text", *TEXTS]),
        }[suffix]
    )
    task = loaded(path=str(path))
    assert {*task.splits} == {"train", "validation", "test"}
    every = [text for split in task.splits.values() for text in split.texts]
    assert sorted(every) == sorted(TEXTS)
    assert task.fingerprint == loaded(path=str(path)).fingerprint
    assert task.fingerprint != loaded(path=str(path), seed=1).fingerprint


def test_a_folder_of_plain_files(tmp_path):
    for name, part in (("train", TEXTS[:30]), ("test", TEXTS[30:])):
        (tmp_path / f"{name}.txt").write_text("\r\n\r\n".join(part))
    task = loaded(path=str(tmp_path))
    assert list(task.splits["test"].texts) == TEXTS[30:]
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 30


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"separator": ""}, BadInput, "data.separator must not be empty"),
        ({"test_share": 0.0}, BadInput, "data.test_share must lie between"),
        ({"seed": -1}, BadInput, "data.seed must be"),
        ({"path": "nowhere.txt"}, BadInput, "does not exist"),
        ({"format": "jsonl"}, BadInput, "is no JSON"),
        ({"format": "csv", "text": "body"}, UnknownName, "no column 'body'"),
    ],
    ids=str,
)
def test_what_cannot_be(tmp_path, fields, error, said):
    (tmp_path / "own.txt").write_text("\n\n".join(TEXTS))
    with pytest.raises(error, match=said):
        loaded(**({"path": str(tmp_path / "own.txt")} | fields))


def test_files_without_text(tmp_path):
    for content, said in ((b" \n ", "holds no text"), (b"a\xff", "not UTF-8")):
        with pytest.raises(BadInput, match=said):
            documents(tmp_path / "x.txt", content)


def test_repeated_documents_are_on_one_side(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join([*TEXTS, *(text.upper() for text in TEXTS)]))
    task = loaded(path=str(path), test_share=0.3, validation_share=0.3)
    seen = [{text.lower() for text in rows.texts} for rows in task.splits.values()]
    assert sum(map(len, seen)) == len(TEXTS)
    for rows in task.splits.values():
        # Windows of what says the same are resampled together.
        assert len({*rows.groups}) == len({text.lower() for text in rows.texts})


def test_given_splits_may_share_a_little(tmp_path):
    (tmp_path / "train.txt").write_text("\n\n".join(TEXTS))
    test = [f"{text} else" for text in TEXTS]
    for shared, refused in ((1, False), (3, True)):
        mixed = [*TEXTS[:shared], *test[shared:]]
        (tmp_path / "test.txt").write_text("\n\n".join(mixed))
        if refused:
            with pytest.raises(BadInput, match="3 of 40 rows of the test split say"):
                loaded(path=str(tmp_path))
        else:
            assert loaded(path=str(tmp_path)).splits["test"]
