"""The loss is the cross-entropy that it says, and padding is silent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank.train.losses import cross_entropy, squared_error

SMOOTH = {"label_smoothing": jnp.float32(0.0)}


def example(*rows, classes=5):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(*rows, classes)), jnp.float32)
    label = jnp.asarray(rng.integers(0, classes, rows), jnp.int32)
    return logits, {"label": label, "weight": jnp.ones(rows)}


@pytest.mark.parametrize("rows", [(7,), (3, 4)])
def test_it_equals_optax_for_rows_and_for_tokens(rows):
    logits, batch = example(*rows)
    sums = cross_entropy(logits, batch, SMOOTH)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_allclose(sums.loss, theirs.sum(), rtol=1e-6)
    assert float(sums.weight) == np.prod(rows)
    correct = (logits.argmax(-1) == batch["label"]).sum()
    assert float(sums.extra["accuracy"]) == float(correct)


def test_smoothing_spreads_mass_over_all_classes():
    logits, batch = example(7)
    sums = cross_entropy(logits, batch, {"label_smoothing": jnp.float32(0.1)})
    target = optax.smooth_labels(jax.nn.one_hot(batch["label"], 5), 0.1)
    theirs = optax.softmax_cross_entropy(logits, target).sum()
    np.testing.assert_allclose(sums.loss, theirs, rtol=1e-6)


def test_rows_of_weight_zero_are_silent_whatever_their_label():
    logits, batch = example(7)
    batch["weight"] = batch["weight"].at[5:].set(0)
    bad = {**batch, "label": batch["label"].at[5:].set(-100)}
    kept = jax.tree.map(lambda x: x[:5], (logits, batch))
    want = cross_entropy(*kept, SMOOTH)
    got = cross_entropy(logits, bad, SMOOTH)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-6)
    gradient = jax.grad(lambda x: cross_entropy(x, bad, SMOOTH).loss)(logits)
    assert not np.asarray(gradient[5:]).any()


def test_squared_error_is_the_mean_over_targets_summed_over_weighted_rows():
    rng = np.random.default_rng(1)
    f, y = rng.normal(size=(2, 6, 3)).astype(np.float32)
    weight = np.array([1, 1, 0, 2, 0, 1], np.float32)
    y[2] = np.nan  # Padding may hold anything.
    batch = {"y": jnp.asarray(y), "weight": jnp.asarray(weight)}
    sums, gradient = jax.value_and_grad(lambda f: squared_error(f, batch, SMOOTH).loss)(
        jnp.asarray(f)
    )
    real = weight > 0
    wanted = ((f - y)[real] ** 2).mean(axis=1) @ weight[real]
    np.testing.assert_allclose(sums, wanted, rtol=1e-6)
    assert float(squared_error(jnp.asarray(f), batch, SMOOTH).weight) == 5
    assert (np.asarray(gradient)[~real] == 0).all()
    assert np.isfinite(gradient).all()
