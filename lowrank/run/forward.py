"""Inference of a pack: compiled once per batch shape, all trials together."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.sharding.mesh import (
    batch_shapes,
    for_host,
    lay_rows,
    place_batch,
    trial_axis,
)
from lowrank.sharding.processes import rejoin
from lowrank.train.batches import entries_of
from lowrank.train.pack import in_turns, most_entries, side_by_side

#: (frozen, trained, batch, dials=, key=) -> outputs
Model = Callable[..., Any]
Batch = Mapping[str, np.ndarray]


class Forward:
    """What every trial makes of a batch that all trials share: logits, or scores.

    Attributes:
      compile_seconds: Time spent compiling so far.
      outputs: Shapes of what it gives, once something is compiled.
    """

    def __init__(self, model: Model, frozen: Frozen, mesh: Mesh):
        self._frozen = frozen
        self._mesh = mesh
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.outputs: Any = None

        def one(frozen: Frozen, trained: Trained, dials: Dials, batch: Mapping):
            return model(frozen, trained, batch, dials=dials, key=None)

        def infer(frozen: Frozen, trained: Trained, dials: Dials, batch: Mapping):
            num_trials = len(jax.tree.leaves(trained)[0])
            if num_trials == 1:
                first = lambda tree: jax.tree.map(lambda x: x[0], tree)
                alone = one(frozen, first(trained), first(dials), batch)
                return jax.tree.map(lambda x: x[None], alone)
            entries = entries_of(batch, of_a_pack=False)
            at_once = side_by_side(entries, num_trials, most_entries(mesh))
            if at_once < num_trials:
                # As in training, whose step is what the width of a pack is chosen by:
                # all at once, they would hold more than it.
                turn = lambda given: one(frozen, given[0], given[1], batch)
                return in_turns(turn, (trained, dials), at_once)
            every = jax.vmap(
                one, in_axes=(None, 0, 0, None), spmd_axis_name=trial_axis(mesh)
            )
            return every(frozen, trained, dials, batch)

        # Rows come together again; trials stay where they are until they are read.
        self._jitted = jax.jit(infer, out_shardings=for_host(mesh))

    def compile(self, trained: Trained, dials: Dials, batches: Sequence[Batch]) -> None:
        """Compiles for the shapes of `batches` that are new."""
        new = {_key(batch): batch for batch in batches}
        new = {key: batch for key, batch in new.items() if key not in self._compiled}
        if not new:
            return
        began = time.perf_counter()
        for key, batch in new.items():
            shapes = batch_shapes(batch, self._mesh, 0)
            lowered = self._jitted.lower(self._frozen, trained, dials, shapes)
            self._compiled[key] = lowered.compile()
            self.outputs = lowered.out_info
        self.compile_seconds += time.perf_counter() - began
        rejoin()

    def __call__(self, trained: Trained, dials: Dials, batch: Batch) -> Any:
        """The model's outputs, trials first."""
        self.compile(trained, dials, [batch])
        placed = place_batch(batch, self._mesh, 0)
        return self._compiled[_key(batch)](self._frozen, trained, dials, placed)


def _key(batch: Batch) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes: batches of new texts, say, have no labels."""
    return tuple((name, batch[name].shape) for name in sorted(batch))


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder takes of a batch: of pairs, which text a token belongs to too."""
    names = ("ids", "mask", "type_ids", "pixels")
    return {name: batch[name] for name in names if name in batch}


def on_inputs(
    apply: Callable[..., Any],
    inputs: Callable[[Mapping], Any],
    mesh: Mesh | None = None,
) -> Model:
    """An adapted model that takes whole batches and picks its inputs from them.

    Args:
      apply: `Adapted.apply`.
      inputs: What the model reads of a batch.
      mesh: Devices that may share its weights; rows then stay split, see `lay_rows`.
    """

    def model(frozen, trained, batch, dials, key):
        given = inputs(batch)
        lay = mesh and lay_rows(mesh, _num_rows(given))
        # Only where it says something: other functions have no such argument.
        laid = {} if lay is None else {"lay": lay}
        return apply(frozen, trained, given, dials=dials, key=key, **laid)

    return model


def _num_rows(given: Any) -> int:
    """Rows of what a model is given: the first axis of its first array."""
    return next((x.shape[0] for x in jax.tree.leaves(given) if x.ndim), 0)
