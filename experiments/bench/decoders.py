"""The project's own arms of `bench.decoder`: a training step, and generation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.factors import draw_factors, draw_tokens
from experiments.bench.setting import Setting
from experiments.bench.shapes import SHAPES
from lowrank.adapt.attach import Adapted, attach
from lowrank.adapt.rules import Rule
from lowrank.core.trees import count, flatten
from lowrank.cost.count import jaxpr_flops
from lowrank.deltas.lora import LoRA
from lowrank.io.adapter import Adapter, Correction, spread
from lowrank.io.language import Language
from lowrank.io.shapes import shaped
from lowrank.models.decoder import empty_cache
from lowrank.models.generation import generate
from lowrank.run.language import INPUTS
from lowrank.sharding.mesh import MeshSpec, batch_shapes, place_batch, replicate
from lowrank.train import state as states
from lowrank.train.losses import next_token
from lowrank.train.optim import AdamW
from lowrank.train.pack import Pack
from lowrank.train.step import make_step

SITES = "decoder/**/{query,key,value,output,gate,up,down,qkv}/kernel"
#: Steps of a schedule that never ends: the rate is constant.
NUM_STEPS = 100_000


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model of sequences reads of a batch."""
    return {name: batch[name] for name in INPUTS}


def batch_of(setting: Setting, vocab_size: int) -> dict[str, np.ndarray]:
    """Rows without padding; the last token of each is only ever a label."""
    ids = draw_tokens(setting, vocab_size)
    shape = ids.shape
    weight = np.ones(shape, np.float32)
    weight[:, -1] = 0
    batch = {
        "ids": ids,
        "label": np.roll(ids, -1, axis=1),
        "weight": weight,
        "mask": np.ones(shape, bool),
        "segments": np.zeros(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "index": np.arange(shape[0], dtype=np.int32),
    }
    return {name: np.ascontiguousarray(x)[None] for name, x in batch.items()}


def drawn(setting: Setting) -> Language:
    """A base of a shape of `bench.shapes` with random weights, made on the device."""
    name, dtype = SHAPES[setting.model], setting.dtype
    base = shaped(name, remat=setting.remat, dtype=dtype, weights=dtype)
    leaves, structure = flatten(base.params)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: Any, shape: tuple[int, ...]) -> Any:
        return 0.02 * jax.random.normal(key, shape, setting.dtype)

    keys = jax.random.split(jax.random.key(setting.seed), len(leaves))
    params = {
        path: jnp.ones(leaf.shape, setting.dtype)
        if path.endswith("scale")
        else normal(key, tuple(leaf.shape))
        for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }

    return dataclasses.replace(base, params=structure.unflatten(params))


class Product:
    """Square matrix products one after another: the most that a device can do."""

    #: Products of a step, and their width on an accelerator and elsewhere.
    COUNT, WIDE, SMALL = 16, 8192, 512

    def __init__(self, setting: Setting):
        width = self.WIDE if setting.device == "gpu" else self.SMALL
        self._x = jnp.full((width, width), 1 / width, setting.dtype)

        @jax.jit
        def many(x: Any) -> Any:
            # Each of them needs the one before it.
            return jax.lax.fori_loop(0, self.COUNT, lambda _, y: y @ x, x)

        self._many = many
        self.facts: Mapping[str, Any] = {
            "flops": None,
            "work": 2.0 * self.COUNT * width**3,
        }

    def step(self) -> float:
        return float(jax.block_until_ready(self._many(self._x))[0, 0])


def device_peak() -> int | None:
    """The most bytes an accelerator has held for this process; None where unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def corrected(setting: Setting, base: Language, batch: Mapping[str, Any]):
    """The adapted model and its factors, which are those of every arm."""
    example = inputs_of({name: value[0] for name, value in batch.items()})
    rules = [Rule(SITES, LoRA(alpha=setting.alpha), rank=setting.rank)]
    adapted = attach(base.scores, base.params, example, rules=rules)
    own = {}
    for path, site in adapted.sites.items():
        stacked = bool(site.stacks)
        for layer in range(site.num_layers):
            name = base.family.module(path, layer if stacked else None)
            a, b = draw_factors(setting, name, site.d_in, site.d_out)
            own[name] = Correction(a, b, setting.alpha / setting.rank)
    like = adapted.trained_shapes()
    trained, _ = spread(Adapter(own, {}), like, adapted.dials(), base.family.kernel)
    return adapted, trained


class Decoder:
    """A training step as the commands make it; see `bench.ours.PackOfOne`."""

    def __init__(self, setting: Setting, base: Language):
        self._batch = batch_of(setting, base.spec.vocab_size)
        adapted, trained = corrected(setting, base, self._batch)
        optim = AdamW(lr=setting.lr, clip=setting.clip, schedule="constant", warmup=0.0)
        mesh = MeshSpec().build()
        frozen = replicate(adapted.frozen(), mesh)

        def model(frozen, trained, batch, dials, key):
            own = inputs_of(batch)
            return adapted.apply(frozen, trained, own, dials=dials, key=key)

        state = states.start(
            adapted.init_trained, adapted.dials(), [optim], [setting.seed],
            adapted.leaves, roles=adapted.roles(),
        )  # fmt: skip
        state = state.replace(trained=jax.tree.map(lambda x: x[None], trained))
        step = make_step(
            model, next_token, optim, NUM_STEPS, adapted.draws, adapted.active,
            roles=adapted.roles(),
        )  # fmt: skip
        shapes = batch_shapes(self._batch, mesh, 1)
        self._state = replicate(state, mesh)
        self._pack = Pack(
            step, frozen, self._state, [shapes], lambda b: place_batch(b, mesh, 1), 1,
            mesh,
        )  # fmt: skip
        program = lambda: (self._pack.packed, frozen, self._state, shapes)
        self.facts: Mapping[str, Any] = {
            "flops": lambda: jaxpr_flops(*program()).flops,
            "compile_seconds": self._pack.compile_seconds,
            "num_trained": count(trained),
        }

        if setting.device == "gpu":
            self.peak_bytes = device_peak

    def step(self) -> float:
        self._state, metrics = self._pack(self._state, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"][0])


class Speaker:
    """Generation with merged weights, the likeliest token each time."""

    def __init__(self, setting: Setting, base: Language):
        batch = batch_of(setting, base.spec.vocab_size)
        adapted, trained = corrected(setting, base, batch)
        self._params = _merged(adapted, trained)
        prompts = {"ids": batch["ids"][0], "mask": batch["mask"][0]}
        self._prompts = jax.tree.map(jnp.asarray, prompts)
        # As with peers, who merge in place: the base's own weights are let go.
        read, shape, dtype = base.read, base.spec, base.dtype

        @jax.jit
        def said(params: Any, prompts: Any) -> Any:
            ids, _ = generate(
                lambda batch, cache: read(params, batch, cache),
                prompts,
                empty_cache(shape, setting.batch, 2 * setting.seq, dtype),
                steps=setting.seq,
                # No token ends a row: every arm says as many.
                end=jnp.zeros((0,), jnp.int32),
                pad=shape.pad_id,
            )
            return ids

        self._said = said
        self.facts: Mapping[str, Any] = {
            "flops": None,
            "compile_seconds": None,
            "num_trained": 0,
        }

    def step(self) -> float:
        return float(np.asarray(self._said(self._params, self._prompts))[:, 0].sum())


def _merged(adapted: Adapted, trained: Any) -> Any:
    return adapted.merge(adapted.frozen(), trained, adapted.dials())
