"""Scoring visits every row once, and reports are JSON."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate import progress
from lowrank.evaluate.score import (
    Predictions,
    compare,
    numbers,
    report,
    score,
    score_trials,
)

CLASSES = ("off", "on", "dim")
NUM_ROWS, BATCH = 50, 8


def truth():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, NUM_ROWS).astype(np.int32)
    logits = rng.normal(size=(NUM_ROWS, 3)).astype(np.float32)
    logits[np.arange(NUM_ROWS), label] += 2
    return logits, label


def batches(order=None):
    """Padded batches of the rows in some order."""
    _, label = truth()
    order = np.random.default_rng(1).permutation(NUM_ROWS) if order is None else order
    for start in range(0, len(order), BATCH):
        index = np.asarray(order[start : start + BATCH])
        pad = BATCH - len(index)
        yield {
            "index": np.r_[index, np.full(pad, -1)].astype(np.int32),
            "label": np.r_[label[index], np.zeros(pad)].astype(np.int32),
            "weight": np.r_[np.ones(len(index)), np.zeros(pad)].astype(np.float32),
        }


def predict(batch):
    return jnp.asarray(np.where(batch["index"][:, None] < 0, np.nan, look_up(batch)))


def look_up(batch):
    return truth()[0][batch["index"]]


def test_rows_come_back_in_order_and_padding_does_not():
    groups = [f"template {i // 5}" for i in range(NUM_ROWS)]
    got = score(predict, batches(), CLASSES, groups)
    logits, label = truth()
    np.testing.assert_array_equal(got.index, np.arange(NUM_ROWS))
    np.testing.assert_array_equal(got.logits, logits)
    np.testing.assert_array_equal(got.labels, label)
    assert got.groups.tolist() == groups


def test_every_trial_of_a_pack_is_scored_on_the_same_rows():
    pack = lambda batch: np.stack([look_up(batch), -look_up(batch)])
    first, second = score_trials(pack, list(batches()), CLASSES)
    np.testing.assert_array_equal(first.logits, truth()[0])
    np.testing.assert_array_equal(second.logits, -truth()[0])
    np.testing.assert_array_equal(second.labels, truth()[1])


@pytest.mark.parametrize(
    ("order", "num_rows", "says"),
    [
        ([0, 1, 2, 1], None, "row 1 was scored 2 times"),
        ([0, 1, 3], None, "1 of 4 rows were not scored, such as row 2"),
        ([0, 1, 2], 5, "2 of 5 rows were not scored, such as row 3"),
        ([0, 1, 2], 2, "row 2 was scored, but the split has 2 rows"),
        ([], None, "no batches"),
    ],
)
def test_rows_that_come_twice_or_never_are_errors(order, num_rows, says):
    with pytest.raises(BadInput, match=says):
        score(predict, batches(order), CLASSES, num_rows=num_rows)


def test_groups_tell_how_many_rows_there_are():
    with pytest.raises(BadInput, match="1 of 4 rows"):
        score(predict, batches([0, 1, 2]), CLASSES, groups=["a"] * 4)


def test_padding_must_be_marked_twice_and_alike():
    batch = next(iter(batches([0, 1])))
    for change in ({"weight": np.ones(BATCH)}, {"index": np.arange(BATCH)}):
        with pytest.raises(BadInput, match="padding"):
            score(predict, [{**batch, **change}], CLASSES)


def test_logits_of_the_wrong_shape_are_refused():
    with pytest.raises(BadInput, match=r"shape \(8,\).*\(batch, classes\)"):
        score(lambda batch: np.zeros(BATCH), batches(), CLASSES)
    with pytest.raises(BadInput, match=r"must give \(trials, batch, classes\)"):
        score_trials(look_up, batches(), CLASSES)
    with pytest.raises(BadInput, match="3 columns for 2 class names"):
        score(predict, batches(), CLASSES[:2])


def test_results_are_fetched_one_batch_late():
    events = []

    class Pending:
        def __init__(self, at):
            self.at = at

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetch {self.at}")
            return np.zeros((BATCH, 3), np.float32)

    def start(batch):
        events.append(f"start {len(events)}")
        return Pending(len(events))

    score(start, batches(), CLASSES)
    kinds = "".join(event[0] for event in events)
    assert kinds == "s" + "sf" * 6 + "f"


def test_a_report_is_json_and_holds_every_metric():
    got = report(
        score(predict, batches(), CLASSES, np.arange(NUM_ROWS) // 5), resamples=200
    )
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["clustered"] is True
    assert set(got["metrics"]) == {
        "accuracy", "macro_f1", "log_loss", "calibration_error", "worst_class_recall",
    }  # fmt: skip
    for interval in got["metrics"].values():
        assert interval["num_groups"] == 10
        if interval["estimate"] is not None:
            assert interval["low"] <= interval["estimate"] <= interval["high"]
    logits, label = truth()
    right = logits.argmax(axis=1) == label
    assert got["metrics"]["accuracy"]["estimate"] == pytest.approx(right.mean())
    assert sum(c["num_rows"] for c in got["classes"].values()) == NUM_ROWS
    assert got["classes"]["on"]["recall"] == pytest.approx(right[label == 1].mean())


def test_the_worst_class_has_a_name():
    logits = np.eye(3, dtype=np.float32)[[0] * 20 + [1] * 10 + [0] * 10]
    label = np.repeat([0, 1], 20)
    rows = Predictions(np.arange(40), logits, label, CLASSES)
    got = report(rows, resamples=100)
    assert got["worst_class"] == "on"
    assert got["metrics"]["worst_class_recall"]["estimate"] == 0.5
    few = Predictions(np.arange(10), logits[:10], label[:10], CLASSES)
    assert report(few, resamples=100)["worst_class"] is None
    assert "worst_class_recall" not in numbers(few)
    assert numbers(few)["accuracy"] == 1


def test_logits_that_are_not_numbers_are_an_error_not_a_score():
    logits, label = truth()
    logits[7, 1] = np.nan
    with pytest.raises(NonFinite, match="row 7"):
        report(Predictions(np.arange(NUM_ROWS), logits, label, CLASSES))


def test_a_comparison_is_paired_and_clustered():
    logits, label = truth()
    groups = np.arange(NUM_ROWS) // 5
    good = Predictions(np.arange(NUM_ROWS), logits, label, CLASSES, groups)
    bad = Predictions(np.arange(NUM_ROWS), -logits, label, CLASSES, groups)
    got = compare(good, bad, resamples=300)
    assert got["accuracy"]["low"] > 0
    assert got["log_loss"]["high"] < 0
    assert got["accuracy"]["num_groups"] == 10
    same = compare(good, good, resamples=50)["accuracy"]
    assert (same["estimate"], same["low"]) == (0, None)


def test_systems_that_saw_different_data_are_not_compared():
    logits, label = truth()
    rows = np.arange(NUM_ROWS)
    one = Predictions(rows, logits, label, CLASSES)
    with pytest.raises(BadInput, match="different labels, as in row 0"):
        compare(one, Predictions(rows, logits, (label + 1) % 3, CLASSES))
    with pytest.raises(BadInput, match="scored by one system only"):
        compare(one, Predictions(rows[1:], logits[1:], label[1:], CLASSES))
    with pytest.raises(BadInput, match="another order"):
        compare(one, Predictions(rows, logits, label, CLASSES[::-1]))
    with pytest.raises(BadInput, match="grouped differently"):
        compare(one, Predictions(rows, logits, label, CLASSES, rows))


def test_stored_predictions_come_back(tmp_path):
    logits, label = truth()
    groups = np.array([f"g{i % 3}" for i in range(NUM_ROWS)])
    for given in (None, groups):
        one = Predictions(np.arange(NUM_ROWS), logits, label, CLASSES, given)
        np.savez(tmp_path / "test.npz", allow_pickle=False, **one.arrays())
        with np.load(tmp_path / "test.npz", allow_pickle=False) as stored:
            two = Predictions.from_arrays(dict(stored))
        assert two.classes == CLASSES
        assert report(two, resamples=50) == report(one, resamples=50)


def test_rows_out_of_order_are_refused():
    logits, label = truth()
    with pytest.raises(BadInput, match="rising order"):
        Predictions(np.arange(NUM_ROWS)[::-1], logits, label, CLASSES)


def test_a_bar_shows_on_a_terminal_when_the_work_is_long(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    made = []

    class Bar:
        def __init__(self, **options):
            made.append(self)
            self.events = []

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.events.append(name)

    monkeypatch.setattr(progress, "Progress", Bar)
    score(predict, batches(), CLASSES)
    assert "start" not in made[0].events
    assert made[0].events.count("advance") == 7
    monkeypatch.setattr(progress, "_QUIET_SECONDS", -1.0)
    score(predict, batches(), CLASSES)
    assert made[1].events.count("start") == made[1].events.count("stop") == 1
    score(predict, batches(), CLASSES, progress=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    score(predict, batches(), CLASSES)
    assert len(made) == 2
