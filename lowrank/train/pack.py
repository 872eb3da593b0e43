"""A pack: trials that share one compiled step and one frozen base.

`vmap` runs over the trials' own state and data; the base has no trials axis, so it
is held once and its products serve all trials. A pack of one takes the axis off
instead: the program is then exactly the unbatched step. On a CPU, a few trials at a
time take turns within the step: see `ENTRIES_AT_ONCE`.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from lowrank.core.arrays import Frozen
from lowrank.core.memory import give_back
from lowrank.sharding.mesh import for_host, trial_axis
from lowrank.sharding.processes import rejoin
from lowrank.train.batches import entries_of, shape_of
from lowrank.train.ranks import RankEvents
from lowrank.train.state import TrainState

logger = logging.getLogger(__name__)

#: On a CPU, trials run side by side as long as their batches have no more entries
#: (tokens, or rows of numbers) together; beyond that they take turns within the
#: compiled step. So many make products large enough for all cores; more only make what
#: lies between the products outgrow the caches, and take longer (`make bench-sweep`).
ENTRIES_AT_ONCE = 1024
#: What the step does not read goes around it: no batching, no copies.
_UNTOUCHED = ("best", "best_value", "best_step", "ranks")


def over_trials(
    step: Callable,
    num_trials: int,
    spmd_axis: str | None = None,
    entries_at_once: int | None = None,
    ranks: RankEvents | None = None,
) -> Callable:
    """`step` for a whole pack: (frozen, state, batch) -> (state, metrics).

    Args:
      step: One trial's.
      num_trials: In the pack.
      spmd_axis: The mesh axis that the trials are split over, if there is one; what a
        model says about the sharding of its arrays then holds for each trial.
      entries_at_once: Trials take turns if their batches have more entries together,
        as many at a time as fit and divide the pack; None: all run side by side.
      ranks: How ranks move; None where none does. The step tells what they ask for.
    """
    tells = ranks is not None and bool(ranks.of_step)
    stepped = _stepped(step, num_trials, spmd_axis, entries_at_once, tells)
    if ranks is None:
        return stepped

    def over(function: Callable) -> Callable:
        """A function of one trial's trees for those of all trials."""
        if num_trials > 1:
            return jax.vmap(function, spmd_axis_name=spmd_axis)
        first = lambda x: x.reshape(x.shape[1:])
        return lambda *trees: jax.tree.map(
            lambda x: x[None], function(*jax.tree.map(first, trees))
        )

    def packed(frozen: Frozen, state: TrainState, batch: Mapping[str, Array]):
        state = ranks.before(state)
        due = ranks.measuring(state)
        after, metrics, *told = stepped(frozen, state, batch, jnp.any(due))
        seen = told[0] if told else {}
        due &= metrics["finite"]
        after = ranks.after(state, after, due, seen, frozen, batch, over)
        return after, {**metrics, **ranks.told(after)}

    return packed


def _stepped(
    step: Callable,
    num_trials: int,
    spmd_axis: str | None,
    entries_at_once: int | None,
    tells: bool,
) -> Callable:
    """The step of all trials, and nothing around it."""

    def packed(
        frozen: Frozen,
        state: TrainState,
        batch: Mapping[str, Array],
        measures: Array | None = None,
    ):
        # The same for all trials, so that it stays a choice between two programs: of
        # their own it would be both.
        whether = (measures,) if tells else ()
        fields = dict(vars(state))
        aside = {name: fields.pop(name) for name in _UNTOUCHED}

        def one(fields: dict[str, Any], batch: Mapping[str, Array]):
            whole = TrainState(**fields, **dict.fromkeys(_UNTOUCHED))
            after, *told = step(frozen, whole, batch, *whether)
            return {name: getattr(after, name) for name in fields}, *told

        at_once = side_by_side(entries_of(batch), num_trials, entries_at_once)
        if num_trials == 1:
            alone = _but_step(lambda x: x.reshape(x.shape[1:]), fields)
            one_batch = {name: x.reshape(x.shape[1:]) for name, x in batch.items()}
            moved, metrics, *told = one(alone, one_batch)
            moved = _but_step(lambda x: x[None], moved)
            metrics = {name: x[None] for name, x in metrics.items()}
            told = jax.tree.map(lambda x: x[None], told)
        elif at_once < num_trials:
            own = {name: value for name, value in fields.items() if name != "step"}
            turn = lambda given: one({"step": fields["step"], **given[0]}, given[1])
            moved, metrics, *told = in_turns(turn, (own, batch), at_once)
            moved["step"] = moved["step"][0]
        else:
            axes = {name: None if name == "step" else 0 for name in fields}
            out = (axes, 0, 0) if tells else (axes, 0)
            run = jax.vmap(
                one, in_axes=(axes, 0), out_axes=out, spmd_axis_name=spmd_axis
            )
            moved, metrics, *told = run(fields, batch)
        return TrainState(**moved, **aside), metrics, *told

    return packed


def side_by_side(entries: int, num_trials: int, most: int | None) -> int:
    """How many trials of a pack run at a time; the pack is a multiple of it.

    Args:
      entries: Of one trial's batch.
      num_trials: Of the pack.
      most: Entries at a time, as `most_entries` says; None: all trials run at once.
    """
    if most is None:
        return num_trials
    fit = max(most // max(entries, 1), 1)
    return max(n for n in range(1, num_trials + 1) if num_trials % n == 0 and n <= fit)


def most_entries(mesh: Mesh) -> int | None:
    """How many entries of trials' batches are worked on at a time; None: any number.

    Devices that share the trials out have few of them each, or are no CPUs.
    """
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return ENTRIES_AT_ONCE if alone else None


def in_turns(function: Callable, trials: Any, at_once: int) -> Any:
    """`function` of every trial, so many of them at a time."""
    # One by one, no axis of trials is left in the products.
    size = None if at_once == 1 else at_once
    return jax.lax.map(function, trials, batch_size=size)


def on_devices(
    step: Callable, num_trials: int, mesh: Mesh, ranks: RankEvents | None = None
) -> Callable:
    """`over_trials` as the mesh wants it."""
    axis = trial_axis(mesh)
    return over_trials(step, num_trials, axis, most_entries(mesh), ranks)


def jitted(packed: Callable, mesh: Mesh, state: TrainState) -> Any:
    """A pack's step to be lowered: the state is donated and comes out as it went in.

    Args:
      packed: The step of a whole pack.
      mesh: The devices.
      state: The state on them, or its shapes there.
    """
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(packed, donate_argnums=1, out_shardings=(where, for_host(mesh)))


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
        mesh: Mesh,
        ranks: RankEvents | None = None,
    ):
        """Compiles `step` for every batch in `shapes`.

        Args:
          step: One trial's step.
          frozen: The base, on its devices.
          state: The pack's state, for its shapes and shardings.
          shapes: One batch of shapes (with shardings) per bucket.
          put: Moves a host batch onto the devices.
          num_trials: Trials in the pack.
          mesh: Where the state lies, and the metrics that come out.
          ranks: How ranks move, if they do.
        """
        self._put = put
        self.frozen = frozen
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.shapes = {shape_of(batch): batch for batch in shapes}
        self.packed = on_devices(step, num_trials, mesh, ranks)
        program = jitted(self.packed, mesh, state)
        give_back()
        began = time.perf_counter()
        for key, batch in self.shapes.items():
            self.compiled[key] = program.lower(frozen, state, batch).compile()
            logger.info("compiled the step for batches of shape %s", key)
        self.compile_seconds = time.perf_counter() - began
        rejoin()
        give_back()

    def __call__(self, state: TrainState, batch: Mapping[str, np.ndarray]):
        """One step; `state` is donated."""
        return self.compiled[shape_of(batch)](self.frozen, state, self._put(batch))
