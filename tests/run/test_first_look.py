"""What is measured before the first step: against NumPy, against dense gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA
from lowrank.run.first_look import first_gradients, second_moments
from lowrank.run.forward import inputs_of
from lowrank.train.losses import cross_entropy

# Primes; d_in is below, above and equal to d_out.
VOCAB, WIDTH, HIDDEN, CLASSES, LAYERS = 23, 7, 13, 5, 3
CONSTANTS = {"label_smoothing": jnp.float32(0.0)}


def apply(params, batch):
    """Layers up and down in a scan, tokens by themselves, the mean of the real ones."""
    mask = batch["mask"][..., None]

    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]) @ own["down"], None

    x, _ = jax.lax.scan(
        jax.checkpoint(layer), params["embed"][batch["ids"]], params["stack"]
    )
    x = jnp.sum(jnp.where(mask, x @ params["mix"], 0), axis=1) / mask.sum(axis=1)
    return jnp.tanh(x) @ params["head"]


def make(targets=("stack/*", "mix"), max_rank=None):
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    params = {
        "embed": normal(keys[0], (VOCAB, WIDTH)),
        "stack": {
            "up": normal(keys[1], (LAYERS, WIDTH, HIDDEN)) / np.sqrt(WIDTH),
            "down": normal(keys[2], (LAYERS, HIDDEN, WIDTH)) / np.sqrt(HIDDEN),
        },
        "mix": normal(keys[3], (WIDTH, WIDTH)),
        "head": jnp.zeros((WIDTH, CLASSES)),
    }
    rules = [Rule(target, LoRA(), 2, max_rank) for target in targets]
    rules = [Train("head", init="dense"), *rules]
    return params, attach(apply, params, inputs_of(batch(0)), rules=rules)


def batch(seed, rows=6, seq=5):
    rng = np.random.default_rng(seed)
    length = rng.integers(2, seq + 1, rows)
    weight = np.ones(rows, np.float32)
    weight[-1] = 0  # A row that only fills the batch up.
    return {
        "ids": rng.integers(0, VOCAB, (rows, seq)).astype(np.int32),
        "mask": np.arange(seq) < length[:, None],
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "weight": weight,
        "index": np.arange(rows, dtype=np.int32),
    }


def moments_by_hand(params, batches):
    """sum x^T x over the tokens that count, in NumPy and float64."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    found = {
        "stack/up": np.zeros((LAYERS, WIDTH, WIDTH)),
        "stack/down": np.zeros((LAYERS, HIDDEN, HIDDEN)),
        "mix": np.zeros((1, WIDTH, WIDTH)),
    }
    for one in batches:
        x = wide["embed"][one["ids"]]
        counts = one["mask"] & (one["weight"] > 0)[:, None]
        for number in range(LAYERS):
            found["stack/up"][number] += x[counts].T @ x[counts]
            inner = np.tanh(x @ wide["stack"]["up"][number])
            found["stack/down"][number] += inner[counts].T @ inner[counts]
            x = x + inner @ wide["stack"]["down"][number]
        found["mix"][0] += x[counts].T @ x[counts]
    return found


@pytest.fixture(scope="module")
def seen():
    params, adapted = make()
    frozen, trained = adapted.init(jax.random.key(1))
    batches = [batch(seed) for seed in range(3)]
    given = (adapted, trained, CONSTANTS, frozen, batches, cross_entropy, inputs_of)
    return params, given, batches


def test_second_moments_are_those_of_real_tokens(seen):
    params, given, batches = seen
    found = second_moments(*given)
    expected = moments_by_hand(params, batches)
    assert {*found} == {*expected}
    for path, moments in expected.items():
        # Sums of some fifty products in float32.
        np.testing.assert_allclose(
            found[path], moments, rtol=2e-5, atol=2e-5 * np.abs(moments).max()
        )


def test_padding_would_have_been_noticed(seen):
    params, _, batches = seen
    filled = [{**one, "mask": np.ones_like(one["mask"])} for one in batches]
    assert (
        moments_by_hand(params, filled)["mix"][0].trace()
        > 1.1 * moments_by_hand(params, batches)["mix"][0].trace()
    )


def test_first_gradients_are_those_of_the_dense_weight(seen):
    params, given, batches = seen
    adapted, trained = given[:2]
    found = first_gradients(*given)

    def mean_loss(weights, one):
        whole = {**weights, "head": trained["head"]}
        sums = cross_entropy(apply(whole, inputs_of(one)), one, CONSTANTS)
        return sums.loss / sums.weight

    total = None
    for one in batches:
        slope = jax.grad(mean_loss)(params, jax.tree.map(jnp.asarray, one))
        total = slope if total is None else jax.tree.map(jnp.add, total, slope)
    expected = {
        "stack/up": np.asarray(total["stack"]["up"]),
        # Taller than wide: by its transpose.
        "stack/down": np.asarray(total["stack"]["down"]).swapaxes(1, 2),
        "mix": np.asarray(total["mix"])[None],
    }
    assert {*found} == {*expected} == {*adapted.sites}
    for path, dense in expected.items():
        np.testing.assert_allclose(
            found[path], dense, rtol=1e-4, atol=1e-5 * np.abs(dense).max()
        )


def test_a_table_has_no_directions():
    _, adapted = make(("embed", "mix"))
    frozen, trained = adapted.init(jax.random.key(1))
    with pytest.raises(BadInput, match="table of rows"):
        second_moments(
            adapted, trained, CONSTANTS, frozen, [batch(0)], cross_entropy, inputs_of
        )


def test_what_is_passed_on_is_the_models_own_derivative(seen):
    # The probes send nothing back: where the loss depends on no token, none counts.
    _, given, _ = seen
    adapted, trained, constants, frozen, _, loss, inputs = given
    silent = {**batch(0), "weight": np.zeros(6, np.float32)}
    found = second_moments(adapted, trained, constants, frozen, [silent], loss, inputs)
    assert len(found) == 3
    assert all(not dense.any() for dense in found.values())
