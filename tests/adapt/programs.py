"""Programs that use weights in every way the walk must follow, smallest first.

Each is (apply, shapes of the weights, shapes of the inputs); an input shape of
integers written as ("ids", n, *shape) is drawn below n. Dims are small and outputs
unsaturated, so that rounding stays far below the tolerances.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

PROGRAMS = {}


def program(params, *inputs):
    def add(fn):
        PROGRAMS[fn.__name__] = (fn, params, inputs)
        return fn

    return add


def made(name, dtype=np.float32):
    """(apply, params, inputs) of a program, always the same numbers."""
    fn, shapes, inputs = PROGRAMS[name]
    rng = np.random.default_rng(7)
    params = {
        key: jnp.asarray(rng.normal(0, 0.4, shape), dtype)
        for key, shape in shapes.items()
    }
    values = tuple(
        jnp.asarray(rng.integers(0, shape[1], shape[2:]), jnp.int32)
        if shape and shape[0] == "ids"
        else jnp.asarray(rng.normal(0, 0.7, shape), dtype)
        for shape in inputs
    )
    return fn, params, values


X = (3, 6)


@program({"w": (6, 8)}, X)
def product(p, x):
    return x @ p["w"]


@program({"w": (8, 6)}, X)
def transposed_weight(p, x):
    return p["w"] @ x.T


@program({"w": (6, 8)}, X)
def weight_on_the_left(p, x):
    return p["w"].T @ x.T


@program({"w": (6, 8)}, (6,))
def single_vector(p, x):
    return x @ p["w"]


@program({"w": (2, 3, 8)}, (4, 2, 3))
def two_contracted_axes(p, x):
    return jnp.einsum("bhk,hkd->bd", x, p["w"])


@program({"w": (6, 2, 4)}, (3, 5, 6))
def two_output_axes(p, x):
    return jnp.einsum("bsd,dhk->bshk", x, p["w"])


@program({"w": (4, 6, 2)}, (3, 2, 4))
def contracted_axes_apart(p, x):
    return jnp.einsum("bki,idk->bd", x, p["w"])


@program({"w": (3, 6, 8)}, (3, 5, 6))
def batched_experts(p, x):
    return jnp.einsum("ebd,edf->ebf", x, p["w"])


@program({"w": (3, 6, 8)}, (5, 6))
def experts_sharing_inputs(p, x):
    return jnp.einsum("bd,edf->bef", x, p["w"])


@program({"w": (3, 6, 8)}, (5, 3, 6))
def contracted_stack(p, x):
    return jnp.einsum("tef,efd->td", x, p["w"])


@program({"w": (6, 8)}, (3, 2, 4))
def heads_split_by_reshape(p, x):
    return jnp.einsum("bhk,dhk->bhd", x, p["w"].reshape(6, 2, 4))


@program({"w": (11, 6)}, ("ids", 11, 3, 4))
def tied_embedding(p, ids):
    x = p["w"][ids]
    return jnp.tanh(x) @ p["w"].T


@program({"w": (6, 11)}, ("ids", 11, 5))
def lookup_along_last_axis(p, ids):
    return jnp.take(p["w"], ids, axis=1)


@program({"w": (11, 2, 3)}, ("ids", 11, 5))
def lookup_of_matrices(p, ids):
    return jnp.take(p["w"], ids, axis=0)


@program({"w": (6, 8), "v": (8, 6)}, X)
def rearranged(p, x):
    w = p["w"].reshape(2, 3, 2, 4).transpose(2, 3, 0, 1).reshape(8, 6)
    v = jnp.swapaxes(p["v"][None], 1, 2)[0]
    return w @ x.T + (x @ v.T.reshape(8, 6).T).T


@program({"w": (6, 8)}, X)
def axes_of_size_one(p, x):
    return jnp.einsum("bud,udo->bo", x[:, None], p["w"][None])


@program({"w": (6, 8)}, X)
def axis_of_size_one_in_output(p, x):
    return jnp.einsum("bd,udo->bou", x, p["w"][None])


@program({"w": (6, 8)}, X)
def behind_barrier_and_names(p, x):
    w, x = lax.optimization_barrier((p["w"], x))
    return x @ checkpoint_name(w, "w")


@program({"w": (6, 6)}, X)
def inside_jit(p, x):
    inner = jax.jit(lambda w, x: jax.jit(jnp.tanh)(x @ w))
    return inner(p["w"], inner(p["w"], x))


@jax.custom_jvp
def _soft(w, x):
    return jnp.sin(x @ w)


@_soft.defjvp
def _soft_jvp(primals, tangents):
    return jax.jvp(lambda w, x: jnp.sin(x @ w), primals, tangents)


@program({"w": (6, 8)}, X)
def inside_custom_jvp(p, x):
    return _soft(p["w"], x)


@jax.custom_vjp
def _hard(w, x):
    return jnp.cos(x @ w)


_hard.defvjp(
    lambda w, x: (jnp.cos(x @ w), (w, x)),
    lambda kept, g: jax.vjp(lambda w, x: jnp.cos(x @ w), *kept)[1](g),
)


@program({"w": (6, 8)}, X)
def inside_custom_vjp(p, x):
    return _hard(p["w"], x)


@program({"w": (6, 6)}, X)
def held_by_scan(p, x):
    step = lambda c, _: (jnp.sin(c @ p["w"]), c)
    return lax.scan(step, x, None, length=3)


@program({"w": (4, 6, 6)}, X)
def scanned(p, x):
    return lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, p["w"])[0]


@program({"w": (4, 6, 6)}, X)
def scanned_backwards(p, x):
    step = lambda c, w: (jnp.sin(c @ w.T), c.sum())
    return lax.scan(step, x, p["w"], reverse=True, unroll=2)


@program({"w": (6, 4, 6)}, X)
def stack_on_another_axis(p, x):
    w = jnp.moveaxis(p["w"], 1, 0)
    return lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, w)[0]


@program({"w": (6, 6, 6), "v": (2, 6, 6), "u": (6, 6)}, X)
def nested_scans(p, x):
    def outer(c, given):
        group, v = given
        inner = lambda c, w: (jnp.sin(c @ w + c @ p["u"]), None)
        return jnp.sin(lax.scan(inner, c, group)[0] @ v), None

    return lax.scan(outer, x, (p["w"].reshape(2, 3, 6, 6), p["v"]))[0]


@program({"w": (6, 6)}, X)
def carried_unchanged(p, x):
    step = lambda c, _: ((c[0], jnp.sin(c[1] @ c[0])), None)
    return lax.scan(step, (p["w"], x), None, length=3)[0][1]


@program({"w": (6, 6)}, X)
def counted_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ p["w"]) + 0.1 * i, x)


@program({"w": (4, 6, 6)}, X)
def two_scans_of_one_stack(p, x):
    step = lambda c, w: (jnp.sin(c @ w), None)
    return lax.scan(step, lax.scan(step, x, p["w"])[0], p["w"])[0]


@program({"w": (6, 6), "v": (3, 6, 6)}, X)
def rematerialized(p, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    once = jax.checkpoint(lambda x, w: jnp.sin(x @ w), policy=policy)
    step = jax.checkpoint(lambda c, v: (once(c, v), None), prevent_cse=False)
    return lax.scan(step, once(x, p["w"]), p["v"])[0]


@program({"w": (6, 8)}, (5, 6))
def mapped_over_examples(p, x):
    return jax.vmap(lambda row: jnp.sin(row @ p["w"]))(x)


@program({"q": (4, 6), "w": (6, 8)}, (3, 8))
def meets_a_frozen_weight(p, x):
    return x @ (p["q"] @ p["w"]).T


@program({"w": (6, 8)}, X)
def several_outputs(p, x):
    y = x @ p["w"]
    return {"y": y, "top": y.argmax(-1), "norm": jnp.sum(y**2)}


#: Weights of a program that the rules leave alone.
FROZEN = {"meets_a_frozen_weight": ("q",)}
#: Uses whose rounding differs by design are not among the programs; see test_inject.
names = functools.partial(sorted, PROGRAMS)
