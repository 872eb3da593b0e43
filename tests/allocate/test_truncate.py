"""Truncation is the best there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.allocate import truncate
from lowrank.deltas.thin import Terms

SCALE = 1.7
#: float32 against float64, of corrections of norm about 10.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def terms(rng, layers=3, rank=4, d_in=7, d_out=5, gate=None):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    gate = jnp.ones((layers, rank)) if gate is None else gate
    return Terms(draw(layers, rank, d_in), draw(layers, rank, d_out), gate * SCALE)


def dense(a, b, c):
    wide = (np.asarray(x, np.float64) for x in (c, a, b))
    return np.einsum("lr,lri,lro->lio", *wide)


@pytest.mark.parametrize(("d_in", "d_out"), [(7, 5), (3, 9), (2, 2), (4, 1)])
def test_at_full_rank_nothing_changes_and_factors_are_balanced(d_in, d_out):
    """F5; also where max_rank is more than the weight can have."""
    gate = jnp.array([[1.0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    t = terms(np.random.default_rng(0), d_in=d_in, d_out=d_out, gate=gate)
    found = jax.jit(truncate.split)(t, SCALE)
    whole = dense(t.a, t.b, t.c)
    np.testing.assert_allclose(
        dense(found.a, found.b, np.full((3, 4), SCALE)), whole, **CLOSE
    )
    for x in (found.a, found.b):
        gram = np.einsum("lri,lsi->lrs", x, x)
        expected = np.stack([np.diag(v) for v in np.asarray(found.values)]) / SCALE
        np.testing.assert_allclose(gram, expected, **CLOSE)
    assert found.a.shape == t.a.shape
    assert found.b.shape == t.b.shape
    assert not found.values[2].any()
    assert np.isfinite(found.a).all()


@pytest.mark.parametrize("rank", range(5))
def test_eckart_and_young(rank):
    """The error is that of what is left out: nothing of this rank is nearer."""
    t = terms(np.random.default_rng(1))
    found = truncate.split(t, SCALE)
    gate = (np.arange(4) < rank) * np.full((3, 1), SCALE)
    whole = dense(t.a, t.b, t.c)
    apart = np.linalg.norm(whole - dense(found.a, found.b, gate), axis=(1, 2))
    singular = np.linalg.svd(whole, compute_uv=False)[:, :4]
    np.testing.assert_allclose(found.values, singular, **CLOSE)
    best = np.sqrt((singular[:, rank:] ** 2).sum(1))
    np.testing.assert_allclose(apart, best, **CLOSE)


def test_no_dense_correction_is_formed():
    shape = jax.eval_shape(lambda: terms(np.random.default_rng(0), d_in=83, d_out=89))
    text = str(jax.make_jaxpr(lambda t: truncate.split(t, SCALE))(shape))
    assert "83,4" in text
    assert "83,89" not in text
    assert "89,83" not in text
