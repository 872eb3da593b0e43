"""Metrics say what scikit-learn says, batch by batch as well as at once."""

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate.metrics import (
    STANDARD,
    Accuracy,
    CalibrationError,
    LogLoss,
    MacroF1,
    Rows,
    Tally,
    WorstClass,
    equal_mass_edges,
    metric_values,
)


def data(seed, num_rows=200, num_classes=7, used=5):
    """Logits and labels; the last classes are never a label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, used, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)).astype(np.float32)
    logits[np.arange(num_rows), label] += 1.5
    return logits, label


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["none", "mask", "real"])
def test_agrees_with_scikit_learn_rows_of_weight_zero_included(seed, kind):
    logits, label = data(seed)
    rng = np.random.default_rng(seed + 100)
    weight = {
        "none": np.ones(len(label), np.float32),
        "mask": (rng.random(len(label)) < 0.7).astype(np.float32),
        "real": rng.choice([0.0, 0.5, 1.0, 2.5], len(label)),
    }[kind]
    damaged = np.where(weight[:, None] > 0, logits, np.nan)
    got = metric_values(damaged, np.where(weight > 0, label, -7), weight)
    keep = weight > 0
    x, y, w = logits[keep].astype(np.float64), label[keep], weight[keep]
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    guess = x.argmax(axis=1)
    score = lambda f, **options: f(y, guess, sample_weight=w, **options)
    assert got["accuracy"] == pytest.approx(score(sklearn.metrics.accuracy_score))
    assert got["macro_f1"] == pytest.approx(
        score(sklearn.metrics.f1_score, average="macro", zero_division=0), abs=1e-12
    )
    assert got["log_loss"] == pytest.approx(
        sklearn.metrics.log_loss(y, p, sample_weight=w, labels=range(7)), rel=1e-6
    )
    recall = sklearn.metrics.recall_score(
        y, guess, sample_weight=w, average=None, labels=range(5)
    )
    size = np.bincount(y, w, minlength=5)
    assert (size >= 20).any()
    assert got["worst_class_recall"] == pytest.approx(recall[size >= 20].min())


def test_macro_f1_leaves_out_classes_that_never_occur_and_counts_false_alarms():
    # Class 2 is predicted once and never right; class 3 does not occur at all.
    logits = np.eye(4)[[0, 0, 1, 2]]
    got = metric_values(logits, np.array([0, 0, 1, 1]))["macro_f1"]
    assert got == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_log_loss_is_exact_where_probabilities_underflow():
    logits = np.array([[0.0, 4000.0], [-4000.0, 0.0]], np.float32)
    assert metric_values(logits, np.array([0, 1]))["log_loss"] == pytest.approx(2000)


def test_calibration_error_of_a_case_done_by_hand():
    # Confidence 0.9 twice, right once; confidence 0.6 once, right.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
    label = np.array([0, 1, 1])
    by_hand = 2 / 3 * abs(0.5 - 0.9) + 1 / 3 * abs(1 - 0.6)
    got = metric_values(logits, label)["calibration_error"]
    assert got == pytest.approx(by_hand)
    one_bin = CalibrationError((0.0, 1.0)).of(Rows.of(logits, label))
    assert one_bin == pytest.approx(abs(2 / 3 - 0.8))


def test_calibration_bins_are_closed_above():
    rows = Rows.of(np.zeros((2, 2)), np.array([0, 1]))
    terms = CalibrationError((0.0, 0.5, 1.0)).terms(rows)
    np.testing.assert_array_equal(terms[:, 1], 0)
    np.testing.assert_allclose(terms[:, 0], [0.5, -0.5])


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = (p.cumsum(axis=1) < rng.random((20000, 1))).sum(axis=1)
    rows, hot = Rows.of(logits, label), Rows.of(logits * 3, label)
    for edges in (CalibrationError().edges, equal_mass_edges(rows)):
        assert CalibrationError(edges).of(rows) < 0.02
        assert CalibrationError(edges).of(hot) > 0.1


def test_bins_of_equal_mass_hold_equal_weight():
    logits, label = data(0, num_rows=300)
    rows = Rows.of(logits, label)
    edges = np.array(equal_mass_edges(rows))
    held = np.bincount(np.searchsorted(edges[1:-1], rows.confidence), minlength=15)
    np.testing.assert_array_equal(held, 20)


def test_bins_of_equal_mass_keep_equal_confidences_together():
    rows = Rows.of(np.zeros((50, 2)), np.zeros(50, int))
    assert equal_mass_edges(rows) == (0.0, 0.5, 1.0)


def test_worst_class_ignores_small_classes_and_is_undefined_without_large_ones():
    label = np.array([0] * 20 + [1] * 19)
    logits = np.eye(2)[[0] * 15 + [1] * 5 + [0] * 19]
    metric, rows = WorstClass(), Rows.of(logits, label)
    assert metric.of(rows) == pytest.approx(0.75)
    assert metric.which(metric.sums(rows)) == 0
    assert WorstClass(19).of(rows) == 0
    few = Rows.of(logits[1:], label[1:])
    assert math.isnan(metric.of(few))
    assert metric.which(metric.sums(few)) is None
    assert metric_values(logits[1:], label[1:])["worst_class_recall"] is None


def test_the_classes_of_a_resample_are_judged_by_the_whole_data():
    metric = WorstClass(20)
    whole = np.array([10.0, 5.0, 20.0, 10.0])
    resample = np.array([[9.0, 0.0, 10.0, 30.0], [0.0, 3.0, 0.0, 30.0]])
    got = metric.value(resample, whole)
    assert got[0] == pytest.approx(0.9)
    assert math.isnan(got[1])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    weighted=st.booleans(),
)
def test_merging_batches_equals_computing_at_once(seed, cuts, weighted):
    logits, label = data(seed, num_rows=60, num_classes=4, used=2)
    rng = np.random.default_rng(seed)
    weight = rng.choice([0.0, 1.0, 0.3], 60) if weighted else np.ones(60)
    state = Tally.empty(4)
    bounds = [0, *sorted(cuts), 60]
    for low, high in itertools.pairwise(bounds):
        part = Rows.of(logits[low:high], label[low:high], weight[low:high])
        state = Tally.of(part).merge(state)
    whole = metric_values(logits, label, weight)
    got = state.compute()
    assert got.keys() == whole.keys() == {m.name for m in STANDARD}
    for name, value in whole.items():
        assert got[name] == (value if value is None else pytest.approx(value, rel=1e-9))


def test_every_metric_of_no_rows_is_undefined_not_zero():
    assert set(Tally.empty(3).compute().values()) == {None}


def test_metrics_do_not_depend_on_the_scale_of_weights():
    logits, label = data(3)
    one, ten = (
        metric_values(logits, label, np.full(len(label), w), (Accuracy(), MacroF1()))
        for w in (1.0, 10.0)
    )
    assert one == pytest.approx(ten)


def test_what_cannot_be_judged_is_refused():
    logits, label = data(1)
    with pytest.raises(NonFinite, match="row 4"):
        Rows.of(np.where(np.arange(200)[:, None] == 4, np.inf, logits), label)
    with pytest.raises(BadInput, match=r"labels \[7, 9\]"):
        Rows.of(logits, np.where(label == 0, 9, np.where(label == 1, 7, label)))
    with pytest.raises(BadInput, match="at least 0"):
        Rows.of(logits, label, np.full(200, -1.0))
    with pytest.raises(BadInput, match="merged"):
        Tally.empty(3).merge(Tally.empty(4))
    with pytest.raises(BadInput, match="share a name"):
        Tally.empty(3, (LogLoss(), LogLoss()))
    with pytest.raises(BadInput, match="rise from 0 to 1"):
        CalibrationError((0.0, 0.7, 0.5, 1.0))
