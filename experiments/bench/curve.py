"""Time per trial-step against the width of a pack, in one process, turn about."""

import time
from typing import Any

import jax
import numpy as np

from experiments.bench.ours import NUM_STEPS, SITES
from experiments.bench.setting import Setting, draw_batch
from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.core.memory import give_back
from lowrank.deltas.lora import LoRA
from lowrank.io.hub import Base
from lowrank.models.encoder import EncoderSpec
from lowrank.run.forward import inputs_of, on_inputs
from lowrank.sharding.mesh import MeshSpec, batch_shapes, place_batch, replicate
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import Pack
from lowrank.train.step import make_step


class Packed:
    """A pack of equal trials that differ in seed and learning rate."""

    def __init__(self, setting: Setting, base: Base, num_trials: int):
        assert isinstance(base.spec, EncoderSpec)
        one = draw_batch(setting, base.spec.vocab_size)
        self._batch = {
            name: np.repeat(value, num_trials, axis=0) for name, value in one.items()
        }
        example = inputs_of({name: value[0] for name, value in one.items()})
        delta = LoRA(alpha=setting.alpha)
        rules = [Train(base.head), Rule(SITES, delta, rank=setting.rank)]
        adapted = attach(base.apply, base.params, example, rules=rules)
        optims = [
            AdamW(lr=setting.lr * 2**-n, schedule="constant", warmup=0.0)
            for n in range(num_trials)
        ]
        mesh = MeshSpec().build()
        frozen = replicate(adapted.frozen(), mesh)
        state = states.start(
            adapted.init_trained, adapted.dials(), optims, range(num_trials),
            adapted.leaves,
        )  # fmt: skip
        self._state = replicate(state, mesh)
        step = make_step(
            on_inputs(adapted.apply, inputs_of), cross_entropy, optims[0], NUM_STEPS,
            adapted.draws, adapted.active,
        )  # fmt: skip
        self._pack = Pack(
            step, frozen, self._state, [batch_shapes(self._batch, mesh, 1)],
            lambda b: place_batch(b, mesh, 1), num_trials, mesh,
        )  # fmt: skip
        (compiled,) = self._pack.compiled.values()
        self.facts = {
            "compile_seconds": self._pack.compile_seconds,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }

    def step(self) -> np.ndarray:
        """One step of all trials, to its very end; the losses."""
        self._state, metrics = self._pack(self._state, self._batch)
        jax.block_until_ready(self._state)
        return np.asarray(metrics["loss"])


def curve(
    setting: Setting, base: Base, widths: tuple[int, ...], steps: int, turns: int
) -> dict[str, Any]:
    """Seconds per trial-step of packs of several widths.

    Every turn takes `steps / turns` steps of every width, after one that is not
    timed; every other turn goes backwards.

    Returns:
      {width: {"seconds": per trial-step, "losses": after the first step, ...}}.
    """
    packs = {width: Packed(setting, base, width) for width in widths}
    found: dict[str, Any] = {
        str(width): {"seconds": [], "losses": pack.step().tolist(), **pack.facts}
        for width, pack in packs.items()
    }
    for turn in range(turns):
        for width in list(widths)[:: -1 if turn % 2 else 1]:
            packs[width].step()
            for _ in range(max(steps // turns, 1)):
                began = time.perf_counter()
                packs[width].step()
                seconds = (time.perf_counter() - began) / width
                found[str(width)]["seconds"].append(seconds)
    packs.clear()
    give_back()
    return found
