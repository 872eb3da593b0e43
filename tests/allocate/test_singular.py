"""Importance in the singular basis, against NumPy on the dense correction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import equal, ranks_of
from simulated import STEPS, allocator

from lowrank.allocate import signals
from lowrank.allocate.importance import IMPORTANCES
from lowrank.allocate.singular import Singular, importance_of
from lowrank.core.errors import BadInput
from lowrank.deltas.thin import Terms

LAYERS, HELD, D_IN, D_OUT = 2, 3, 6, 5
DECAY = 0.9
CONSTANTS = {"decay": jnp.float32(DECAY), "deviation_decay": jnp.float32(0.7)}
KEY = jax.random.key(0)


def terms_of(rng, gates):
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return Terms(
        c=jnp.asarray(gates.reshape(LAYERS, HELD) * 0.5, jnp.float32),
        a=jnp.asarray(draw(LAYERS, HELD, D_IN)),
        b=jnp.asarray(draw(LAYERS, HELD, D_OUT)),
    )


spectra, norms = jax.jit(signals.spectra), jax.jit(signals.norms)


def told(terms, **more):
    spectrum = spectra({"w": terms})["w"]
    flat = {"norms": norms(terms).ravel(), "spectrum": spectrum.ravel()}
    return flat | {n: jnp.asarray(x, jnp.float32) for n, x in more.items()}


@pytest.mark.parametrize(("name", "degree"), [("fisher", 2), ("gradient", 1)])
def test_it_is_its_equation(name, degree):
    """float32 against float64 of six terms each, an SVD among them: 1e-5."""
    slots, rng = equal(LAYERS, max_rank=HELD), np.random.default_rng(0)
    importance = importance_of(name, "singular")
    assert importance.degree == degree
    gates = np.array([1, 1, 1, 1, 0, 1], np.float32)
    memory = importance.init(slots, None)
    own = sizes = values = 0.0
    for _ in range(4):
        terms, seen = terms_of(rng, gates), rng.uniform(1, 2, size=len(gates)) * gates
        memory = importance.observe(
            slots, memory, told(terms, **{f"gate_{name}": seen}), CONSTANTS
        )
        dense = np.einsum("lr,lri,lrj->lrij", *(np.asarray(x, np.float64)
                          for x in (terms.c, terms.a, terms.b)))  # fmt: skip
        mean = lambda old, new: DECAY * old + (1 - DECAY) * new
        own = mean(own, seen)
        sizes = mean(sizes, np.linalg.norm(dense, axis=(2, 3)) ** degree)
        s = np.linalg.svd(dense.sum(1), compute_uv=False)[:, :HELD]
        values = mean(values, s**degree)
    found = importance.values(slots, memory, jnp.asarray(gates), CONSTANTS, KEY)
    own = (own / (1 - DECAY**4)).reshape(LAYERS, HELD)
    for layer in range(LAYERS):
        is_open = gates.reshape(LAYERS, HELD)[layer] != 0
        each = own[layer][is_open].sum() / sizes[layer][is_open].sum()
        places = np.argsort(np.argsort(-own[layer][is_open]))
        np.testing.assert_allclose(
            np.asarray(found).reshape(LAYERS, HELD)[layer][is_open],
            each * values[layer][places],
            rtol=1e-5,
        )


@pytest.mark.parametrize("name", ["fisher", "gradient", "activation"])
def test_where_components_do_not_overlap_it_changes_nothing(name):
    slots, rng = equal(LAYERS, max_rank=HELD), np.random.default_rng(1)
    frame = lambda d: np.linalg.qr(rng.normal(size=(LAYERS, d, HELD)))[0]
    across = lambda x: jnp.asarray(np.swapaxes(x, 1, 2), jnp.float32)
    lengths = jnp.asarray(rng.uniform(0.5, 2, size=(LAYERS, HELD)), jnp.float32)
    terms = Terms(c=lengths, a=across(frame(D_IN)), b=across(frame(D_OUT)))
    own, singular = (importance_of(name, basis) for basis in ("own", "singular"))
    bent = np.repeat([3.0, 0.5], HELD)
    given = told(terms)
    (signal,) = own.signals
    given[signal] = bent * np.asarray(given["norms"]) ** own.degree
    seen = [
        one.values(
            slots,
            one.observe(slots, one.init(slots, None), given, CONSTANTS),
            jnp.ones(slots.num_components),
            CONSTANTS,
            KEY,
        )
        for one in (own, singular)
    ]
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)


def test_norms_become_singular_values():
    slots, rng = equal(LAYERS, max_rank=HELD), np.random.default_rng(2)
    importance, given = (
        importance_of("norm", "singular"),
        told(terms_of(rng, np.ones(LAYERS * HELD))),
    )
    memory = importance.observe(slots, importance.init(slots, None), given, CONSTANTS)
    found = importance.values(
        slots, memory, jnp.ones(slots.num_components), CONSTANTS, KEY
    )
    falling = -np.sort(-np.asarray(found).reshape(LAYERS, HELD), axis=1)
    seen = (1 - DECAY) * np.asarray(given["spectrum"]).reshape(LAYERS, HELD)
    np.testing.assert_allclose(falling / seen, 1 / (1 - DECAY), rtol=1e-5)


def overlapping():
    """Three components that share two directions, beside two and a small one."""
    third = np.array([[1, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    wide = lambda x, d: np.pad(x * 0.9, ((0, 0), (0, d - 2)))
    a, b = (np.zeros((LAYERS, HELD, d), np.float32) for d in (D_IN, D_OUT))
    a[0], b[0] = wide(third, D_IN), wide(third, D_OUT)
    for j, length in enumerate((1.0, 0.8, 0.3)):
        a[1, j, j] = b[1, j, j] = length
    return Terms(a=jnp.asarray(a), b=jnp.asarray(b), c=jnp.ones((LAYERS, HELD)))


@pytest.mark.parametrize(("basis", "kept"), [("own", [3, 1]), ("singular", [2, 2])])
def test_what_says_the_same_is_not_counted_twice(basis, kept):
    """The loss bends alike in both layers: the Fisher information is the square."""
    slots = equal(LAYERS, max_rank=HELD)
    allocation = allocator("fisher", basis=basis, budget=4).on(slots, STEPS)
    terms = overlapping()
    given = told(terms, gate_fisher=signals.norms(terms).ravel() ** 2)
    constants = allocation.constants
    memory, gates = allocation.init(), allocation.gates(constants)
    memory = allocation.observe(memory, given, 0, constants)
    last = int(constants["end"])
    gates, memory = allocation.event(memory, gates, last, KEY, constants)
    assert ranks_of(slots, gates).tolist() == kept
    assert bool(memory["sound"])


def test_what_was_shut_counts_nowhere_and_a_birth_is_passed_on():
    slots, rng = equal(LAYERS, max_rank=HELD), np.random.default_rng(3)
    importance = importance_of("fisher", "singular")
    memory = importance.init(slots, None)
    assert not importance.ready(memory)
    all_open = np.ones(LAYERS * HELD, np.float32)
    for gates in (all_open, all_open * [1, 1, 0, 1, 1, 1]):
        given = told(terms_of(rng, gates), gate_fisher=np.full(len(gates), 2.0))
        memory = importance.observe(slots, memory, given, CONSTANTS)
    assert importance.ready(memory)
    values = importance.values(slots, memory, jnp.asarray(gates), CONSTANTS, KEY)
    for name in ("sizes", "values"):
        changed = {**memory, name: memory[name].at[2].set(1e6)}
        other = importance.values(slots, changed, jnp.asarray(gates), CONSTANTS, KEY)
        np.testing.assert_array_equal(other[gates != 0], values[gates != 0])
    born = jnp.arange(len(gates)) == 2
    found = importance.forget(slots, memory, born)
    assert found["own"]["count"].tolist() == [2, 2, 0, 2, 2, 2]
    np.testing.assert_array_equal(found["values"], memory["values"])


@pytest.mark.parametrize("name", IMPORTANCES)
def test_only_what_grows_with_a_component_has_such_a_basis(name):
    if IMPORTANCES[name].degree is not None:
        found = allocator("adaptive", importance=name, basis="singular")
        assert found.on(equal(4), STEPS).needs >= {"norms", "spectrum"}
        assert isinstance(importance_of(name, "singular"), Singular)
        return
    mode = "squeezed" if name == "spectrum" else "hard"
    with pytest.raises(BadInput, match=r"does not grow with the size.*basis=own"):
        allocator("adaptive", importance=name, basis="singular", mode=mode)
