"""Multiple choice as a trial: the likeliest answer, as a whole and per token."""

import json

import numpy as np
import pytest
from tiny_language import WORDS, write_llama
from tiny_run import composed

from lowrank.core.errors import BadInput
from lowrank.core.spec import build
from lowrank.data.tasks import CATALOGUE
from lowrank.evaluate.tokens import TokenSums
from lowrank.run.choosing import Layout
from lowrank.run.judge import judge
from lowrank.run.prepare import prepare
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long


def quiz(count=60, seed=0):
    """The color of the question is the right answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        color = ["red", "blue", "big"][number % 3]
        words = " ".join(rng.permutation(WORDS[8:16]))
        choices = [str(x) for x in rng.permutation(["red", "blue", "big"])]
        answer = choices.index(color) if number % 2 else color
        question = f"{words} {color}"
        rows.append({"question": question, "choices": choices, "answer": answer})
    return rows


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("choices")
    (root / "llama").mkdir()
    write_llama(root / "llama")
    write(root / "quiz.jsonl", quiz())
    return root


@pytest.fixture(scope="module")
def config(place):
    def made(*overrides):
        return composed(
            "config", "base=smollm2", "data=choices", "track=local",
            f"base.source={place / 'llama'}", f"data.path={place / 'quiz.jsonl'}",
            f"run.root={place / 'runs'}", f"run.cache={place / 'cache'}",
            "data.batching.length=32", "data.batching.batch_size=4",
            "data.test_share=0.3", "data.validation_share=0.2",
            "delta.targets=decoder/**/kernel", "delta.rank=4", "optim.lr=0.02",
            "optim.epochs=12", "evaluate.resamples=50", "evaluate.latency=false",
            "evaluate.batch_size=8", *overrides,
        )  # fmt: skip

    return made


def test_the_right_choice_becomes_the_likeliest(config, place):
    directory = place / "run"
    result = run_trial(config(f"run.directory={directory}"))
    test = result["scores"]["test"]["metrics"]
    problem = prepare(read(config())).problem
    (before,) = problem.score("test", problem._alone(), False)
    start = before.report(resamples=20, level=0.95)["metrics"]
    assert test["loss"]["estimate"] < start["loss"]["estimate"]
    assert test["accuracy"]["estimate"] > start["accuracy"]["estimate"]
    assert result["scores"]["test"]["num_rows"] == result["data"]["rows"]["test"]
    told, rows = result["data"], problem.task.splits["test"]
    assert told["checks"]["splits"]["test"]["rows"] == len(rows.questions)
    assert told["checks"]["splits"]["test"]["choices"] == sum(map(len, rows.choices))
    assert told["provenance"] == json.loads(json.dumps(problem.task.provenance))
    assert told["provenance"]["source"]
    run = load_run(directory)
    again = judge(run, evaluation=run.settings.evaluate, progress=False)
    for name, value in again["scores"]["test"]["metrics"].items():
        np.testing.assert_allclose(value["estimate"], test[name]["estimate"], rtol=1e-4)
    kept = run.record.predictions("test")
    assert kept["correct"].mean() == pytest.approx(test["accuracy"]["estimate"])


def test_a_choice_is_judged_by_its_own_tokens(config):
    """Log-probabilities of every choice by hand, one at a time."""
    problem = prepare(read(config())).problem
    (found,) = problem.score("test", problem._alone(), False)
    rows, spoken = problem.task.splits["test"], problem.splits["test"].spoken
    at = 0
    for number, choices in enumerate(rows.choices):
        loss = []
        for _ in choices:
            ids, start = spoken.ids[at], spoken.starts[at]
            batch = {"ids": ids[None, :-1], "mask": np.ones((1, len(ids) - 1), bool)}
            logits = np.asarray(problem.base.apply(problem.base.params, batch))[0]
            log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
            places = np.arange(start - 1, len(ids) - 1)
            loss.append(-log_p[places, ids[start:]].sum())
            at += 1
        right = rows.right[number]
        np.testing.assert_allclose(found.terms[number, 3], loss[right], rtol=1e-4)
        assert found.terms[number, 1] == (int(np.argmin(loss)) == right)


def test_ties_share_a_point_and_length_may_decide():
    layout = Layout(np.array([0, 0, 0, 1, 1]), np.array([1, 0, 0, 0, 1], bool))
    sums = TokenSums(
        np.array([[2.0, 1, 0], [2, 2, 0], [3, 1, 0], [4, 4, 0], [5, 1, 0]])
    )
    terms = layout.terms(sums)
    # Two are equally likely as a whole; per token the longer one is likelier.
    assert terms[:, 1].tolist() == [0.5, 0.0]
    assert terms[:, 2].tolist() == [0.0, 0.0]
    assert terms[:, 3].tolist() == [2.0, 5.0]


def loaded(path, **fields):
    given = {"name": "choices", "path": str(path), **fields}
    return build(given, CATALOGUE, "data").load()


def test_rows_keep_their_choices(place):
    task = loaded(place / "quiz.jsonl")
    told = {row["question"]: row for row in quiz()}
    assert sum(map(len, task.splits.values())) == 60
    for rows in task.splits.values():
        for question, choices, right in zip(
            rows.questions, rows.choices, rows.right, strict=True
        ):
            row = told[question]
            assert list(choices) == row["choices"]
            assert row["answer"] in (right, choices[right])
    assert task.fingerprint != loaded(place / "quiz.jsonl", seed=1).fingerprint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "choices": ["x"], "answer": 0}, "two or more"),
        ({"question": "a", "choices": ["x", "x"], "answer": 0}, "two or more"),
        ({"question": "a", "choices": ["x", "y"], "answer": 2}, "none of the 2"),
        ({"question": "a", "choices": ["x", "y"], "answer": "z"}, "none of the 2"),
        ({"question": " ", "choices": ["x", "y"], "answer": 0}, "is no text"),
        ({"question": "a", "choices": ["x", "y"]}, "no field 'answer'"),
        ([1], "is no object"),
    ],
    ids=str,
)
def test_a_row_that_makes_no_sense_is_named(tmp_path, row, said):
    path = write(tmp_path / "own.jsonl", [*quiz(30), row])
    with pytest.raises(BadInput, match=said) as caught:
        loaded(path)
    assert "own.jsonl:31" in str(caught.value)


def test_a_question_in_two_given_splits_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", quiz(30))
    write(tmp_path / "test.jsonl", quiz(30)[:1])
    with pytest.raises(BadInput, match="Cut by groups"):
        loaded(tmp_path)


def test_a_number_that_is_none_is_refused(config, place):
    with pytest.raises(BadInput, match="no number about choices"):
        run_trial(config("loop.select=rmse", f"run.directory={place / 'none'}"))
    assert not (place / "none").exists()
