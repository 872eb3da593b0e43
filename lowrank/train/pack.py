"""A pack: trials that share one compiled step and one frozen base.

`vmap` runs over the trials' own state and data; the base has no trials axis, so it
is held once and its products serve all trials. A pack of one takes the axis off
instead: the program is then exactly the unbatched step.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lowrank.core.arrays import Frozen
from lowrank.core.memory import give_back
from lowrank.train.state import TrainState

logger = logging.getLogger(__name__)

#: What the step does not read goes around it: no batching, no copies.
_UNTOUCHED = ("best", "best_value", "best_step")


def over_trials(step: Callable, num_trials: int) -> Callable:
    """`step` for a whole pack: (frozen, state, batch) -> (state, metrics)."""

    def packed(frozen: Frozen, state: TrainState, batch: Mapping[str, Array]):
        fields = dict(vars(state))
        aside = {name: fields.pop(name) for name in _UNTOUCHED}

        def one(fields: dict[str, Any], batch: Mapping[str, Array]):
            whole = TrainState(**fields, **dict.fromkeys(_UNTOUCHED))
            after, metrics = step(frozen, whole, batch)
            return {name: getattr(after, name) for name in fields}, metrics

        if num_trials == 1:
            alone = _but_step(lambda x: x.reshape(x.shape[1:]), fields)
            one_batch = {name: x.reshape(x.shape[1:]) for name, x in batch.items()}
            moved, metrics = one(alone, one_batch)
            moved = _but_step(lambda x: x[None], moved)
            metrics = {name: x[None] for name, x in metrics.items()}
        else:
            axes = {name: None if name == "step" else 0 for name in fields}
            run = jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0))
            moved, metrics = run(fields, batch)
        return TrainState(**moved, **aside), metrics

    return packed


def jitted(packed: Callable, sharding: jax.sharding.Sharding) -> Any:
    """A pack's step to be lowered: the state is donated and comes out as it went in."""
    return jax.jit(packed, donate_argnums=1, out_shardings=sharding)


def _but_step(change: Callable[[Array], Array], fields: Mapping[str, Any]):
    """Every array changed but the step counter, which all trials share."""
    return {
        name: value if name == "step" else jax.tree.map(change, value)
        for name, value in fields.items()
    }


class Pack:
    """Compiled steps of a pack, one per batch shape, all made before step 0.

    Attributes:
      compile_seconds: Time to trace, lower and compile them all.
      compiled: {(batch, seq): executable}, for reading costs.
      shapes: {(batch, seq): the batch's shapes}.
      packed: The step of the whole pack, as it was compiled.
    """

    def __init__(
        self,
        step: Callable,
        frozen: Frozen,
        state: TrainState,
        shapes: Sequence[Mapping[str, jax.ShapeDtypeStruct]],
        put: Callable[[Mapping[str, np.ndarray]], Mapping[str, Array]],
        num_trials: int,
        sharding: jax.sharding.Sharding,
    ):
        """Compiles `step` for every batch in `shapes`.

        Args:
          step: One trial's step.
          frozen: The base, on its devices.
          state: The pack's state, for its shapes and shardings.
          shapes: One batch of shapes (with shardings) per bucket.
          put: Moves a host batch onto the devices.
          num_trials: Trials in the pack.
          sharding: Of the state and the metrics that come out; the state's own, so
            that its buffers are reused.
        """
        self._put = put
        self.frozen = frozen
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.shapes = {_key(batch): batch for batch in shapes}
        self.packed = over_trials(step, num_trials)
        program = jitted(self.packed, sharding)
        give_back()
        began = time.perf_counter()
        for key, batch in self.shapes.items():
            self.compiled[key] = program.lower(frozen, state, batch).compile()
            logger.info("compiled the step for batches of shape %s", key)
        self.compile_seconds = time.perf_counter() - began
        give_back()

    def __call__(self, state: TrainState, batch: Mapping[str, np.ndarray]):
        """One step; `state` is donated."""
        return self.compiled[_key(batch)](self.frozen, state, self._put(batch))


def _key(batch: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(batch["ids"].shape[1:])
