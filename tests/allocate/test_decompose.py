"""Thin decompositions against LAPACK in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.allocate import decompose

#: float32: some ten roundings per entry, and as many columns.
CLOSE = 2e-6


def wide(x):
    return np.asarray(x, np.float64)


@settings(deadline=None, max_examples=25)
@given(
    d=st.integers(1, 40),
    n=st.integers(1, 12),
    rank=st.integers(0, 12),
    decades=st.floats(0, 6),
    seed=st.integers(0, 99),
)
def test_qr_is_a_decomposition_of_any_rank(d, n, rank, decades, seed):
    rng = np.random.default_rng(seed)
    rank = min(rank, d, n)
    x = (
        rng.normal(size=(2, d, rank))
        * 10 ** -np.linspace(0, decades, max(rank, 1))[:rank]
        @ rng.normal(size=(2, rank, n))
    )
    x = x.astype(np.float32)
    q, r = map(wide, jax.jit(decompose.qr)(jnp.asarray(x)))
    alone = jax.jit(decompose.triangle)(jnp.asarray(np.swapaxes(x, 1, 2)))
    np.testing.assert_array_equal(alone, r.astype(np.float32))
    size = np.abs(x).max(initial=1e-30)
    np.testing.assert_allclose(q @ r, x, atol=8 * CLOSE * size)
    assert (np.tril(r, -1) == 0).all()
    gram = np.swapaxes(q, 1, 2) @ q
    for one in gram:
        used = np.diag(one) > 0.5
        np.testing.assert_allclose(one, np.diag(used), atol=CLOSE)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16, 33])
@pytest.mark.parametrize("kind", ["drawn", "graded", "deficient", "zero", "equal"])
def test_svd_is_that_of_lapack(n, kind):
    rng = np.random.default_rng(n)
    m = rng.normal(size=(3, n, n))
    if kind == "graded":
        m *= 10.0 ** -np.linspace(0, 5, n)
    elif kind == "deficient":
        m[..., n // 2 :] = m[..., : n - n // 2]
    elif kind == "zero":
        m[1] = 0
    elif kind == "equal":
        m = np.stack([np.linalg.qr(one)[0] for one in m])
    m = m.astype(np.float32)
    u, values, v = map(wide, jax.jit(decompose.svd)(jnp.asarray(m)))
    expected = np.linalg.svd(wide(m), compute_uv=False)
    largest = max(expected.max(), 1)
    np.testing.assert_allclose(values, expected, atol=CLOSE * largest)
    alone = jax.jit(decompose.singular_values)(jnp.asarray(m))
    np.testing.assert_allclose(alone, values, rtol=1e-5, atol=CLOSE * largest)
    assert (np.diff(values, axis=1) <= 0).all()
    assert (np.diff(alone, axis=1) <= 0).all()
    np.testing.assert_allclose((u * values[:, None]) @ v, m, atol=4 * CLOSE * largest)
    if kind != "zero":
        eye = np.broadcast_to(np.eye(n), m.shape)
        np.testing.assert_allclose(v @ np.swapaxes(v, 1, 2), eye, atol=4 * CLOSE)


def test_small_singular_values_keep_their_digits():
    """Columns of very different lengths: LAPACK in float32 loses the small ones."""
    rng = np.random.default_rng(0)
    m = (np.linalg.qr(rng.normal(size=(6, 6)))[0] * 10.0 ** -np.arange(6))[None]
    m = jnp.asarray(m, jnp.float32)
    expected = np.linalg.svd(wide(m), compute_uv=False)
    for values in (decompose.svd(m).values, decompose.singular_values(m)):
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_size_does_not_matter(size):
    m = np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)
    plain = decompose.svd(jnp.asarray(m)).values
    np.testing.assert_allclose(
        decompose.svd(jnp.asarray(m * np.float32(size))).values / size, plain, rtol=1e-5
    )
    q, r = decompose.qr(jnp.asarray(m * np.float32(size)))
    np.testing.assert_allclose(q @ (r / size), m, atol=1e-5)


def test_what_is_no_number_ends_and_shows():
    m = jnp.ones((1, 4, 4)).at[0, 1, 2].set(jnp.nan)
    assert not np.isfinite(decompose.svd(m).values).all()
    assert not np.isfinite(decompose.singular_values(m)).all()


def test_mapped_over_trials_it_is_each_alone():
    m = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 5, 5)), jnp.float32)
    both = jax.vmap(decompose.svd)(m)
    for trial in range(3):
        one = decompose.svd(m[trial])
        np.testing.assert_allclose(both.values[trial], one.values, rtol=1e-6)


def test_no_thread_waits_for_the_pool_that_it_is_of():
    """A study of two cores stood still so, in lapack_sgesdd_ffi of jaxlib 0.10.2."""

    @jax.jit
    def values(xs):
        alone = [decompose.singular_values(decompose.triangle(x)) for x in xs]
        return alone, [decompose.svd(decompose.qr(x)[1]) for x in xs]

    xs = [jnp.ones((4, 6, 3))] * 8
    assert "lapack" not in values.lower(xs).compile().as_text()
    assert "lapack" in jax.jit(jnp.linalg.svd).lower(xs[0]).compile().as_text()
