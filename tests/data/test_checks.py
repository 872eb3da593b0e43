"""What would train silently wrong is refused before anything is compiled."""

import json

import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.data.checks import check_task
from lowrank.data.splits import Split, make_task


def split_of(name, labels, texts=None, ids=None):
    count = len(labels)
    return Split(
        tuple(ids or (f"{name}/{n}" for n in range(count))),
        tuple(texts or (f"{name} text {n}" for n in range(count))),
        np.array(labels, np.int32),
    )


def task_of(classes=("a", "b"), **splits):
    splits = {"train": split_of("train", [0, 1, 0]), **splits}
    kept = {name: split for name, split in splits.items() if split is not None}
    return make_task("mine", classes, kept, {})


def test_a_good_task_is_described_in_json_types():
    task = task_of(test=split_of("test", [0, 0, 1, 0]))
    report = check_task(task)
    assert json.loads(json.dumps(report)) == report
    train = report["splits"]["train"]
    assert train["rows"] == 3
    assert train["class_counts"] == {"a": 2, "b": 1}
    assert report["splits"]["test"]["majority_share"] == 0.75
    assert report["overlap"]["test_in_train"]["rows"] == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (task_of(test=split_of("test", [0, -1])), r"row 'test/1' with -1. -1 often"),
        (
            task_of(test=split_of("test", [0, 2, 5])),
            "2 rows with a label outside 0 to 1",
        ),
        (task_of(train=split_of("train", [0, 1, 3])), "the train split .* 3"),
        (task_of(test=split_of("test", [])), "test split of 'mine' has no rows"),
        (task_of(test=split_of("test", [0, 1], ["x", " \n"])), "rows without text"),
        (task_of(test=split_of("test", [0], ids=["train/2"])), "id 'train/2'"),
        (task_of(train=split_of("train", [0, 1], ids=["x", "x"])), "id 'x'"),
        (task_of(train=None, test=split_of("test", [0])), "no train split"),
        (task_of(classes=("a",), train=split_of("train", [0])), "1 classes"),
        (task_of(classes=("a", "a")), "two classes called 'a'"),
        (
            task_of(classes=("a", "b", "c"), test=split_of("test", [2])),
            "the test split .* 1 classes that the train split lacks: 'c'",
        ),
    ],
)
@pytest.mark.fault(
    "labels out of range or -1, blank texts, ids used twice",
    "refused with split, row and value",
)
def test_a_task_that_cannot_be_trained_is_refused(task, message):
    with pytest.raises(BadInput, match=message):
        check_task(task)


@pytest.mark.fault(
    "test rows in train",
    "reported, and refused beyond a share",
)
def test_overlap_is_reported_and_refused_beyond_a_share():
    texts = [f"test text {n}" for n in range(49)]
    test = split_of("test", [0] * 50, [*texts, " Train TEXT 1 "])
    report = check_task(task_of(test=test))["overlap"]["test_in_train"]
    assert report == {"rows": 1, "share": 0.02, "examples": ["test/49"]}
    with pytest.raises(BadInput, match=r"1 of 50 texts .* \(2.0%; at most 1.0%"):
        check_task(task_of(test=test), max_overlap=0.01)


def test_test_rows_in_validation_count_as_well():
    twin = ["the same"]
    task = task_of(
        validation=split_of("validation", [0], twin), test=split_of("test", [1], twin)
    )
    with pytest.raises(BadInput, match="also stand in validation"):
        check_task(task)
    report = check_task(task, max_overlap=1.0)
    assert report["overlap"]["test_in_validation"]["share"] == 1.0


def test_duplicates_and_absent_classes_are_counted():
    train = split_of("train", [0, 1, 0], ["x", "X ", "y"])
    report = check_task(task_of(train=train, test=split_of("test", [0])))
    assert report["splits"]["train"]["duplicate_rows"] == 1
    assert report["splits"]["test"]["absent_classes"] == ["b"]


def test_the_demonstration_task_passes_without_any_overlap(english):
    report = check_task(english, max_overlap=0.0)
    assert report["splits"]["train"]["duplicate_rows"] == 0
    assert report["splits"]["test"]["classes"] == 120
