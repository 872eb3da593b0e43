"""More programs: every primitive that a model may put between a weight and its use."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from programs import X, program


def convolve(x, w, *, dims=2, **options):
    names = ("NHWC", "HWIO", "NHWC") if dims == 2 else None
    names = names or {1: ("NWC", "WIO", "NWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}[dims]
    options = {"window_strides": (1,) * dims, "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=names, **options)


@program({"w": (3, 4, 6)}, (2, 7, 4))
def conv_along_a_line(p, x):
    return convolve(x, p["w"], dims=1, window_strides=(2,))


@program({"w": (3, 2, 2, 6)}, (2, 5, 6, 4))
def conv_in_groups(p, x):
    return convolve(x, p["w"], feature_group_count=2, rhs_dilation=(2, 1))


@program({"w": (3, 3, 1, 8)}, (2, 5, 5, 4))
def conv_depthwise(p, x):
    return convolve(x, p["w"], feature_group_count=4, padding="VALID")


@program({"w": (2, 2, 2, 3, 4)}, (1, 3, 4, 3, 3))
def conv_in_space(p, x):
    return convolve(x, p["w"], dims=3, lhs_dilation=(2, 1, 1), padding=[(1, 1)] * 3)


@program({"w": (6, 4, 3, 3)}, (2, 4, 5, 5))
def conv_channels_first(p, x):
    return lax.conv(x, p["w"], (2, 1), "SAME")


@program({"w": (4, 6)}, (2, 5, 5, 4))
def dense_as_a_conv(p, x):
    return convolve(x, p["w"][None, None])


@program({"w": (2, 3, 4, 4)}, (2, 7, 4))
def convs_in_a_scan(p, x):
    return lax.scan(lambda c, w: (jnp.sin(convolve(c, w, dims=1)), None), x, p["w"])[0]


@program({"w": (4, 3, 4, 6)}, (4, 2, 7, 4))
def convs_mapped_over_experts(p, x):
    return jax.vmap(lambda x, w: convolve(x, w, dims=1))(x, p["w"])


@program({"w": (6, 8)}, X)
def slices_of_both_axes(p, x):
    y = x[:, 1:4] @ p["w"][1:4, ::2]
    return y, x[:, :2] @ p["w"][4:, 3:7]


@program({"w": (6, 24)}, X)
def fused_then_split_before(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.sin(x @ q) * (x @ k) + x @ v


@program({"w": (6, 24)}, X)
def fused_then_split_after(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=1)
    return jnp.sin(q) * k + v


@program({"q": (6, 4), "k": (6, 8), "v": (6, 4)}, X)
def fused_by_concatenation(p, x):
    return x @ jnp.concatenate([p["q"], p["k"], 2 * p["v"]], axis=1)


@program({"q": (3, 8), "v": (3, 8)}, X)
def concatenated_inputs(p, x):
    w = jnp.concatenate([p["q"], p["v"]]).T.reshape(2, 4, 6)
    return jnp.einsum("bi,hki->bhk", x, w)


@program({"q": (6, 4), "v": (6, 4)}, X)
def stacked_and_batched(p, x):
    both = jnp.stack([p["q"], p["v"]])
    return jnp.einsum("bi,eio->ebo", x, both), jnp.stack([x, x]) @ both


@program({"q": (6, 4), "v": (6, 3), "c": (6, 3)}, X)
def partly_frozen_concatenation(p, x):
    w = jnp.concatenate([p["c"], p["q"], p["v"]], axis=1)
    left, right = w[:, :5], w[:, 5:]
    return x @ left, (x * 0.5) @ (right / jnp.arange(1.0, 6.0)[None])


@program({"q": (3, 6, 3), "v": (3, 6, 3)}, X)
def concatenated_then_scanned(p, x):
    w = jnp.concatenate([p["q"], p["v"]], axis=2)
    return lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, w)[0]


@program({"w": (6, 8)}, X)
def scaled_by_numbers(p, x):
    return x @ (-p["w"] * 0.5) + x @ (p["w"] / 3)


@program({"w": (6, 8), "g": (8,), "h": (6,)}, X)
def scaled_along_axes(p, x):
    w = p["w"] * p["g"][None]
    return x @ w, x @ (jnp.exp(p["h"])[:, None] * p["w"])


@program({"w": (3, 6, 6), "g": (3, 1, 6)}, X)
def scaled_layers(p, x):
    layer = lambda c, w: (jnp.sin(c @ w.T), None)
    return lax.scan(layer, x, p["w"] * p["g"])[0]


@program({"w": (3, 6, 6)}, X)
def layers_picked_by_number(p, x):
    return jnp.sin(jnp.sin(x @ p["w"][2]) @ p["w"][-3]) @ p["w"][1]


@program({"w": (3, 6, 6)}, X)
def layers_picked_in_a_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ p["w"][i]), x)


@program({"w": (3, 6, 6)}, X)
def a_part_of_the_layers_backwards(p, x):
    return lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, p["w"][::-1][:2])[0]


@program({"w": (6, 8)}, X)
def rows_reversed(p, x):
    return x @ p["w"][::-1] + x @ p["w"][:, ::-1]


@program({"w": (12, 6)}, (3, 6))
def blocks_of_rows_scanned(p, x):
    def step(c, w):
        return c + x @ w, None

    return lax.scan(step, jnp.zeros_like(x), p["w"].reshape(2, 6, 6))[0]


@program({"w": (6, 8)}, (4, 3, 6))
def repeated_for_a_batch(p, x):
    w = jnp.broadcast_to(p["w"], (4, 6, 8))
    return jnp.einsum("bti,bio->bto", x, w), jnp.einsum("ti,bio->bto", x[0], w)


@program({"w": (6, 8)}, (3, 4, 6))
def repeated_and_summed(p, x):
    w = jnp.broadcast_to(p["w"][:, None], (6, 4, 8))
    return jnp.einsum("tbi,ibo->to", x, w)


@program({"w": (6, 6), "v": (6, 6)}, X)
def branches(p, x):
    y = lax.cond(x[0, 0] > 9, lambda w, v: x @ w @ v, lambda w, v: x @ w.T, *p.values())
    turns = [lambda v: y @ v, lambda v: y - jnp.sin(y @ v.T), lambda v: y]
    return lax.switch(1, turns, p["v"]) + y @ p["w"]


@program({"w": (3, 6, 6)}, X)
def branches_in_a_scan(p, x):
    def step(c, given):
        i, w = given
        return lax.cond(i % 2 == 0, lambda: jnp.sin(c @ w), lambda: c @ w.T), None

    return lax.scan(step, x, (jnp.arange(3), p["w"]))[0]


@program({"q": (4, 8), "w": (8, 6)}, ("ids", 4, 5))
def scanned_head(p, ids):
    rows = p["q"][ids]
    step = jax.checkpoint(lambda c, row: (jnp.sin(c + row @ p["w"]), c))
    return lax.scan(step, jnp.zeros(6, rows.dtype), rows)


@program({"w": (11, 6)}, ("ids", 4, 5))
def rows_looked_up_one_by_one(p, ids):
    return jax.vmap(lambda i: jnp.sin(p["w"][i]))(ids) @ p["w"].T


@program({"w": (6, 11)}, ("ids", 4, 5))
def columns_looked_up_one_by_one(p, ids):
    return jax.vmap(lambda i: jnp.sin(p["w"][:, i]))(ids) @ p["w"]


@program({"w": (3, 4, 6)}, (7, 4))
def rows_sorted_by_expert(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([2, 0, 4]))


@program({"w": (3, 6, 4)}, (7, 4))
def rows_sorted_by_transposed_expert(p, x):
    sizes = jnp.array([3, 1, 3])
    return lax.ragged_dot(x, jnp.swapaxes(p["w"], 1, 2), sizes)


@program({"w": (2, 3, 6, 6), "v": (2, 3, 6, 6)}, (7, 6))
def layers_of_experts(p, x):
    sizes = jnp.array([2, 4, 1])

    def layer(c, given):
        w, v = given
        return jnp.sin(
            lax.ragged_dot(jnp.sin(lax.ragged_dot(c, w, sizes)), v, sizes)
        ), 0

    return lax.scan(layer, x, (p["w"], p["v"]))[0]


@program({"w": (4, 6, 8)}, (4, 3, 6))
def mapped_over_weights(p, x):
    return jax.vmap(lambda w, x: jnp.sin(x @ w) @ w.T)(p["w"], x)


@program({"w": (6, 8)}, (2, 6))
def inside_shard_map(p, x):
    mesh = jax.make_mesh(
        (2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def local(x, w):
        y = jnp.sin(x @ w)
        return lax.psum(y @ w.T, "m")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P("d"), P(None, "m")), out_specs=P("d")
    )(x, p["w"])


FROZEN = {
    "partly_frozen_concatenation": ("c",), "scaled_along_axes": ("g", "h"),
    "scaled_layers": ("g",),
}  # fmt: skip
