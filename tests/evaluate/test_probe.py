"""The frozen probe learns what is linear, and chooses C on validation rows only."""

import logging

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lowrank.core.errors import BadInput
from lowrank.evaluate.metrics import Rows, metric_values
from lowrank.evaluate.probe import ABSENT_LOG_P, fit_probe


def toy(seed, num_rows, num_classes=4, noise=0.3, size=12):
    """Features around one direction per class, at lengths that mean nothing."""
    rng = np.random.default_rng(seed)
    centers = np.eye(num_classes, size)
    label = np.arange(num_rows) % num_classes
    x = centers[label] + noise * rng.normal(size=(num_rows, size))
    return (x * rng.uniform(0.1, 10, (num_rows, 1))).astype(np.float32), label


def test_separable_classes_are_separated():
    x, y = toy(2, 80, noise=0.1)
    got = fit_probe(toy(0, 80, noise=0.1), toy(1, 40, noise=0.1), x, 4)
    assert metric_values(got.logits, y)["accuracy"] == 1
    assert got.logits.shape == (80, 4)
    assert got.num_parameters == 4 * 13
    np.testing.assert_allclose(np.exp(got.logits).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_logits_are_the_log_probabilities_of_scikit_learn(num_classes):
    train, test = toy(0, 60, num_classes), toy(2, 40, num_classes)
    got = fit_probe(train, toy(1, 40, num_classes), test[0], num_classes, grid=(3.0,))
    norm = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    model = LogisticRegression(C=3.0, max_iter=2000)
    model.fit(norm(train[0].astype(float)), train[1])
    expected = model.predict_log_proba(norm(test[0].astype(float)))
    np.testing.assert_allclose(got.logits, expected, rtol=1e-5, atol=1e-5)


def test_features_count_by_direction_only():
    train, validation, test = toy(0, 60), toy(1, 40), toy(2, 40)
    got = fit_probe(train, validation, test[0], 4)
    again = fit_probe(train, validation, test[0] * np.float32(1024), 4)
    np.testing.assert_array_equal(got.logits, again.logits)


@pytest.mark.parametrize("select", ["log_loss", "accuracy"])
def test_c_is_the_best_on_validation(select, caplog):
    train, validation = toy(0, 40, noise=0.6), toy(1, 400, noise=0.6)
    grid = (1e-4, 1.0, 1e6)
    got = fit_probe(train, validation, validation[0], 4, grid=grid, select=select)
    numbers = {c: row[select] for c, row in got.validation.items()}
    best = (min if select == "log_loss" else max)(numbers.values())
    assert list(got.validation) == list(grid)
    assert len(set(numbers.values())) > 1
    assert numbers[got.strength] == best
    # The test rows are the validation rows: the table must be what a report finds.
    found = metric_values(got.logits, validation[1])
    assert found[select] == pytest.approx(best, rel=1e-5)


def test_equals_go_to_the_stronger_penalty_and_the_edge_is_told(caplog):
    train, validation = toy(0, 80, noise=0.05), toy(1, 40, noise=0.05)
    with caplog.at_level(logging.WARNING):
        got = fit_probe(train, validation, validation[0], 4, select="accuracy")
    assert got.strength == 0.1
    assert "edge of its grid" in caplog.text


def test_a_refit_sees_the_validation_rows():
    train, validation, (x, y) = (
        toy(0, 8, noise=0.5),
        toy(1, 400, noise=0.5),
        toy(2, 400),
    )
    without = fit_probe(train, validation, x, 4)
    refit = fit_probe(train, validation, x, 4, refit=True)
    assert refit.strength == without.strength
    loss = lambda probe: metric_values(probe.logits, y)["log_loss"]
    assert loss(refit) < loss(without)
    assert refit.refit
    assert not without.refit


def test_a_class_without_training_rows_is_wrong_but_finite():
    (x, y), validation = toy(0, 60), toy(1, 40)
    keep = y != 2
    got = fit_probe((x[keep], y[keep]), validation, validation[0], 4)
    assert (got.logits[:, 2] == ABSENT_LOG_P).all()
    assert len(Rows.of(got.logits, validation[1])) == 40
    assert metric_values(got.logits, validation[1])["accuracy"] <= 0.75


def test_fits_that_do_not_converge_are_counted(monkeypatch, caplog):
    monkeypatch.setattr("lowrank.evaluate.probe.MAX_ITERATIONS", 1)
    with caplog.at_level(logging.WARNING):
        got = fit_probe(toy(0, 60), toy(1, 40), toy(1, 40)[0], 4, refit=True)
    assert got.num_unconverged == 7
    assert "before they converged" in caplog.text


def test_what_cannot_be_fitted_is_refused():
    train, validation = toy(0, 60), toy(1, 40)
    test = validation[0].copy()
    test[3] = 0
    with pytest.raises(BadInput, match="vector 3 of the test rows"):
        fit_probe(train, validation, test, 4)
    test[3] = np.nan
    with pytest.raises(BadInput, match="vector 3 of the test rows"):
        fit_probe(train, validation, test, 4)
    with pytest.raises(BadInput, match="one class"):
        fit_probe((train[0], train[1] * 0), validation, validation[0], 4)
    with pytest.raises(BadInput, match="positive"):
        fit_probe(train, validation, validation[0], 4, grid=(0.0, 1.0))
