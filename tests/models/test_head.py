"""Token scores in pieces are those of all logits, and never hold these."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.cost.count import jaxpr_flops
from lowrank.models.head import label_scores, places_at_once

# Primes: no other array has their shapes.
BATCH, SEQ, WIDTH, VOCAB = 3, 14, 11, 101
HIDDEN = jax.random.normal(jax.random.key(0), (BATCH, SEQ, WIDTH))
TABLE = jax.random.normal(jax.random.key(1), (WIDTH, VOCAB))
LABEL = jax.random.randint(jax.random.key(2), (BATCH, SEQ), 0, VOCAB)


def scores(hidden, table, most):
    return label_scores(lambda x: x @ table, hidden, LABEL, VOCAB, most)


def picked(logits):
    """The log probability of every label, out of all logits at once."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(log_p, LABEL[..., None], -1)[..., 0]


@pytest.mark.parametrize("pieces", [1, 2, 7, 14])
def test_scores_and_slopes_of_a_trained_head_are_those_of_the_formula(pieces):
    most = BATCH * SEQ * VOCAB // pieces
    found = scores(HIDDEN, TABLE, most)
    np.testing.assert_allclose(found["picked"], picked(HIDDEN @ TABLE), atol=1e-5)
    likeliest = np.asarray(HIDDEN @ TABLE).argmax(-1)
    np.testing.assert_array_equal(found["correct"], likeliest == LABEL)
    ours = lambda h, t: jnp.sum(jnp.cos(scores(h, t, most)["picked"]))
    by_hand = lambda h, t: jnp.sum(jnp.cos(picked(h @ t)))
    for which in (0, 1, (0, 1)):
        slopes = (jax.grad(f, argnums=which)(HIDDEN, TABLE) for f in (ours, by_hand))
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), *slopes)


@pytest.mark.parametrize("pieces", [1, 2, 14])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_slopes_of_a_frozen_head_are_those_of_the_formula(pieces, cap):
    def logits(x):
        z = x @ TABLE
        return z if cap is None else cap * jnp.tanh(z / cap)

    by_hand = lambda hidden: picked(logits(hidden))

    def ours(hidden):
        most = BATCH * SEQ * VOCAB // pieces
        return label_scores(logits, hidden, LABEL, VOCAB, most)["picked"]

    slope = lambda f: lambda x: jax.grad(lambda h: jnp.sum(jnp.cos(f(h))))(x)
    many = jnp.stack([HIDDEN, -HIDDEN])
    for run in (slope(ours), jax.jit(slope(ours))):
        np.testing.assert_allclose(run(HIDDEN), slope(by_hand)(HIDDEN), atol=1e-5)
    for one, other in zip(
        jax.jit(jax.vmap(slope(ours)))(many), map(slope(by_hand), many), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_frozen_head_makes_two_products_and_a_trained_one_what_it_needs(pieces):
    most = BATCH * SEQ * VOCAB // pieces
    loss = lambda h, t: jnp.sum(scores(h, t, most)["picked"])
    product = 2 * BATCH * SEQ * WIDTH * VOCAB
    frozen = jax.jit(jax.value_and_grad(loss))
    assert jaxpr_flops(frozen, HIDDEN, TABLE).flops == 2 * product
    # Logits, both slopes, and in pieces the logits once more.
    trained = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    wanted = (3 if pieces == 1 else 4) * product
    assert jaxpr_flops(trained, HIDDEN, TABLE).flops == wanted


def test_a_loss_that_reads_hits_alone_has_no_slope():
    hits = jax.grad(lambda h: jnp.sum(scores(h, TABLE, 1)["correct"]))(HIDDEN)
    np.testing.assert_array_equal(hits, 0)
    both = jax.grad(lambda h, t: jnp.sum(scores(h, t, 1)["correct"]), argnums=(0, 1))
    for slope in both(HIDDEN, TABLE):
        np.testing.assert_array_equal(slope, 0)


def test_slopes_are_of_the_type_of_the_states():
    low, table = HIDDEN.astype(jnp.bfloat16), TABLE.astype(jnp.bfloat16)
    logits = lambda x: (x @ table).astype(jnp.float32)
    told = lambda h: jnp.sum(label_scores(logits, h, LABEL, VOCAB, 1)["picked"])
    found = jax.grad(told)(low)
    assert found.dtype == jnp.bfloat16
    exact = jax.grad(lambda h: jnp.sum(scores(h, TABLE, 1)["picked"]))(HIDDEN)
    # A few roundings of 2^-9 each, of numbers up to 4.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.1)


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
