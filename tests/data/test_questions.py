"""Sources of questions and answers: every row once, no group on two sides."""

import json

import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build
from lowrank.data.tasks import CATALOGUE

ROWS = [(f"what is {n % 40}", f"it is {n}") for n in range(100)]


def write(path, rows=ROWS, names=("question", "answer")):
    if path.suffix == ".csv":
        text = "\n".join([",".join(names), *(",".join(row) for row in rows)])
    else:
        text = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    path.write_text(text)
    return path


def loaded(**fields):
    return build({"name": "answers", **fields}, CATALOGUE, "data").load()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_is_cut_by_question(tmp_path, suffix):
    task = loaded(path=str(write(tmp_path / f"own{suffix}")))
    seen = {name: {*rows.questions} for name, rows in task.splits.items()}
    assert {*task.splits} == {"train", "validation", "test"}
    assert sum(map(len, task.splits.values())) == len(ROWS)
    assert sum(map(len, seen.values())) == 40, "no question is on two sides"
    # Each answer once as the one that is taught.
    taught = [own[0] for rows in task.splits.values() for own in rows.answers]
    assert sorted(taught) == sorted(answer for _, answer in ROWS)


def test_every_answer_to_a_question_is_right(tmp_path):
    task = loaded(path=str(write(tmp_path / "own.csv")))
    told = {}
    for question, answer in ROWS:
        told.setdefault(question, set()).add(answer)
    for rows in task.splits.values():
        for question, answers in zip(rows.questions, rows.answers, strict=True):
            assert {*answers} == told[question]
            assert len({*answers}) == len(answers)


def test_splits_that_are_given_stay(tmp_path):
    given = {"train": ROWS[:30], "dev": ROWS[30:32], "test": ROWS[33:34]}
    for name, rows in given.items():
        write(tmp_path / f"{name}.jsonl", rows)
    task = loaded(path=str(tmp_path))
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 30, "validation": 2, "test": 1,
    }  # fmt: skip


def test_fewer_rows_are_the_first_ones(tmp_path):
    path = str(write(tmp_path / "own.csv"))
    every, some = loaded(path=path), loaded(path=path, train_rows=7, test_rows=2)
    assert some.splits["train"].ids == every.splits["train"].ids[:7]
    assert some.splits["test"].ids == every.splits["test"].ids[:2]
    assert some.splits["validation"] == every.splits["validation"]
    assert some.fingerprint != every.fingerprint
    # A row that is not used still knows what is right.
    assert some.splits["train"].answers == every.splits["train"].answers[:7]


def test_another_seed_cuts_elsewhere(tmp_path):
    path = str(write(tmp_path / "own.csv"))
    one, two = loaded(path=path), loaded(path=path, seed=1)
    assert one.splits["test"].questions != two.splits["test"].questions
    assert one.fingerprint == loaded(path=path).fingerprint


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"answer": "reply"}, UnknownName, "no column 'reply'"),
        ({"test_share": 1.0}, BadInput, "data.test_share must lie between 0 and 1"),
        ({"validation_rows": 0}, BadInput, "data.validation_rows must be at least 1"),
        ({"seed": -1}, BadInput, "data.seed must be"),
        ({"path": "nowhere.csv"}, BadInput, "does not exist"),
        ({"rows_per_class": 1}, UnknownName, "rows_per_class"),
    ],
    ids=str,
)
def test_what_cannot_be(tmp_path, fields, error, said):
    path = str(write(tmp_path / "own.csv"))
    with pytest.raises(error, match=said):
        loaded(**({"path": path} | fields))


def test_a_question_in_two_given_splits(tmp_path):
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", ROWS[:1])
    with pytest.raises(BadInput, match="1 of 1 rows of the test split say"):
        loaded(path=str(tmp_path))


def test_equal_questions_stay_together_whatever_groups_say(tmp_path):
    """Rows of two given groups that ask the same make one group of both."""
    rows = [(f"what is {n % 40}", f"it is {n}", f"g{n}") for n in range(80)]
    names = ("question", "answer", "source")
    path = write(tmp_path / "own.csv", rows, names)
    task = loaded(path=str(path), group="source")
    seen = [{*rows.questions} for rows in task.splits.values()]
    assert sum(map(len, seen)) == 40, "no question is on two sides"
    for rows in task.splits.values():
        assert all(len(answers) == 2 for answers in rows.answers)


def test_an_id_that_comes_twice_is_refused_though_few_rows_are_taken(tmp_path):
    rows = [(f"what is {n}", f"it is {n}", f"id{n % 50}") for n in range(100)]
    path = write(tmp_path / "own.csv", rows, ("question", "answer", "name"))
    with pytest.raises(BadInput, match="50 ids occur twice"):
        loaded(path=str(path), id="name", train_rows=5)


def test_other_right_choices_are_other_data(tmp_path):
    rows = [
        {
            "question": f"q{n}",
            "choices": ["a", "b"],
            "answer": n % 2,
            "other": 1 - n % 2,
        }
        for n in range(40)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = {"name": "choices", "path": str(path)}
    one = build(given, CATALOGUE, "data").load()
    other = build({**given, "answer": "other"}, CATALOGUE, "data").load()
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == build(given, CATALOGUE, "data").load().fingerprint


@pytest.mark.parametrize("group", [None, "source"])
def test_equal_choices_questions_stay_together(tmp_path, group):
    rows = [
        {
            "question": f"q{n % 30}",
            "choices": ["a", "b"],
            "answer": 0,
            "source": f"s{n}",
        }
        for n in range(60)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = {"name": "choices", "path": str(path), "group": group}
    task = build(given, CATALOGUE, "data").load()
    assert sum(len({*rows.questions}) for rows in task.splits.values()) == 30
