"""The same step written by hand: plain functions, no modules, no injection, no pack.

This is what a competent person would write for this one model and this one method,
and the yardstick for what the project's generality costs. Of the project it borrows
the exact GELU with its own derivative, so that the arms differ in how the correction
gets into the program and in nothing else.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from experiments.bench.setting import MAPS, Arm, Setting, draw_batch, draw_start
from lowrank.core.trees import count
from lowrank.cost.count import jaxpr_flops
from lowrank.cost.measure import compiled_cost
from lowrank.io.hub import Base
from lowrank.models.blocks import gelu
from lowrank.models.encoder import EncoderSpec

#: (x, a, b) -> (x a^T) b
Product = Callable[[Array, Array, Array], Array]


def plain(
    x: Float[Array, "batch seq d_in"],
    a: Float[Array, "rank d_in"],
    b: Float[Array, "rank d_out"],
) -> Float[Array, "batch seq d_out"]:
    """(x a^T) b, differentiated by JAX."""
    return (x @ a.T) @ b


@jax.custom_vjp
def thin(
    x: Float[Array, "batch seq d_in"],
    a: Float[Array, "rank d_in"],
    b: Float[Array, "rank d_out"],
) -> Float[Array, "batch seq d_out"]:
    """(x a^T) b; the gradients of a and b transpose the thin operand only."""
    return (x @ a.T) @ b


def _thin_forward(x: Array, a: Array, b: Array):
    u = x @ a.T
    return u @ b, (x, u, a, b)


def _thin_backward(kept: tuple[Array, ...], dy: Array):
    x, u, a, b = kept
    du = dy @ b.T
    da = jnp.einsum("nsr,nsi->ri", du, x)
    db = jnp.einsum("nsr,nso->ro", u, dy)
    return du @ a, da, db


thin.defvjp(_thin_forward, _thin_backward)


def weights_of(base: Base) -> dict[str, Any]:
    """The frozen weights: embeddings, and one stacked array per weight of a layer."""
    encoder = base.params["encoder"]
    layer = encoder["layer"]
    return {
        "embeddings": encoder["embeddings"],
        "layers": {
            **{name: layer["attention"][name] for name in MAPS[:4]},
            **{name: layer["mlp"][name] for name in MAPS[4:]},
            "norm_1": layer["attention"]["norm"],
            "norm_2": layer["mlp"]["norm"],
        },
    }


def norm(p: Mapping[str, Array], x: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis."""
    x = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True)
    scale, bias = p["scale"][None, None], p["bias"][None, None]
    return x * lax.rsqrt(variance + epsilon) * scale + bias


def logits(
    shape: EncoderSpec,
    product: Product,
    scale: float,
    frozen: Mapping[str, Any],
    trained: Mapping[str, Any],
    ids: Array,
    mask: Array,
) -> Float[Array, "batch classes"]:
    """The encoder with corrections, mean pooling and the head."""
    table = frozen["embeddings"]
    x = table["word"]["embedding"][ids]
    x += table["position"]["embedding"][None, : ids.shape[1]]
    x += table["token_type"]["embedding"][None, :1]
    x = norm(table["norm"], x, shape.norm_eps)
    bias = jnp.where(mask, 0.0, -1e30)[:, None, None, :]
    d_head = shape.d_model // shape.num_heads

    def layer(x: Array, weights: tuple[Any, Any]) -> tuple[Array, None]:
        w, factors = weights

        def linear(name: str, x: Array) -> Array:
            f = factors[name]
            y = x @ w[name]["kernel"] + w[name]["bias"][None, None]
            return y + product(x, f["a"], f["b"] * scale)

        def heads(name: str) -> Array:
            y = linear(name, x).reshape(*x.shape[:2], shape.num_heads, d_head)
            return y.transpose(0, 2, 1, 3)

        query = heads("query") * d_head**-0.5
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, heads("key"))
        attention = jax.nn.softmax(scores + bias, axis=-1)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", attention, heads("value"))
        mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(w["norm_1"], x + linear("output", mixed), shape.norm_eps)
        hidden = linear("down", gelu(linear("up", x)))
        return norm(w["norm_2"], x + hidden, shape.norm_eps), None

    factors = {name: trained[name] for name in MAPS}
    x, _ = lax.scan(layer, x, (frozen["layers"], factors))
    real = mask[:, :, None].astype(x.dtype)
    pooled = (x * real).sum(axis=1) / real.sum(axis=1)
    return pooled @ trained["head"]["kernel"] + trained["head"]["bias"][None]


def mean_loss(
    trained: Any, frozen: Any, batch: Mapping[str, Array], forward: Callable
) -> Array:
    """Mean cross-entropy."""
    log_p = jax.nn.log_softmax(forward(frozen, trained, batch["ids"], batch["mask"]))
    return -jnp.take_along_axis(log_p, batch["label"][:, None], axis=-1).mean()


def objective(setting: Setting, base: Base, product: Product):
    """`loss(trained, frozen, batch)` and its arguments at the common start."""
    assert isinstance(base.spec, EncoderSpec)
    shape = base.spec
    scale = setting.alpha / setting.rank
    forward = functools.partial(logits, shape, product, scale)
    start = draw_start(setting, shape.num_layers, shape.d_model, shape.d_ff)
    batch = draw_batch(setting, shape.vocab_size)
    wanted = {name: batch[name][0] for name in ("ids", "mask", "label")}
    loss = functools.partial(mean_loss, forward=forward)
    return loss, (jax.tree.map(jnp.asarray, start), weights_of(base), wanted)


class HandWritten:
    """An arm around one jitted function."""

    def __init__(self, setting: Setting, base: Base, product: Product):
        loss, (trained, self._frozen, self._batch) = objective(setting, base, product)
        tx = optax.chain(
            optax.clip_by_global_norm(setting.clip), optax.adam(setting.lr)
        )

        def step(trained: Any, opt: Any, frozen: Any, batch: Any):
            value, grads = jax.value_and_grad(loss)(trained, frozen, batch)
            updates, opt = tx.update(grads, opt, trained)
            return optax.apply_updates(trained, updates), opt, value

        self._state = trained, tx.init(trained)
        args = (*self._state, self._frozen, self._batch)
        began = time.perf_counter()
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
        self.facts: Mapping[str, Any] = {
            "flops": lambda: jaxpr_flops(step, *args).flops,
            "compile_seconds": time.perf_counter() - began,
            "temp_bytes": compiled_cost(self._step)["temp_bytes"],
            "num_trained": count(trained),
        }

    def step(self) -> float:
        *state, value = self._step(*self._state, self._frozen, self._batch)
        self._state = jax.block_until_ready(tuple(state))
        return float(value)


def by_hand(setting: Setting, base: Base) -> Arm:
    """The low-rank product with its derivative written by hand."""
    return HandWritten(setting, base, thin)


def by_autodiff(setting: Setting, base: Base) -> Arm:
    """The low-rank product as papers write it, left to automatic differentiation."""
    return HandWritten(setting, base, plain)
