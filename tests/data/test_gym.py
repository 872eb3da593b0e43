"""Questions that are drawn: none in two splits, the same again, judged by their own."""

import itertools
import sys

import fake_gym
import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build
from lowrank.data.builders import reasoning
from lowrank.data.gym import seed_of
from lowrank.data.tasks import CATALOGUE

ROWS = {"train_rows": 40, "validation_rows": 10, "test_rows": 12}
HARDER = {"harder": {"min_words": 4, "max_words": 5}, "harder_rows": 9}


@pytest.fixture(autouse=True)
def package(monkeypatch):
    fake_gym.install(monkeypatch)


def loaded(**fields):
    given = {"name": "reasoning_gym", "task": "sizes", **ROWS, **fields}
    return build(given, CATALOGUE, "data").load()


def lengths(rows):
    return {len(question.split()) - 2 for question in rows.questions}


def test_no_question_is_in_two_splits():
    # 512 questions can be asked: independent draws would meet.
    task = loaded(train_rows=300, validation_rows=50, test_rows=50)
    questions = [q for rows in task.splits.values() for q in rows.questions]
    assert len(questions) == len({*questions}) == 400
    assert [(name, len(rows)) for name, rows in task.splits.items()] == [
        ("train", 300), ("validation", 50), ("test", 50),
    ]  # fmt: skip


def test_splits_are_drawn_far_from_each_other():
    seeds = []
    for seed in range(3):
        seeds += [seed_of(seed, split) for split in ("train", "test", "harder")]
    seeds.sort()
    apart = [b - a for a, b in itertools.pairwise(seeds)]
    assert min(apart) > 100_000, "row n is drawn from seed + n"


def test_what_is_harder_is_a_split_of_its_own():
    task = loaded(**HARDER)
    assert {*task.splits} == {"train", "validation", "test", "harder"}
    assert len(task.splits["harder"]) == 9
    assert lengths(task.splits["harder"]) <= {4, 5}
    for name in ("train", "validation", "test"):
        assert lengths(task.splits[name]) == {3}
    # It changes nothing else.
    plain = loaded()
    assert plain.splits["train"] == task.splits["train"]
    assert plain.splits["test"] == task.splits["test"]
    assert plain.fingerprint != task.fingerprint


def test_parameters_are_those_of_the_task():
    assert lengths(loaded(config={"min_words": 2}).splits["train"]) == {2, 3}


def test_fewer_training_rows_move_no_other_row():
    every, some = loaded(), loaded(train_rows=7)
    assert some.splits["train"].questions == every.splits["train"].questions[:7]
    assert some.splits["test"] == every.splits["test"]
    assert some.splits["validation"] == every.splits["validation"]


def test_the_same_seed_draws_the_same_rows():
    one, again, other = loaded(**HARDER), loaded(**HARDER), loaded(**HARDER, seed=1)
    assert one.splits == again.splits
    assert one.fingerprint == again.fingerprint
    assert one.splits["test"] != other.splits["test"]
    assert one.fingerprint != other.fingerprint


def test_another_version_is_another_data_set(monkeypatch):
    one = loaded()
    fake_gym.install(monkeypatch, "10.0")
    two = loaded()
    assert one.splits == two.splits
    assert one.fingerprint != two.fingerprint
    assert two.provenance["version"] == "10.0"


def test_rows_without_an_answer_that_counts_are_left_out():
    task = loaded(task="gaps")
    last = {q.split()[-2] for rows in task.splits.values() for q in rows.questions}
    assert {"z", "two"} <= last
    assert not last & {"x", "y"}
    assert all(number > 0 for number in task.provenance["left_out"].values())


def test_an_answer_is_worth_what_the_verifier_says():
    task = loaded(**HARDER)
    assert task.verify is not None
    for rows in task.splits.values():
        for row, (answer,) in zip(rows.ids, rows.answers, strict=True):
            first = answer.split()[0]
            assert task.verify(row, answer) == 1.0
            assert task.verify(row, f"{first} is red") == 0.5
            assert task.verify(row, "red") == 0.0
            # It fails at the empty one.
            assert task.verify(row, "") == 0.0


@pytest.mark.parametrize(
    ("said", "worth"),
    [("1", 1.0), ("0.25", 0.25), ("nan", 0.0), ("inf", 0.0), ("-1", 0.0), ("2", 0.0)],
)
def test_what_is_no_share_is_worth_nothing(said, worth):
    task = loaded(task="not_numbers")
    assert task.verify("test-0", said) == worth


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BadInput, match=r"pip install 'lowrank\[gym\]'"):
        loaded()


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"task": "size"}, UnknownName, "'size' is no task of .* Nearest: 'sizes'"),
        ({"config": {"max_word": 4}}, UnknownName, "Nearest: 'max_words'"),
        ({"config": {"seed": 4}}, BadInput, "data.config.seed follows from data.seed"),
        ({"config": {"size": 4}}, BadInput, "data.config.size follows from"),
        ({"config": {"max_words": 2}}, BadInput, "max_words must be >= min_words"),
        ({"config": {"min_words": "2"}}, BadInput, "cannot be made with"),
        ({"harder": {}}, BadInput, "changes nothing"),
        (
            {"harder": {"min_words": 3}, "config": {"min_words": 3}},
            BadInput,
            "changes nothing",
        ),
        ({"harder": {"words": 3}}, UnknownName, "has no parameter 'words'"),
        ({"harder_rows": 0}, BadInput, "data.harder_rows must be at least 1"),
        ({"test_rows": 0}, BadInput, "data.test_rows must be at least 1"),
        ({"test_rows": None}, BadInput, "test_rows must be int"),
        ({"seed": -1}, BadInput, "data.seed must be from 0"),
        (
            {"config": {"min_words": 1, "max_words": 1}, "test_rows": 5},
            BadInput,
            "data.validation_rows = 10, but 144 draws of 'sizes' gave 3 questions",
        ),
        ({"task": "silent"}, BadInput, "gave 0 questions .*160 had no answer"),
        ({"task": "composite"}, BadInput, "made of others"),
        ({"task": "ransom_note"}, BadInput, "depend on more than the seed"),
        ({"task": "programs"}, BadInput, "runs programs to make its rows"),
        ({"task": "evaluates"}, BadInput, r"reaches eval\)"),
        ({"task": "by_table"}, BadInput, r"reaches eval\)"),
        ({"task": "imports"}, BadInput, r"reaches subprocess\)"),
        ({"task": "foreign"}, BadInput, r"reaches importlib\."),
    ],
    ids=str,
)
def test_what_cannot_be(fields, error, said):
    with pytest.raises(error, match=said):
        loaded(**fields)


def test_a_verifier_that_runs_nothing_is_taken():
    assert reasoning.reaches(fake_gym.Sizes) == []
    assert reasoning.reaches(fake_gym.NotNumbers) == []
