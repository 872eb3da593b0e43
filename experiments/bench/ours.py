"""The project's own arms: low-rank and full fine-tuning, through the training path.

What is timed is what `lowrank.run.fit` does between two batches: the host batch goes
to its devices, the compiled step of a pack of one runs, guard and metrics included.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.setting import Setting, draw_batch, draw_start
from lowrank.adapt.attach import Adapted, attach
from lowrank.adapt.rules import AnyRule, Rule, Train
from lowrank.allocate.adaptive import Allocator
from lowrank.allocate.fixed import Uniform
from lowrank.core.arrays import Trained
from lowrank.core.trees import count, flatten
from lowrank.cost.count import Product, jaxpr_flops, jaxpr_products
from lowrank.deltas.lora import LoRA
from lowrank.io.hub import Base
from lowrank.models.encoder import EncoderSpec
from lowrank.sharding.mesh import MeshSpec, batch_shapes, place_batch, replicate
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import Pack
from lowrank.train.step import make_step

SITES = "**/{query,key,value,output,up,down}/kernel"
#: Steps of a schedule that never ends: the rate is constant.
NUM_STEPS = 100_000


def lora(setting: Setting, base: Base) -> "PackOfOne":
    """Corrections of every linear map, and the head trained whole."""
    delta = LoRA(alpha=setting.alpha)
    rules = [Train(base.head), Rule(SITES, delta, rank=setting.rank)]
    return PackOfOne(setting, base, rules)


def full(setting: Setting, base: Base) -> "PackOfOne":
    """Every weight trained."""
    return PackOfOne(setting, base, [Train("**")])


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the encoder takes of a batch."""
    return {"ids": batch["ids"], "mask": batch["mask"]}


def attached(
    setting: Setting, base: Base, rules: Sequence[AnyRule]
) -> tuple[Adapted, Trained, dict[str, Any]]:
    """The adapted model, its trained tree at the common start, and the host batch."""
    assert isinstance(base.spec, EncoderSpec)
    shape = base.spec
    batch = draw_batch(setting, shape.vocab_size)
    example = inputs_of({name: value[0] for name, value in batch.items()})
    adapted = attach(base.apply, base.params, example, rules=rules)
    start = draw_start(setting, shape.num_layers, shape.d_model, shape.d_ff)
    whole, _ = flatten(base.params)
    trained = dict(adapted.trained_shapes())
    for path in trained:
        parent, _, leaf = path.rpartition("/")
        name = parent.rpartition("/")[2]
        if name == "head":
            trained[path] = start["head"][leaf]
        elif path in adapted.sites:
            trained[path] = start[name]
        else:
            # A copy, since the step donates what it trains.
            trained[path] = jnp.array(whole[path], copy=True)
    return adapted, trained, batch


def choosing(setting: Setting, base: Base, rank: int, ranks: Allocator) -> "PackOfOne":
    """As `lora`, and an allocator brings its components down to `rank` per layer."""
    delta = LoRA(alpha=setting.alpha)
    rules = [Train(base.head), Rule(SITES, delta, rank=rank, max_rank=setting.rank)]
    return PackOfOne(setting, base, rules, ranks)


class PackOfOne:
    """An arm that trains one trial as the commands do."""

    def __init__(
        self,
        setting: Setting,
        base: Base,
        rules: Sequence[AnyRule],
        ranks: Allocator = Uniform(),
    ):
        adapted, trained, self._batch = attached(setting, base, rules)
        optim = AdamW(lr=setting.lr, clip=setting.clip, schedule="constant", warmup=0.0)
        mesh = MeshSpec().build()
        frozen = replicate(adapted.frozen(), mesh)

        def model(frozen, trained, batch, dials, key):
            return adapted.apply(
                frozen, trained, inputs_of(batch), dials=dials, key=key
            )

        moving, dials = None, None
        if ranks != Uniform():
            # An arm holds what its step needs, as its peers do: here all that makes a
            # run, records and their libraries included, would come along.
            from lowrank.run.ranks import begun, gauges

            measured = gauges(model, cross_entropy)
            moving, dials = begun(adapted, [ranks], None, None, NUM_STEPS, measured)
        aged = moving is not None and moving.births
        state = states.start(
            adapted.init_trained, dials or adapted.dials(), [optim], [setting.seed],
            adapted.leaves, roles=adapted.roles(), ages=aged,
            ranks=moving.begin if moving else lambda trained: {},
        )  # fmt: skip
        state = state.replace(trained=jax.tree.map(lambda x: x[None], trained))
        step = make_step(
            model, cross_entropy, optim, NUM_STEPS, adapted.draws, adapted.active,
            roles=adapted.roles(), ages=aged,
            tells=moving.of_step if moving else (),
        )  # fmt: skip
        shapes = batch_shapes(self._batch, mesh, 1)
        self._state = replicate(state, mesh)
        self._pack = Pack(
            step, frozen, self._state, [shapes], lambda b: place_batch(b, mesh, 1), 1,
            mesh, moving,
        )  # fmt: skip
        (compiled,) = self._pack.compiled.values()
        # The state of the moment: the one before it was donated.
        self._program = lambda: (self._pack.packed, frozen, self._state, shapes)
        self.facts: Mapping[str, Any] = {
            "flops": lambda: jaxpr_flops(*self._program()).flops,
            "compile_seconds": self._pack.compile_seconds,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "num_trained": count(trained),
        }

    def products(self) -> dict[Product, int]:
        """The matrix products of a step, and how often each runs."""
        return jaxpr_products(*self._program())

    def step(self) -> float:
        self._state, metrics = self._pack(self._state, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"][0])
