"""Token scores in pieces are those of all logits, and never hold these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.models.head import label_scores, places_at_once

# Primes: no other array has their shapes.
BATCH, SEQ, WIDTH, VOCAB = 3, 14, 11, 101
HIDDEN = jax.random.normal(jax.random.key(0), (BATCH, SEQ, WIDTH))
TABLE = jax.random.normal(jax.random.key(1), (WIDTH, VOCAB))
LABEL = jax.random.randint(jax.random.key(2), (BATCH, SEQ), 0, VOCAB)


def scores(hidden, table, most):
    return label_scores(lambda x: x @ table, hidden, LABEL, VOCAB, most)


@pytest.mark.parametrize("pieces", [1, 2, 7, 14])
def test_scores_and_gradients_do_not_depend_on_the_pieces(pieces):
    most = BATCH * SEQ * VOCAB // pieces
    log_p = np.asarray(jax.nn.log_softmax(HIDDEN @ TABLE, axis=-1))
    found = scores(HIDDEN, TABLE, most)
    picked = np.take_along_axis(log_p, np.asarray(LABEL)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found["picked"], picked, atol=1e-5)
    np.testing.assert_allclose(found["mean"], log_p.mean(-1), atol=1e-5)
    np.testing.assert_array_equal(found["correct"], log_p.argmax(-1) == LABEL)
    loss = lambda h, t, m: jnp.sum(jnp.cos(scores(h, t, m)["picked"]))
    ours, whole = (
        jax.grad(loss, argnums=(0, 1))(HIDDEN, TABLE, m) for m in (most, 10**9)
    )
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_all_logits_exist_only_if_they_may():
    whole = BATCH * SEQ * VOCAB
    step = jax.grad(lambda h, most: jnp.sum(scores(h, TABLE, most)["picked"]))
    text = lambda most: jax.jit(step, static_argnums=1).lower(HIDDEN, most).as_text()
    assert f"{BATCH}x{SEQ}x{VOCAB}x" in text(whole)
    assert f"{BATCH}x{SEQ}x{VOCAB}x" not in text(whole // 2)
    assert f"{BATCH}x{SEQ // 2}x{VOCAB}x" in text(whole // 2)


@pytest.mark.parametrize(
    ("seq", "most", "want"), [(12, 10**9, 12), (12, 12 * 50, 6), (7, 60, 1), (12, 1, 1)]
)
def test_pieces_divide_the_sequence(seq, most, want):
    assert places_at_once(2, seq, 50, most) == want
