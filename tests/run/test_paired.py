"""Sentence pairs as a trial: what is learned needs both texts."""

import json

import numpy as np
import pytest
from tiny_run import KEYWORDS, composed
from tokenizers import Tokenizer, processors

from lowrank.core.errors import BadInput
from lowrank.run.judge import judge
from lowrank.run.prepare import prepare
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A base whose tokenizer knows pairs; and pairs that agree or not."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "base").mkdir()
    for file in world.base.iterdir():
        (root / "base" / file.name).write_bytes(file.read_bytes())
    path = str(root / "base" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(path)
    rng = np.random.default_rng(0)
    lines = ["first,second,label"]
    kinds = [*KEYWORDS.values()]
    for number in range(160):
        one = kinds[rng.integers(3)]
        other = one if number % 2 else kinds[(kinds.index(one) + 1) % 3]
        texts = [
            f"{rng.choice(words)} word{rng.integers(40)}" for words in (one, other)
        ]
        lines.append(f"{texts[0]},{texts[1]},{'same' if number % 2 else 'other'}")
    (root / "pairs.csv").write_text("\n".join(lines))
    return root


def config(world, place, *more):
    given = world.config("data.text=first", "data.pair=second", *more)
    given["base"]["source"] = str(place / "base")
    given["data"]["path"] = str(place / "pairs.csv")
    return given


def test_a_run_reads_both_texts(world, place):
    directory = place / "run"
    result = run_trial(config(world, place, f"run.directory={directory}"))
    prepared = prepare(read(config(world, place)))
    batch = prepared.evaluation("test")[0]
    assert batch["type_ids"].max() == 1
    run = load_run(directory)
    again = judge(run, evaluation=run.settings.evaluate, progress=False)
    assert again["scores"]["test"]["metrics"] == result["scores"]["test"]["metrics"]
    # The second text and the types count.
    logits = run.logits(batch)
    other = {**batch, "type_ids": np.zeros_like(batch["type_ids"])}
    assert not np.allclose(run.logits(other), logits, atol=1e-4)
    rows = prepared.labeled.task.splits["test"]
    texts = list(zip(rows.texts, rows.pairs, strict=True))[:5]
    for row, text in zip(predict(run, texts), texts, strict=True):
        alone = predict(run, [text])[0]
        np.testing.assert_allclose(alone["logits"], row["logits"], rtol=1e-4, atol=1e-5)
    for wrong in (["one text"], [("one", "")], [("a", "b", "c")]):
        with pytest.raises(BadInput, match="pairs of non-empty strings"):
            predict(run, wrong)
    card = (directory / "adapter" / "README.md").read_text()
    assert "token_type_ids=token_type_ids" in card


def test_a_run_without_pairs_is_called_as_before(world):
    given = world.config()
    assert given["data"]["pair"] is None
    before = json.loads(json.dumps(given))
    del before["data"]["pair"], before["evaluate"]["answers"]
    assert read(before).trial_id == read(given).trial_id
    given["data"]["pair"] = "other"
    assert read(given).trial_id != read(before).trial_id


def test_types_that_the_base_does_not_know_are_refused(world, place):
    given = config(world, place)
    file = place / "base" / "config.json"
    told = json.loads(file.read_text())
    own = place / "one_type"
    own.mkdir()
    for one in (place / "base").iterdir():
        (own / one.name).write_bytes(one.read_bytes())
    (own / "config.json").write_text(json.dumps({**told, "type_vocab_size": 1}))
    given["base"]["source"] = str(own)
    # Weights of two types do not fit a config of one, which is said first.
    with pytest.raises(BadInput, match="type"):
        prepare(read(given))


def test_the_door_takes_them(world):
    found = composed("config", "data=table", "data.path=x.csv", "data.pair=other")
    assert read(found).data.pair == "other"
