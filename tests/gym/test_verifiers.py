"""Tasks of reasoning-gym itself: those that are taken are safe, and come again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from lowrank.core.errors import BadInput, UnknownName
from lowrank.data.builders import reasoning
from lowrank.data.gym import GymData

pytestmark = pytest.mark.gym

ROOT = Path(__file__).parents[2]
#: Whose verifiers evaluate what they read, as Python or as a formula of sympy.
RUN = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens"),
    *("polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix"),
    "string_insertion",
)
#: Whose rows have no answer: what is right is found by the verifier alone.
SILENT = ("boxnet", "graph_color", "propositional_logic", "rush_hour")
#: Ready in no time; the others draw puzzles by search.
SLOW = ("futoshiki", "sokoban", "zebra_puzzles")
DRAW = """
import json, sys
from lowrank.data.gym import GymData
rows = {"train_rows": 4, "validation_rows": 2, "test_rows": 2}
found = {t: GymData(task=t, **rows).load().fingerprint for t in sys.argv[1:]}
print()  # Tasks print while they draw.
print(json.dumps(found))
"""


def usable(task):
    try:
        reasoning.usable(task)
    except BadInput:
        return False
    return task not in SILENT


TAKEN = [task for task in sorted(DATASETS) if usable(task)]
QUICK = [task for task in TAKEN if task not in SLOW]


def drawn(task, **fields):
    rows = {"train_rows": 4, "validation_rows": 2, "test_rows": 2}
    return GymData(task=task, **{**rows, **fields}).load()


def hostile(path):
    """A text that makes a file, if it is evaluated."""
    return f"__import__('pathlib').Path({str(path)!r}).touch()"


def test_most_tasks_are_taken():
    assert len(TAKEN) >= 80
    assert {"chain_sum", "basic_arithmetic", "gcd", "mini_sudoku"} <= {*TAKEN}
    assert not {*TAKEN} & {*RUN, *SILENT, *reasoning.RESTLESS, "composite", "codeio"}


@pytest.mark.parametrize("task", RUN)
def test_a_verifier_that_evaluates_is_refused(task):
    with pytest.raises(BadInput, match="may run what a model says"):
        drawn(task)


@pytest.mark.parametrize("task", SILENT)
def test_rows_without_answers_teach_nothing(task):
    with pytest.raises(BadInput, match="gave 0 questions"):
        drawn(task)


def test_what_is_refused_would_have_run(tmp_path):
    made = create_dataset("polynomial_multiplication", seed=0, size=1)
    made.score_answer(hostile(tmp_path / "ran"), made[0])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("task", QUICK)
def test_a_task_that_is_taken(task, tmp_path):
    one, mark = drawn(task), tmp_path / "ran"
    said = [hostile(mark), f"[{hostile(mark)}]", "", "nan", "1/0", "[1, 2", "{}"]
    for rows in one.splits.values():
        for row, (answer,) in zip(rows.ids, rows.answers, strict=True):
            assert one.verify(row, answer) == 1.0
            for text in said:
                assert 0.0 <= one.verify(row, text) <= 1.0
            assert one.verify(row, answer) == 1.0, "no answer leaves a mark"
    assert not mark.exists()


def test_rows_come_again_in_any_process():
    each = []
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", DRAW, *QUICK],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        each.append(json.loads(done.stdout.splitlines()[-1]))
    assert {*each[0]} == {*QUICK}
    assert [task for task in QUICK if each[0][task] != each[1][task]] == []


def test_sums_that_are_harder():
    task = drawn(
        "chain_sum",
        config={"min_terms": 2, "max_terms": 2, "max_digits": 1},
        harder={"min_terms": 4, "max_terms": 5},
        harder_rows=20,
    )
    terms = lambda split: {
        question.rpartition(":")[2].replace("-", "+").count("+") + 1
        for question in task.splits[split].questions
    }
    assert terms("train") == terms("test") == {2}
    assert terms("harder") == {4, 5}


def test_a_sum_may_be_said_in_other_ways():
    task = drawn("chain_sum", config={"max_terms": 2, "max_digits": 1})
    answer = int(task.splits["test"].answers[0][0])
    for said in (f"{answer}.0", f"{answer:+03d}"):
        assert task.verify("test-0", said) == 1.0, said
    assert task.verify("test-0", str(answer + 1)) < 0.5


def test_a_parameter_and_a_task_that_are_not_there():
    with pytest.raises(UnknownName, match="Nearest: 'chain_sum'"):
        drawn("chain_sums")
    with pytest.raises(UnknownName, match="Nearest: 'max_terms'"):
        drawn("chain_sum", config={"max_term": 3})
    with pytest.raises(BadInput, match="max_terms must be >= min_terms"):
        drawn("chain_sum", config={"max_terms": 1})


def test_too_few_questions():
    with pytest.raises(BadInput, match="differ from each other"):
        drawn("coin_flip", config={"min_trials": 1, "max_trials": 1}, train_rows=5000)
