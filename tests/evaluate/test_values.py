"""Errors and correlations of numbers: equal to SciPy's and scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate.values import METRICS, Estimates, score_values


def drawn(seed, count=50, shift=0.0):
    rng = np.random.default_rng(seed)
    right = rng.normal(size=count) + shift
    return right + rng.normal(scale=0.5, size=count), right


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e3, -5.0]))
def test_they_are_those_of_other_packages(seed, shift):
    predicted, right = drawn(seed, shift=shift)
    found = Estimates(predicted, right).numbers()
    error = sklearn_metrics.mean_squared_error(right, predicted)
    wanted = {
        "rmse": np.sqrt(error),
        "mae": sklearn_metrics.mean_absolute_error(right, predicted),
        "r2": sklearn_metrics.r2_score(right, predicted),
        "pearson": scipy_stats.pearsonr(predicted, right)[0],
        "spearman": scipy_stats.spearmanr(predicted, right)[0],
    }
    assert {*found} == {*wanted} == {*METRICS}
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-7, err_msg=name)


def test_ties_have_mean_ranks():
    right = np.array([1.0, 2, 2, 3, 5, 5])
    predicted = np.array([0.0, 0, 1, 1, 2, 9])
    wanted = scipy_stats.spearmanr(predicted, right)[0]
    assert Estimates(predicted, right).numbers()["spearman"] == pytest.approx(wanted)


def test_what_is_not_defined_is_left_out():
    right = np.array([1.0, 2, 3])
    found = Estimates(np.full(3, 7.0), right).numbers()
    assert {*found} == {"rmse", "mae", "r2"}
    report = Estimates(np.full(3, 7.0), right).report(resamples=20)
    assert report["metrics"]["pearson"]["estimate"] is None


def test_intervals_hold_the_estimate_and_resample_groups():
    predicted, right = drawn(0, 200)
    alone = Estimates(predicted, right).report(resamples=500)
    groups = tuple(str(n // 10) for n in range(200))
    grouped = Estimates(predicted, right, groups).report(resamples=500)
    assert (alone["clustered"], grouped["clustered"]) == (False, True)
    for name in METRICS:
        value = alone["metrics"][name]
        assert value["low"] < value["estimate"] < value["high"]
        assert grouped["metrics"][name]["num_groups"] == 20


def batches(right, size=4):
    for first in range(0, len(right), size):
        index = np.arange(first, first + size)
        index = np.where(index < len(right), index, -1)
        yield {"index": index, "y": right[np.maximum(index, 0)][:, None]}


def test_every_row_is_read_once_in_its_own_unit():
    right = np.arange(10.0)
    trials = np.array([0.0, 1.0])

    def predict(batch):
        return batch["y"][None] + trials[:, None, None]

    first, second = score_values(predict, batches(right), mean=3.0, scale=2.0)
    np.testing.assert_allclose(first.right, right * 2 + 3)
    np.testing.assert_allclose(first.predicted, first.right)
    np.testing.assert_allclose(second.numbers()["rmse"], 2.0)
    with pytest.raises(BadInput, match="exactly once"):
        score_values(predict, [*batches(right), *batches(right)])


def test_a_trial_that_is_not_finite_is_the_only_one():
    right = np.arange(10.0)
    apart = np.array([0.0, np.nan])[:, None, None]
    sound, broken = score_values(lambda batch: batch["y"][None] + apart, batches(right))
    assert sound.numbers()["rmse"] == 0
    for told in (broken.numbers, broken.report):
        with pytest.raises(NonFinite, match="not finite"):
            told()


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_numbers_do_not_depend_on_the_unit(size):
    predicted, right = drawn(3)
    one, other = Estimates(predicted, right), Estimates(predicted * size, right * size)
    for name, value in other.numbers().items():
        unit = size if name in ("rmse", "mae") else 1.0
        np.testing.assert_allclose(value, one.numbers()[name] * unit, rtol=1e-7)
    assert {*other.numbers()} == {*METRICS}


def test_constant_predictions_have_no_correlation_whatever_rounding_leaves():
    rng = np.random.default_rng(0)
    for _ in range(100):
        right = rng.normal(size=7)
        constant = np.full(7, rng.normal())
        assert "pearson" not in Estimates(constant, right).numbers()
