"""What the rewritten program does not do: form dense deltas, or cost more than LoRA."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA

# Primes, so that a shape in the program's text can only be what it seems to be.
D_IN, D_OUT, ROWS, LAYERS, TRIALS, RANK = 13, 17, 5, 3, 7, 2
#: FLOPs are counted in the program as it will run.
OPTIMIZED = True
#: Operations that hand an array on; everything else makes a new one.
CARRIERS = {
    "while", "dynamic_slice", "slice", "reshape", "transpose", "convert", "call",
    "return", "optimization_barrier", "broadcast_in_dim", "func",
}  # fmt: skip
TYPE = re.compile(r"tensor<((?:\d+x)+)\w+>")


def dense_results(text):
    """Operations of a lowered program whose result is as large as a weight."""
    found = []
    for line in text.splitlines():
        operation = re.search(r"= \"?(?:stablehlo|func)?\.?(\w+)", line)
        if operation is None or operation[1] in CARRIERS:
            continue
        result = line.rsplit("->", 1)[-1] if "->" in line else line.rsplit(":", 1)[-1]
        for dims in TYPE.findall(result):
            shape = {int(n) for n in dims.split("x") if n}
            if {D_IN, D_OUT} <= shape:
                found.append(f"{operation[1]}: {dims}")
    return found


def trial_sized(text):
    """Arrays that hold a weight once per trial, made by whatever operation."""
    shapes = ([int(n) for n in d.split("x") if n] for d in TYPE.findall(text))
    return [shape for shape in shapes if {TRIALS, D_IN, D_OUT} <= set(shape)]


def listed(params, x):
    return jnp.sin(jnp.sin(x @ params["w"]) @ params["v"])


def scanned(params, x):
    step = lambda c, layer: (jnp.sin(jnp.sin(c @ layer["w"]) @ layer["v"]), None)
    return lax.scan(step, x, params)[0]


def rematerialized(params, x):
    step = jax.checkpoint(
        lambda c, layer: (jnp.sin(jnp.sin(c @ layer["w"]) @ layer["v"]), None),
        prevent_cse=False,
    )
    return lax.scan(step, x, params)[0]


def tied(params, x):
    """The table `w` is looked up by row, and used transposed as the head."""
    rows = params["w"][jnp.arange(ROWS)]
    return jnp.sin(rows @ params["w"].T @ params["v"].T)


def built(apply):
    stack = () if apply in (listed, tied) else (LAYERS,)
    shapes = {"w": (*stack, D_IN, D_OUT), "v": (*stack, D_OUT, D_IN)}
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    params, x = oracle.filled(shapes, 0), jnp.ones((ROWS, D_IN))
    adapted = attach(apply, params, x, rules=[Rule("*", LoRA(), rank=RANK)])
    trained, dials = oracle.loud(adapted, 1)

    def factored(trained, dials, frozen, x):
        return jnp.sum(adapted.apply(frozen, trained, x, dials=dials) ** 2)

    def dense(trained, dials, frozen, x):
        return jnp.sum(
            apply(oracle.merged(jnp, adapted, frozen, trained, dials), x) ** 2
        )

    return factored, dense, (trained, dials, params, x)


def per_trial(tree):
    return jax.tree.map(lambda x: jnp.stack([x] * TRIALS), tree)


@pytest.mark.parametrize("apply", [listed, scanned, rematerialized, tied])
def test_no_dense_delta_is_formed(apply):
    factored, dense, given = built(apply)
    text = lambda loss: jax.jit(jax.grad(loss)).lower(*given).as_text()
    assert dense_results(text(factored)) == []
    assert dense_results(text(dense)), "the search itself is blind"


@pytest.mark.parametrize("apply", [listed, scanned, rematerialized, tied])
def test_no_trial_holds_a_weight_of_its_own(apply):
    factored, dense, (trained, dials, params, x) = built(apply)
    given = (per_trial(trained), per_trial(dials), params, x)

    def text(loss):
        step = jax.vmap(jax.grad(loss), in_axes=(0, 0, None, None))
        return jax.jit(step).lower(*given).as_text()

    assert trial_sized(text(factored)) == []
    assert dense_results(text(factored)) == []
    assert trial_sized(text(dense)), "the search itself is blind"


def by_hand(trained, dials, frozen, x):
    """LoRA as one would write it into the model."""

    def layer(x, name):
        f, d = trained[name], dials[name]
        u = (x @ f["a"].T) * (d["gate"] * d["scale"])[None]
        return jnp.sin(x @ frozen[name] + u @ f["b"])

    return jnp.sum(layer(layer(x, "w"), "v") ** 2)


def flops(loss, given):
    compiled = jax.jit(jax.grad(loss)).lower(*given).compile()
    return compiled.cost_analysis()["flops"]


def test_flops_equal_lora_written_by_hand():
    factored, dense, given = built(listed)
    hand = flops(by_hand, given)
    assert flops(factored, given) == pytest.approx(hand, rel=0.01)
    assert flops(dense, given) > 1.01 * hand
    np.testing.assert_allclose(factored(*given), by_hand(*given), rtol=1e-5)


def test_flops_per_rank_are_what_the_compiler_counts():
    apply = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.ones((D_IN, D_OUT))}, jnp.ones((ROWS, D_IN))

    def forward(rank):
        adapted = attach(apply, params, x, rules=[Rule("w", LoRA(), rank=rank)])
        given = (adapted.frozen(), *oracle.loud(adapted, 1))
        run = lambda f, t, d: adapted.apply(f, t, x, dials=d)
        cost = jax.jit(run).lower(*given).compile().cost_analysis()
        return cost["flops"], adapted.sites["w"].flops_per_rank

    (small, per_rank), (large, _) = forward(2), forward(10)
    assert math.isclose((large - small) / 8, per_rank, rel_tol=0.1)


def test_other_dials_ranks_and_values_do_not_compile_again():
    calls = []

    def apply(params, x):
        calls.append(None)
        return scanned(params, x)

    shapes = {"w": (LAYERS, D_IN, D_OUT), "v": (LAYERS, D_OUT, D_IN)}
    params = {k: jnp.full(s, 0.1) for k, s in shapes.items()}
    x = jnp.ones((ROWS, D_IN))
    rules = [Rule("*", LoRA(), rank=RANK, max_rank=4)]
    adapted = attach(apply, params, x, rules=rules)
    frozen, trained = adapted.init(jax.random.key(0))
    run = jax.jit(lambda f, t, x, d: adapted.apply(f, t, x, dials=d))
    traced = len(calls)
    dials = adapted.dials()
    for rank in (0, 1, 4):
        gate = jnp.broadcast_to((jnp.arange(4) < rank)[None], (LAYERS, 4))
        changed = {**dials["w"], "gate": gate * 1.0, "scale": jnp.float32(rank)}
        run(frozen, trained, x * rank, {**dials, "w": changed})
    assert run._cache_size() == 1
    assert len(calls) == traced, "the model is traced once per input shape"
    adapted.apply(frozen, trained, jnp.ones((ROWS + 1, D_IN)))
    assert len(calls) == traced + 1
