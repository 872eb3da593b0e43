"""The hand-written derivative of the low-rank product is the derivative."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.deltas.product import Numerics, Subscripts, lowrank

#: Subscripts, shapes of x, lo and hi, and the axes of u in which the gate is held.
CASES = {
    "rows": ("bsi ri bsr ro bso", "r"),
    "per example": ("bsi ri bsr ro bso", "br"),
    "per token": ("bsi ri bsr ro bso", "bsr"),
    "shared by all": ("bsi ri bsr ro bso", ""),
    "two contracted": ("bshk rhk bsr ro bso", "r"),
    "two produced": ("bi ri br rhk bhk", "br"),
    "experts": ("ebi eri ebr ero ebo", "er"),
    "experts, shared input": ("bi eri ber ero beo", "er"),
    "experts, summed": ("bei eri ber ero bo", "er"),
    "single row": ("i ri r ro o", "r"),
}
SIZES = {"b": 3, "s": 2, "i": 5, "o": 7, "r": 4, "h": 2, "k": 3, "e": 2}
FLOAT32 = Numerics("float32", jax.lax.Precision.HIGHEST)


def operands(case, dtype=np.float32):
    text, held = CASES[case]
    subscripts = Subscripts(*text.split())
    rng = np.random.default_rng(0)
    shape = lambda axes: tuple(SIZES[c] for c in axes)
    arrays = [
        rng.normal(size=shape(axes))
        for axes in (subscripts.x, subscripts.lo, subscripts.hi)
    ]
    gate = rng.normal(size=[SIZES[c] if c in held else 1 for c in subscripts.u])
    weights = rng.normal(size=shape(subscripts.y))
    return subscripts, [jnp.asarray(v, dtype) for v in (*arrays, gate, weights)]


def naive(s, x, lo, hi, gate):
    u = jnp.einsum(f"{s.x},{s.lo}->{s.u}", x, lo, precision="highest")
    return jnp.einsum(f"{s.u},{s.hi}->{s.y}", u * gate, hi, precision="highest")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_autodiff(case):
    subscripts, (*given, weights) = operands(case)

    def graded(fn):
        loss = lambda *v: jnp.sum(weights * fn(*v))
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*given)

    def both():
        ours = graded(lambda *v: lowrank(*v, subscripts, FLOAT32))
        return ours, graded(lambda *v: naive(subscripts, *v))

    options = {"xla_backend_optimization_level": 0}
    ours, expected = jax.jit(both, compiler_options=options)()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        scale = max(float(jnp.abs(b).max()), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale)


def test_gradients_equal_finite_differences_in_float64():
    code = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "import numpy as np, jax.numpy as jnp, test_product as t\n"
        "from lowrank.deltas.product import Numerics, lowrank\n"
        "rng = np.random.default_rng(1)\n"
        "for case in t.CASES:\n"
        "    s, (*given, w) = t.operands(case, np.float64)\n"
        "    f = jax.jit(lambda v: jnp.sum(w*lowrank(*v, s, Numerics('float64'))))\n"
        "    g = jax.grad(f)(given)\n"
        "    for i, v in enumerate(given):\n"
        "        d = rng.normal(size=v.shape)\n"
        "        move = lambda h: [*given[:i], v + h * d, *given[i + 1:]]\n"
        "        slope = (f(move(1e-4)) - f(move(-1e-4))) / 2e-4\n"
        "        ours = jnp.sum(g[i] * d)\n"
        "        assert abs(slope - ours) <= 1e-8 * max(1, abs(slope)), (case, i)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_low_precision_inputs_keep_factors_and_their_gradients_wide():
    subscripts, (x, lo, hi, gate, _) = operands("rows")
    x = x.astype(jnp.bfloat16)
    numerics = Numerics("bfloat16")
    loss = lambda *v: jnp.sum(lowrank(*v, subscripts, numerics).astype(jnp.float32))
    assert lowrank(x, lo, hi, gate, subscripts, numerics).dtype == jnp.bfloat16
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(x, lo, hi, gate)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] + 3 * [jnp.float32]
    exact = lambda *v: jnp.sum(naive(subscripts, *v))
    expected = jax.grad(exact, argnums=(0, 1, 2, 3))(
        x.astype(jnp.float32), lo, hi, gate
    )
    for a, b in zip(gradients, expected, strict=True):
        error = jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
        assert error < 0.03


def test_a_shut_gate_gives_zero_and_exactly_zero_gradients():
    subscripts, (x, lo, hi, _, weights) = operands("rows")
    gate = jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 4)
    loss = lambda lo, hi: jnp.sum(
        weights * lowrank(x, lo, hi, gate, subscripts, FLOAT32)
    )
    for gradient in jax.grad(loss, argnums=(0, 1))(lo, hi):
        assert not jnp.any(gradient[1::2])
        assert jnp.all(jnp.any(gradient[::2], axis=1))


def test_only_the_input_and_the_thin_activation_are_kept():
    subscripts, (x, lo, hi, gate, _) = operands("rows")
    _, pull = jax.vjp(lambda *v: lowrank(*v, subscripts, FLOAT32), x, lo, hi, gate)
    kept = sorted(v.shape for v in jax.tree.leaves(pull) if hasattr(v, "shape"))
    thin = (*x.shape[:-1], lo.shape[0])
    assert kept == sorted([x.shape, thin, lo.shape, hi.shape, gate.shape])
