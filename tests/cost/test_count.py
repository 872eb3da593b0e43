"""Counts come from shapes alone, and loops count as often as they run."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lowrank.core.errors import BadInput
from lowrank.cost.count import (
    count_parameters,
    jaxpr_flops,
    jaxpr_products,
    lora_flops,
    lora_flops_per_token,
    lora_parameters,
)

shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)

BATCH, WIDTH, LAYERS = 5, 7, 11
PRODUCT = 2 * BATCH * WIDTH * WIDTH


def stack(w, x, body=lambda c, w: (jnp.tanh(c @ w), None)):
    return lax.scan(body, x, w)[0].sum()


STACK = (shape(LAYERS, WIDTH, WIDTH), shape(BATCH, WIDTH))


def test_parameters_and_bytes_are_those_of_the_shapes():
    frozen = {"layer/kernel": shape(3, 5), "embed": shape(10, 3, dtype=jnp.bfloat16)}
    trained = {
        "layer/kernel": {"a": shape(2, 3), "b": shape(2, 5)},
        "head/kernel": shape(5, 4, dtype=jnp.float16),
    }
    got = count_parameters(frozen, trained)
    assert got.parameters_per_site == {"layer/kernel": 16, "head/kernel": 20}
    assert got.trained_parameters == 36
    assert got.total_parameters == 36 + 15 + 30
    assert got.adapter_bytes == 16 * 4 + 20 * 2
    assert got.base_bytes == 15 * 4 + 30 * 2


def test_closed_components_do_not_count():
    frozen = {"layer/kernel": shape(4, 3, 5)}
    trained = {
        "layer/kernel": {"a": shape(4, 2, 3), "b": shape(4, 2, 5, dtype=jnp.bfloat16)},
        "head/kernel": shape(5, 4),
    }
    # Three of the eight components are closed.
    padding = {"layer/kernel": {"a": 3 * 3, "b": 3 * 5}}
    got = count_parameters(frozen, trained, padding)
    assert got.parameters_per_site == {"layer/kernel": 5 * 8, "head/kernel": 20}
    assert got.trained_parameters == 60
    assert got.total_parameters == 60 + 60
    assert got.adapter_bytes == 5 * 3 * 4 + 5 * 5 * 2 + 20 * 4
    assert got.padding_parameters == 24


def test_a_weight_is_not_counted_twice():
    with pytest.raises(BadInput, match=r"'head'.*twice"):
        count_parameters({"head": shape(3, 5)}, {"head": shape(3, 5)})


def test_a_correction_costs_what_its_program_costs():
    tokens, d_in, d_out, rank = 13, 7, 5, 3
    correct = lambda x, a, b: (x @ a.T) @ b
    args = (shape(tokens, d_in), shape(rank, d_in), shape(rank, d_out))
    forward = tokens * lora_flops(d_in, d_out, rank)
    assert jaxpr_flops(correct, *args).flops == forward
    total = jax.grad(lambda *args: (correct(*args) ** 2).sum(), argnums=(0, 1, 2))
    assert jaxpr_flops(total, *args).flops == 3 * forward
    assert lora_parameters(d_in, d_out, rank) == rank * (d_in + d_out)
    shapes = {"q": (7, 5), "v": (7, 7)}
    assert lora_flops_per_token(shapes, {"q": 2, "v": 1}) == {"q": 48, "v": 28}
    with pytest.raises(BadInput, match=r"'k'.*Nearest: 'q'"):
        lora_flops_per_token({"q": (7, 5)}, {"k": 2})


def test_a_product_costs_two_for_each_multiplication():
    product = lambda x, w: jnp.einsum("bhsd,bhtd->bhst", x, w)
    got = jaxpr_flops(product, shape(2, 3, 5, 7), shape(2, 3, 11, 7))
    assert got.flops == 2 * (2 * 3 * 5 * 11 * 7)
    assert got.per_primitive == {"dot_general": got.flops}
    assert got.exact


def test_a_scan_counts_as_often_as_it_runs_and_the_compiler_counts_it_once():
    got = jaxpr_flops(jax.jit(stack), *STACK)
    assert got.flops == LAYERS * PRODUCT
    compiled = jax.jit(stack).lower(*STACK).compile()
    assert compiled.cost_analysis()["flops"] < 3 * PRODUCT


def test_products_are_told_apart_and_counted():
    """A scan's by its length; what no output needs is none."""

    def program(w, x):
        x @ jnp.ones((WIDTH, 3))
        nothing = x @ jnp.ones((WIDTH, 0)) @ jnp.ones((0, WIDTH))
        x, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)
        return (x @ w[0] + nothing) @ jnp.ones((WIDTH, 2))

    found = jaxpr_products(jax.jit(program), *STACK)
    assert {p.rhs.shape: n for p, n in found.items()} == {
        (WIDTH, WIDTH): LAYERS + 1,
        (WIDTH, 2): 1,
    }
    total = sum(n * product.flops for product, n in found.items())
    assert total == jaxpr_flops(program, *STACK).flops


def test_scans_within_scans_and_batches_multiply():
    twice = lambda w, x: lax.fori_loop(0, 3, lambda _, x: x + stack(w, x), x)
    assert jaxpr_flops(twice, *STACK).flops == 3 * LAYERS * PRODUCT
    trials = jax.vmap(stack, in_axes=(None, 0))
    got = jaxpr_flops(trials, STACK[0], shape(4, BATCH, WIDTH))
    assert got.flops == 4 * LAYERS * PRODUCT


@pytest.mark.parametrize(
    ("wrap", "products"),
    [
        # Forward, gradient of the input, gradient of the weight; a remat does the
        # forward once more.
        (lambda body: body, 3),
        (jax.checkpoint, 4),
    ],
)
def test_a_remat_counts_what_it_computes_again(wrap, products):
    body = wrap(lambda c, w: (jnp.tanh(c @ w), None))
    step = jax.jit(jax.value_and_grad(lambda w, x: stack(w, x, body), argnums=(0, 1)))
    assert jaxpr_flops(step, *STACK).flops == products * LAYERS * PRODUCT


def test_custom_derivatives_count_by_what_they_do():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    # Twice the work in the backward pass that autodiff would do for w, none for x.
    back = lambda kept, g: (
        kept[0] * 0,
        0.5 * (kept[0].T @ g) + 0.5 * (g.T @ kept[0]).T,
    )
    product.defvjp(lambda x, w: (x @ w, (x, w)), back)
    args = (shape(BATCH, WIDTH), shape(WIDTH, WIDTH))
    assert jaxpr_flops(product, *args).flops == PRODUCT
    both = jax.value_and_grad(lambda w, x: product(x, w).sum())
    assert jaxpr_flops(both, *args[::-1]).flops == 3 * PRODUCT


def test_the_dearest_branch_counts():
    branches = (lambda x: x, lambda x: x @ x, lambda x: x @ x @ x)
    switch = lambda at, x: lax.switch(at, branches, x)
    got = jaxpr_flops(switch, shape(dtype=jnp.int32), shape(WIDTH, WIDTH))
    assert got.flops == 2 * 2 * WIDTH**3


def test_loops_of_unknown_length_count_once_and_are_told():
    loop = lambda x: lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)
    got = jaxpr_flops(loop, shape(WIDTH, WIDTH))
    assert (got.flops, got.unbounded, got.exact) == (2 * WIDTH**3, 1, False)
    idle = lambda x: lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x + 1, x)
    assert jaxpr_flops(idle, shape(WIDTH, WIDTH)).exact


def test_what_is_not_counted_is_named():
    got = jaxpr_flops(lambda x: jnp.linalg.qr(x)[0] @ x, shape(4, 4))
    assert got.flops == 2 * 4**3
    assert "geqrf" in got.uncounted or "qr" in got.uncounted
    assert not got.exact


def test_what_no_output_needs_does_not_count():
    def wasteful(w, x):
        body = lambda c, w: ((c[0] @ w, c[1] @ w), c[0] @ w)
        return lax.scan(body, (x, x), w)[0][0]

    assert jaxpr_flops(wasteful, *STACK).flops == LAYERS * PRODUCT


def test_constants_and_plain_functions_will_do():
    table = jnp.ones((WIDTH, 3))
    got = jaxpr_flops(lambda x, *, scale: scale * (x @ table), STACK[1], scale=2.0)
    assert got.flops == 2 * BATCH * WIDTH * 3


@pytest.mark.parametrize("padding", [[(1, 2), (0, 1)], [(0, 0), (0, 0)]])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_a_convolution_costs_what_the_compiler_says(padding, groups, dilation):
    def convolve(x, k):
        return lax.conv_general_dilated(
            x, k, (2, 1), padding, lhs_dilation=dilation[::-1], rhs_dilation=dilation,
            feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    args = (shape(3, 9, 8, 4), shape(3, 2, 4 // groups, 6))
    lowered = jax.jit(convolve).lower(*args)
    assert jaxpr_flops(convolve, *args).flops == lowered.cost_analysis()["flops"]


def test_rows_of_a_ragged_product_meet_one_group_each():
    got = jaxpr_flops(
        lax.ragged_dot, shape(6, 4), shape(2, 4, 5), shape(2, dtype=jnp.int32)
    )
    assert got.flops == 2 * 6 * 4 * 5


def test_all_devices_count():
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    local = lambda x, w: x @ w
    specs = (spec, jax.sharding.PartitionSpec())
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec)
    args = (shape(8, WIDTH), shape(WIDTH, WIDTH))
    assert jaxpr_flops(split, *args).flops == jaxpr_flops(local, *args).flops


def test_a_linear_solve_counts_its_solution_only():
    def solve(a, b):
        back = lambda _, v: a.T @ v
        return lax.custom_linear_solve(
            lambda v: a @ v, b, back, transpose_solve=lambda _, v: a @ (a @ v)
        )

    got = jaxpr_flops(solve, shape(WIDTH, WIDTH), shape(WIDTH))
    assert got.flops == 2 * WIDTH**2
