"""Convolutions, experts, loops, cuts and joins cost what LoRA by hand costs there."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from test_inject_cost import D_IN, D_OUT, LAYERS, RANK, dense_results, flops

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA

OPTIMIZED = True
PLACES, TAPS, EXPERTS, ROWS = 11, 3, 2, 23
SIZES = jnp.array([10, 13])


def gate(d):
    return d["gate"] * d["scale"]


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def conv(p, x):
    return convolve(x, p["w"])


def conv_by_hand(p, f, d, x):
    down = f["a"].transpose(1, 2, 0)
    return conv(p, x) + (convolve(x, down) * gate(d)[None, None]) @ f["b"]


def experts(p, x):
    return jnp.einsum("ebi,eio->ebo", x, p["w"])


def experts_by_hand(p, f, d, x):
    u = jnp.einsum("ebi,eri->ebr", x, f["a"]) * gate(d)[:, None]
    return experts(p, x) + jnp.einsum("ebr,ero->ebo", u, f["b"])


def ragged(p, x):
    return lax.ragged_dot(x, p["w"], SIZES)


def ragged_by_hand(p, f, d, x):
    u = lax.ragged_dot(x, f["a"].swapaxes(1, 2), SIZES)
    return ragged(p, x) + lax.ragged_dot(u, f["b"] * gate(d)[..., None], SIZES)


def scan(p, x):
    return lax.scan(lambda c, w: (jnp.sin(c @ w @ w.T), None), x, p["w"])[0]


def scan_by_hand(p, f, d, x):
    def step(c, layer):
        w, a, b, g = layer
        y = c @ w + (c @ a.T * g[None]) @ b
        return jnp.sin(y @ w.T + (y @ b.T * g[None]) @ a), None

    return lax.scan(step, x, (p["w"], f["a"], f["b"], gate(d)))[0]


def cut(p, x):
    left, right = jnp.split(p["w"], [5], axis=1)
    return jnp.concatenate([x @ left, x @ right], axis=1)


def cut_by_hand(p, f, d, x):
    """Two slices are two uses, with a correction each."""
    pairs = zip(*(jnp.split(m, [5], axis=1) for m in (p["w"], f["b"])), strict=True)
    return jnp.concatenate(
        [x @ w + (x @ f["a"].T * gate(d)[None]) @ b for w, b in pairs], axis=1
    )


def scaled(p, x):
    return x @ (p["w"] * jnp.linspace(1.0, 2.0, D_OUT)[None])


def scaled_by_hand(p, f, d, x):
    b = f["b"] * jnp.linspace(1.0, 2.0, D_OUT)[None]
    return scaled(p, x) + (x @ f["a"].T * gate(d)[None]) @ b


CASES = {
    "conv": (conv, conv_by_hand, (TAPS, D_IN, D_OUT), (5, PLACES, D_IN)),
    "experts": (experts, experts_by_hand, (EXPERTS, D_IN, D_OUT), (EXPERTS, 5, D_IN)),
    "ragged": (ragged, ragged_by_hand, (EXPERTS, D_IN, D_OUT), (ROWS, D_IN)),
    "scan": (scan, scan_by_hand, (LAYERS, D_IN, D_OUT), (5, D_IN)),
    "cut": (cut, cut_by_hand, (D_IN, D_OUT), (ROWS, D_IN)),
    "scaled": (scaled, scaled_by_hand, (D_IN, D_OUT), (ROWS, D_IN)),
}


def built(name):
    apply, hand, shape, inputs = CASES[name]
    params = {"w": oracle.filled(jax.ShapeDtypeStruct(shape, jnp.float32), 0)}
    x = oracle.filled(jax.ShapeDtypeStruct(inputs, jnp.float32), 1)
    adapted = attach(apply, params, x, rules=[Rule("w", LoRA(), rank=RANK)])
    trained, dials = oracle.loud(adapted, 1)

    def factored(trained, dials, params, x):
        return jnp.sum(adapted.apply(params, trained, x, dials=dials) ** 2)

    def by_hand(trained, dials, params, x):
        return jnp.sum(hand(params, trained["w"], dials["w"], x) ** 2)

    def dense(trained, dials, params, x):
        tree = oracle.merged(jnp, adapted, params, trained, dials)
        return jnp.sum(apply(tree, x) ** 2)

    return (factored, by_hand, dense), (trained, dials, params, x), adapted


@pytest.mark.parametrize("name", CASES)
def test_flops_equal_lora_written_by_hand(name):
    (factored, by_hand, dense), given, _ = built(name)
    np.testing.assert_allclose(factored(*given), by_hand(*given), rtol=1e-4)
    hand = flops(by_hand, given)
    assert flops(factored, given) == pytest.approx(hand, rel=0.01)
    assert flops(dense, given) > 1.01 * hand


@pytest.mark.parametrize("name", CASES)
def test_no_dense_delta_is_formed(name):
    (factored, by_hand, dense), given, _ = built(name)
    text = lambda loss: jax.jit(jax.grad(loss)).lower(*given).as_text()
    # The model's own: weights that it scales, or keeps for the backward pass.
    base = dense_results(text(by_hand))
    ours = [line for line in dense_results(text(factored)) if line not in base]
    assert ours == []
    assert [line for line in dense_results(text(dense)) if line not in base]


def test_flops_per_rank_are_those_of_the_products():
    found = {name: built(name)[2].sites["w"].flops_per_rank for name in CASES}
    assert found == {
        "conv": 2 * 5 * PLACES * (TAPS * D_IN + D_OUT),
        "experts": 2 * EXPERTS * 5 * (D_IN + D_OUT),
        "ragged": 2 * ROWS * (D_IN + D_OUT),
        "scan": 2 * 2 * LAYERS * 5 * (D_IN + D_OUT),
        "cut": 2 * ROWS * (2 * D_IN + D_OUT),
        "scaled": 2 * ROWS * (D_IN + D_OUT),
    }
