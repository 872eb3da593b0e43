"""A birth changes no output, a death is deletion, and neighbors never notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.allocate import transitions
from lowrank.core.errors import BadInput
from lowrank.deltas import inits

OLD = jnp.array([[1.0, 1, 0, 0], [0, 1, 0, 1]])
NEW = jnp.array([[1.0, 0, 1, 0], [1, 1, 0, 1]])


def factors(rng, *stack, rank=4):
    draw = lambda *rest: jnp.asarray(
        rng.normal(size=(*stack, rank, *rest)), jnp.float32
    )
    # A convolution has three input axes; a has as many.
    return {"a": draw(5, 2), "b": draw(3)}


def change_of(f, gate):
    """The dense correction of every layer."""
    a = f["a"].reshape(*f["b"].shape[:-1], -1)
    return np.einsum(
        "...r,...ri,...ro->...io", *(np.asarray(x) for x in (gate, a, f["b"]))
    )


def test_births_are_told_from_deaths():
    born = jax.jit(transitions.births)(OLD, NEW)
    np.testing.assert_array_equal(born, [[0, 0, 1, 0], [1, 0, 0, 0]])


def test_a_birth_changes_no_output_and_no_neighbor():
    """F3, to the bit: what is added is zero times something."""
    rng = np.random.default_rng(0)
    f = factors(rng, 2)
    grown = jnp.maximum(OLD, NEW)
    born = transitions.births(OLD, grown)
    new = transitions.reborn(f, born, zeroed="b")
    np.testing.assert_array_equal(change_of(new, grown), change_of(f, OLD))
    for name in f:
        np.testing.assert_array_equal(new[name][~born], f[name][~born])
    assert not new["b"][born].any()
    np.testing.assert_array_equal(new["a"], f["a"])


def test_a_death_is_deletion():
    """F4."""
    f = factors(np.random.default_rng(1))
    gate = jnp.array([1.0, 0, 0, 1])
    rest = {name: x[jnp.array([0, 3])] for name, x in f.items()}
    np.testing.assert_allclose(
        change_of(f, gate), change_of(rest, jnp.ones(2)), rtol=1e-6
    )


def test_drawn_components_do_not_depend_on_their_neighbors():
    f = factors(np.random.default_rng(2), 2, 3, rank=4)
    draw = lambda key, x, stack: transitions.draw(key, x, stack, inits.uniform(10))
    key = jax.random.key(0)
    wide = draw(key, f["a"], (2, 3))
    assert wide.shape == f["a"].shape
    assert (jnp.abs(wide) <= 10**-0.5).all()
    np.testing.assert_array_equal(wide[:, :, :2], draw(key, f["a"][:, :, :2], (2, 3)))
    assert len(np.unique(np.asarray(wide))) == wide.size, "no two draws are alike"
    assert (draw(jax.random.fold_in(key, 1), f["a"], (2, 3)) != wide).all()
    single = factors(np.random.default_rng(2))["a"]
    assert draw(key, single, ()).shape == single.shape


def test_revivable_zeroes_the_value_and_leaves_the_rest():
    f = factors(np.random.default_rng(4), 2)
    found = transitions.revivable(f, NEW, "b")
    np.testing.assert_array_equal(found["a"], f["a"])
    np.testing.assert_array_equal(found["b"], np.where(NEW[..., None] != 0, f["b"], 0))
    np.testing.assert_allclose(
        change_of(found, jnp.ones((2, 4))), change_of(f, NEW), rtol=1e-6
    )


def test_factors_that_are_not_there_are_named():
    f = factors(np.random.default_rng(5), 2)
    born = transitions.births(OLD, NEW)
    with pytest.raises(BadInput, match="factor 'lam', and the site has a, b"):
        transitions.reborn(f, born, zeroed="lam")
    with pytest.raises(BadInput, match="does not begin with the axes"):
        transitions.reborn({"b": f["b"][0]}, born, zeroed="b")
