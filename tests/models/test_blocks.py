"""Activations, masks and layer norms keep their equations and their dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.models.blocks import (
    ACTIVATIONS,
    MASKED,
    LayerNorm,
    RMSNorm,
    gelu,
    mask_bias,
    softmax,
    wide,
    without_ones,
)

X = jnp.linspace(-6.0, 6.0, 241)


def test_gelu_and_its_slope_are_those_of_the_exact_formula():
    exact = lambda x: jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu(X), exact(X), atol=1e-6)
    ours, theirs = (jax.vmap(jax.grad(f))(X) for f in (gelu, exact))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_gelu_can_be_differentiated_forward_and_twice():
    slope = jax.vmap(jax.grad(gelu))(X)
    _, tangent = jax.jvp(gelu, (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(tangent, slope, atol=1e-6)
    # phi(x) (2 - x^2), the second derivative by hand.
    second = np.exp(-0.5 * X**2) / np.sqrt(2 * np.pi) * (2 - X**2)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(gelu)))(X), second, atol=1e-5)


def test_gelu_keeps_one_array_for_the_backward_pass():
    _, backward = jax.vjp(gelu, X)
    saved = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == X.shape]
    assert len(saved) == 1


def test_softmax_and_its_derivatives_are_those_of_the_formula():
    scores = 5.0 * jax.random.normal(jax.random.key(0), (3, 7))
    pull = jax.random.normal(jax.random.key(1), scores.shape)
    np.testing.assert_allclose(softmax(scores), jax.nn.softmax(scores), atol=1e-6)
    loss = lambda f: lambda s: jnp.sum(f(s) * pull)
    ours, theirs = (jax.grad(loss(f))(scores) for f in (softmax, jax.nn.softmax))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    hessian = lambda f: jax.hessian(loss(f))(scores)
    np.testing.assert_allclose(hessian(softmax), hessian(jax.nn.softmax), atol=1e-5)


def test_softmax_holds_at_extremes_and_ignores_what_is_masked():
    scores = jnp.array([[1e4, 1e4 - 1.0, MASKED], [MASKED, MASKED, MASKED]])
    half = 1 / (1 + np.exp(-1.0))
    third = np.full(3, 1 / 3)
    np.testing.assert_allclose(softmax(scores), [[half, 1 - half, 0], third], rtol=1e-6)
    slope = jax.grad(lambda s: softmax(s)[0, 0])(scores)
    np.testing.assert_allclose(slope[0], [half * (1 - half), -half * (1 - half), 0])
    assert not slope[1].any()


def test_softmax_keeps_its_result_and_nothing_else_for_the_backward_pass():
    scores = jnp.ones((3, 7))
    _, backward = jax.vjp(softmax, scores)
    saved = [x for x in jax.tree.leaves(backward) if x.shape == scores.shape]
    assert len(saved) == 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_the_compute_dtype(name):
    assert ACTIVATIONS[name](X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_mask_hides_padding_and_nothing_else():
    bias = mask_bias(jnp.array([[True, False]]), jnp.float32)
    assert bias.shape == (1, 1, 1, 2)
    np.testing.assert_array_equal(bias.ravel(), np.float32([0.0, MASKED]))


def test_sums_are_never_narrower_than_float32():
    assert wide("bfloat16") == jnp.float32
    assert wide("float64") == jnp.float64


def test_layer_norm_is_exact_far_from_zero():
    rng = np.random.default_rng(0)
    x = np.float32(100.0 + rng.normal(size=(2, 3, 16))).astype(np.float64)
    scale, bias = rng.normal(size=(2, 16))
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5)
    params = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    norm = LayerNorm(0.5, jnp.float32)
    got = norm.apply({"params": params}, jnp.float32(x))
    # A float32 mean of numbers near 100 is off by about 1e-5; the one-pass variance,
    # a difference of numbers near 10000, would be off by 1e-3.
    np.testing.assert_allclose(got, want * scale + bias, atol=1e-4)
    narrow = LayerNorm(0.5, jnp.bfloat16).apply({"params": params}, jnp.float32(x))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype("f"), got, atol=0.03)


NORMS = [LayerNorm(1e-6, jnp.float32), RMSNorm(1e-6, jnp.float32)]


@pytest.mark.parametrize("norm", NORMS, ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 5, 8), (5, 1, 8), (1, 1, 8)])
def test_an_axis_of_one_changes_no_number_of_a_norm(norm, shape):
    params = {"scale": jnp.linspace(0.5, 2.0, 8), "bias": jnp.linspace(-1.0, 1.0, 8)}
    x = jax.random.normal(jax.random.key(3), shape)
    pull = jax.random.normal(jax.random.key(4), shape)

    def loss(params, x, pull):
        return jnp.vdot(norm.apply({"params": params}, x), pull)

    ours = jax.grad(loss, argnums=(0, 1))(params, x, pull)
    # Beside a row of zeros, which has no part in the loss, nothing has one entry alone.
    beside = lambda x: jnp.pad(x, [(0, 1), (0, 1), (0, 0)])
    trained, moved = jax.grad(loss, argnums=(0, 1))(params, beside(x), beside(pull))
    assert norm.apply({"params": params}, x).shape == shape
    # Float32 sums of at most 8 numbers of order one, in whatever order.
    cut = moved[: shape[0], : shape[1]]
    wanted = jax.tree.leaves((trained, cut))
    for got, want in zip(jax.tree.leaves(ours), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS, ids=["layer", "rms"])
def test_examples_by_themselves_are_summed_over_no_axis_of_one(norm):
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}

    def pulled(x, pull):
        back = jax.vjp(lambda x: norm.apply({"params": params}, x), x[None])[1]
        return back(pull[None])

    x = jnp.ones((4, 5, 8))
    text = jax.jit(jax.vmap(pulled)).lower(x, x).as_text()
    summed = re.findall(r"stablehlo.reduce.*\(tensor<([\dx]*)xf32>", text)
    assert summed.count("4x5x8") >= 2, "the mean of squares, and the slope of it"
    assert not [shape for shape in summed if "x1x" in shape]


def test_nothing_but_axes_of_one_is_left_out():
    keep = lambda *shape: without_ones(jnp.zeros(shape)).shape
    assert keep(2, 3, 4) == (2, 3, 4)
    assert keep(1, 3, 4) == (3, 4)
    assert keep(2, 1, 3, 1) == (2, 3, 1), "the last one is summed along"
    assert keep(1, 1, 1) == (1,)
    assert without_ones(jnp.zeros((1, 1, 4)), last=2).shape == (1, 4)
    assert without_ones(jnp.zeros((2, 1, 4)), last=2).shape == (2, 1, 4)
    x = jnp.arange(6.0).reshape(2, 1, 3)
    np.testing.assert_array_equal(without_ones(x), x[:, 0])
