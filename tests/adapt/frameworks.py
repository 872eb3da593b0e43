"""The same small language model in every framework, as its users write it.

Embedding, then layers of attention, convolution, a general or plain linear map and an
einsum, then a head and the tied embedding; layers unrolled or stacked and scanned, with
or without remat, in float32 or with float32 weights and bfloat16 arithmetic. Nothing
here knows that it will be adapted.
"""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lowrank.adapt.nnx import from_nnx

WIDTH, HEADS, HIDDEN, VOCABULARY, LAYERS, CLASSES = 8, 2, 12, 11, 2, 4
IDS = jnp.array([[1, 4, 2, 9], [0, 3, 3, 7]])


class LinenLayer(nn.Module):
    dtype: object

    @nn.compact
    def __call__(self, x, _):
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        attend = nn.MultiHeadDotProductAttention(HEADS, dtype=self.dtype, name="att")
        x = x + attend(norm(name="before")(x))
        x = x + nn.Conv(WIDTH, (3,), dtype=self.dtype, name="conv")(x)
        up = nn.DenseGeneral((3, 4), dtype=self.dtype, name="up")
        down = nn.Einsum((3, 4, WIDTH), "btij,ijd->btd", dtype=self.dtype, name="down")
        x = x + down(nn.gelu(up(norm(name="between")(x))))
        return x + 0.3 * nn.Dense(WIDTH, dtype=self.dtype, name="skip")(x), None


class LinenModel(nn.Module):
    scan: bool
    remat: bool
    dtype: object

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype, name="embed")
        x, layer = embed(ids), LinenLayer
        if self.remat:
            layer = nn.remat(layer, prevent_cse=False)
        if self.scan:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = stack(self.dtype, name="layers")(x, None)
        else:
            for index in range(LAYERS):
                x, _ = layer(self.dtype, name=f"layer_{index}")(x, None)
        head = nn.Dense(CLASSES, dtype=self.dtype, name="head")
        return head(x), embed.attend(x)


def linen(scan, remat, dtype):
    model = LinenModel(scan, remat, dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return lambda params, ids: model.apply({"params": params}, ids), shapes


class NnxLayer(nnx.Module):
    def __init__(self, dtype, rngs):
        own = {"dtype": dtype, "rngs": rngs}
        self.before = nnx.LayerNorm(WIDTH, **own)
        self.att = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, **own)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), **own)
        self.up = nnx.LinearGeneral(WIDTH, (3, 4), **own)
        self.down = nnx.Einsum("btij,ijd->btd", (3, 4, WIDTH), **own)
        self.skip = nnx.Linear(WIDTH, WIDTH, **own)

    def __call__(self, x):
        x = x + self.att(self.before(x))
        x = x + self.conv(x)
        return x + self.down(nnx.gelu(self.up(x))) + 0.3 * self.skip(x)


class NnxModel(nnx.Module):
    def __init__(self, scan, remat, dtype, rngs):
        self.scan, self.remat = scan, remat
        self.embed = nnx.Embed(VOCABULARY, WIDTH, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, dtype=dtype, rngs=rngs)
        make = lambda rngs: NnxLayer(dtype, rngs)
        if scan:
            keys = jax.random.split(rngs.params(), LAYERS)
            self.layers = nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List([make(rngs) for _ in range(LAYERS)])

    def __call__(self, ids):
        x = self.embed(ids)
        step = lambda x, layer: layer(x)
        step = nnx.remat(step) if self.remat else step
        if self.scan:
            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        else:
            for layer in self.layers:
                x = step(x, layer)
        return self.head(x), self.embed.attend(x)


def in_nnx(scan, remat, dtype):
    make = lambda: NnxModel(scan, remat, dtype, nnx.Rngs(0))
    return from_nnx(nnx.eval_shape(make))


def haiku(scan, remat, dtype):
    def layer(x):
        norm = lambda name: hk.LayerNorm(-1, True, True, name=name)
        init = hk.initializers.VarianceScaling()
        attend = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init, name="att")
        h = norm("before")(x)
        x = x + attend(h, h, h)
        x = x + hk.Conv1D(WIDTH, 3, name="conv")(x)
        h = jax.nn.gelu(hk.Linear(HIDDEN, name="up")(norm("between")(x)))
        return x + hk.Linear(WIDTH, name="down")(h)

    def model(ids):
        embed = hk.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(ids)
        step = hk.remat(layer) if remat else layer
        if scan:
            x = hk.experimental.layer_stack(LAYERS, name="layers")(step)(x)
        else:
            for index in range(LAYERS):
                with hk.experimental.name_scope(f"layer_{index}"):
                    x = step(x)
        return hk.Linear(CLASSES, name="head")(x), x @ embed.embeddings.T

    apply, init = hk.without_apply_rng(hk.transform(model)).apply, hk.transform(model)
    shapes = jax.eval_shape(init.init, jax.random.key(0), IDS)
    return lambda params, ids: apply(cast(params, dtype), ids), shapes


class EquinoxLayer(eqx.Module):
    before: eqx.nn.LayerNorm
    att: eqx.nn.MultiheadAttention
    conv: eqx.nn.Conv1d
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.before = eqx.nn.LayerNorm(WIDTH)
        self.att = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.conv = eqx.nn.Conv1d(WIDTH, WIDTH, 3, padding=1, key=keys[1])
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, key=keys[2])
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, key=keys[3])

    def __call__(self, x):
        h = jax.vmap(self.before)(x)
        x = x + self.att(h, h, h)
        x = x + self.conv(x.T).T
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    layers: object
    head: eqx.nn.Linear
    scan: bool = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(self, scan, remat, key):
        keys = jax.random.split(key, LAYERS + 2)
        self.scan, self.remat = scan, remat
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=keys[1])
        if scan:
            self.layers = eqx.filter_vmap(EquinoxLayer)(keys[2:])
        else:
            self.layers = [EquinoxLayer(key) for key in keys[2:]]

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        call = lambda layer, x: layer(x)
        call = eqx.filter_checkpoint(call) if self.remat else call
        if self.scan:
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            step = lambda x, own: (call(eqx.combine(own, static), x), None)
            x, _ = lax.scan(step, x, arrays)
        else:
            for layer in self.layers:
                x = call(layer, x)
        return jax.vmap(self.head)(x), x @ self.embed.weight.T


def equinox(scan, remat, dtype):
    model = eqx.filter_eval_shape(EquinoxModel, scan, remat, jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))

    def apply(params, ids):
        return jax.vmap(eqx.combine(cast(params, dtype), static))(ids)

    return apply, params


def plain(scan, remat, dtype):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    one = {
        "qkv": (WIDTH, 3 * WIDTH), "out": (HEADS, WIDTH // HEADS, WIDTH),
        "conv": (3, WIDTH, WIDTH), "up": (WIDTH, 2, HIDDEN), "down": (HIDDEN, WIDTH),
    }  # fmt: skip
    lead = (LAYERS,) if scan else ()
    layer_shapes = {name: shape(*lead, *sizes) for name, sizes in one.items()}
    shapes = {
        "embed": shape(VOCABULARY, WIDTH),
        "layers": layer_shapes if scan else [layer_shapes] * LAYERS,
        "head": shape(WIDTH, CLASSES),
    }

    def layer(x, p):
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        heads = lambda y: y.reshape(*y.shape[:-1], HEADS, -1)
        q, k, v = heads(q), heads(k), heads(v)
        y = jax.nn.dot_product_attention(q, k, v)
        x = x + jnp.einsum("bthd,hdo->bto", y, p["out"])
        x = x + lax.conv_general_dilated(
            x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        gate, up = jnp.moveaxis(jnp.einsum("bti,igh->btgh", x, p["up"]), 2, 0)
        return x + (jax.nn.silu(gate) * up) @ p["down"], None

    def apply(params, ids):
        params = cast(params, dtype)
        x = params["embed"][ids]
        step = jax.checkpoint(layer) if remat else layer
        if scan:
            x, _ = lax.scan(step, x, params["layers"])
        else:
            for own in params["layers"]:
                x, _ = step(x, own)
        return x @ params["head"], x @ params["embed"].T

    return apply, shapes


def cast(params, dtype):
    """Float32 weights, arithmetic in `dtype`: mixed precision as it is written."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


BUILDERS = {
    "linen": linen,
    "nnx": in_nnx,
    "haiku": haiku,
    "equinox": equinox,
    "plain": plain,
}
