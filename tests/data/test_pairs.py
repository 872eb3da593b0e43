"""Two texts that are judged together: read, tokenized, padded and cut as two."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build
from lowrank.data.buckets import Batching
from lowrank.data.checks import check_task
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.data.splits import Split, cut, make_task, merge
from lowrank.data.tasks import CATALOGUE
from lowrank.data.tokens import tokenize

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]


@pytest.fixture
def tokenizer():
    made = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def split(firsts, seconds, labels=None):
    labels = np.zeros(len(firsts), np.int32) if labels is None else labels
    ids = tuple(f"row{n}" for n in range(len(firsts)))
    return Split(ids, tuple(firsts), np.asarray(labels, np.int32), None, tuple(seconds))


def test_ids_and_types_are_the_tokenizers(tokenizer, tmp_path):
    rows = split(["a b", "c"], ["d", "e f g"])
    found = tokenize(rows, tokenizer, max_length=16, data="x", cache=tmp_path)
    again = tokenize(rows, tokenizer, max_length=16, data="x", cache=tmp_path)
    for tokens in (found, again):
        for number, texts in enumerate(zip(rows.texts, rows.pairs, strict=True)):
            own = slice(*tokens.offsets[number : number + 2])
            wanted = tokenizer.encode(*texts)
            assert tokens.ids[own].tolist() == wanted.ids
            assert tokens.types[own].tolist() == wanted.type_ids
    single = Split(rows.ids, rows.texts, rows.labels)
    alone = tokenize(single, tokenizer, max_length=16, data="x", cache=tmp_path)
    assert alone.types is None
    assert alone.fingerprint != found.fingerprint


def test_batches_tell_the_texts_apart(tokenizer, tmp_path):
    rows = split(["a", "b c", "a b c d e f"], ["d", "e", "g h g h g h"])
    tokens = tokenize(rows, tokenizer, max_length=16, data="x", cache=tmp_path)
    batching = Batching(batch_size=2, buckets=[8, 12])
    seen = {}
    for batch in eval_batches(tokens, rows.labels, batching):
        assert batch["type_ids"].shape == batch["ids"].shape
        assert not batch["type_ids"][~batch["mask"]].any()
        for place, row in enumerate(batch["index"]):
            if row >= 0:
                real = batch["mask"][place]
                seen[int(row)] = (batch["ids"][place][real].tolist(),
                                  batch["type_ids"][place][real].tolist())  # fmt: skip
    assert seen[1] == ([2, 5, 6, 3, 8, 3], [0, 0, 0, 0, 1, 1])
    # The longest loses its end, and keeps what closes it.
    ids, types = seen[2]
    assert (len(ids), ids[-1], types[-1]) == (12, 3, 1)
    assert types == sorted(types)
    train = TrainPipeline(
        tokens, rows.labels, batching=batching, trial_seeds=[0, 1], num_epochs=1
    )
    assert train.batch_at(0)["type_ids"].shape == train.batch_at(0)["ids"].shape


def test_what_is_done_to_rows_is_done_to_both():
    rows = split([f"a {n}" for n in range(20)], [f"b {n}" for n in range(20)],
                 [n % 2 for n in range(20)])  # fmt: skip
    rest, off = cut(rows, 0.3, 0, "test")
    for part in (rest, off, merge(rest, off), rows.take([3, 1])):
        for first, second in zip(part.texts, part.pairs, strict=True):
            assert first[2:] == second[2:]
    swapped = Split(rows.ids, rows.texts, rows.labels, None, rows.pairs[::-1])
    assert swapped.fingerprint() != rows.fingerprint()
    with pytest.raises(BadInput, match="pairs"):
        Split(rows.ids, rows.texts, rows.labels, None, rows.pairs[:3])


def test_a_row_is_known_by_both_texts():
    train = split(["a", "b"], ["c", "d"], [0, 1])
    judged = Split(("x", "y"), ("a", "a"), np.array([0, 1], np.int32), None, ("d", "e"))
    task = make_task("t", ["0", "1"], {"train": train, "test": judged}, {})
    assert check_task(task)["overlap"]["test_in_train"]["rows"] == 0
    same = Split(("x", "y"), ("A", "b"), np.array([0, 1], np.int32), None, (" c", "e"))
    task = make_task("t", ["0", "1"], {"train": train, "test": same}, {})
    assert check_task(task, max_overlap=1)["overlap"]["test_in_train"]["rows"] == 1
    blank = split(["a", "b"], ["c", " "], [0, 1])
    with pytest.raises(BadInput, match="without text: 'row1'"):
        check_task(make_task("t", ["0", "1"], {"train": blank}, {}))


def test_a_file_with_two_columns_of_text(tmp_path):
    lines = ["one,two,same"] + [f"a {n},b {n},{n % 2}" for n in range(40)]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    fields = {"name": "table", "path": str(tmp_path / "own.csv"), "text": "one",
              "label": "same"}  # fmt: skip
    load = lambda **more: build(fields | more, CATALOGUE, "data").load(tmp_path)
    task = load(pair="two")
    assert sum(map(len, task.splits.values())) == 40
    for rows in task.splits.values():
        for first, second in zip(rows.texts, rows.pairs, strict=True):
            assert first[2:] == second[2:]
    alone = load()
    assert alone.splits["train"].pairs is None
    assert alone.fingerprint != task.fingerprint
    with pytest.raises(UnknownName, match="no column 'three'"):
        load(pair="three")
    with pytest.raises(BadInput, match="one column is given two parts"):
        load(pair="one")
