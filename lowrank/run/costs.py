"""The cost ledger of a run: what the compiled programs and the clock say."""

import functools
from typing import Any

import jax

from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.cost.count import Flops, jaxpr_flops
from lowrank.cost.measure import CostLedger, compiled_cost, latency
from lowrank.run.fit import Fit
from lowrank.run.prepare import Prepared, sizes
from lowrank.train.batches import TrainBatches

#: Timed calls per inference figure.
REPEATS = 10


class Ledgers:
    """The cost ledgers of a pack's trials; the step is counted and timed once."""

    def __init__(self, batches: TrainBatches, fitted: Fit):
        self._batches = batches
        self._fitted = fitted
        self._inference: dict[Any, dict[str, Any]] = {}

    def of(self, prepared: Prepared, trained: Trained, dials: Dials) -> dict[str, Any]:
        """Everything that was measured for one trial, ready for `costs.json`.

        The step's FLOPs and bytes are the pack's, for the largest batch shape; every
        shape's own figures stand under "shapes". A process that had nothing left to
        train has no step figures.
        """
        known: dict[str, Any] = {
            "counts": sizes(prepared.adapted, dials),
            "num_trials": len(self._fitted.ended),
        }
        # Of several processes, none has the whole of the base to time it.
        if prepared.settings.evaluate.latency and jax.process_count() == 1:
            known["inference"] = self._timed(prepared, trained, dials)
        if self._fitted.pack is None:
            return {**CostLedger.gather(**known).json(), "shapes": {}}
        found = CostLedger.gather(**known, **self._step)
        return {**found.json(), "shapes": self._shapes}

    @functools.cached_property
    def _counted(self) -> dict[tuple[int, ...], Flops]:
        fitted, pack = self._fitted, self._fitted.pack
        assert pack is not None
        return {
            shape: jaxpr_flops(pack.packed, fitted.frozen, fitted.state, batch)
            for shape, batch in pack.shapes.items()
        }

    @functools.cached_property
    def _step(self) -> dict[str, Any]:
        fitted, pack = self._fitted, self._fitted.pack
        assert pack is not None
        largest = max(self._counted, key=lambda shape: shape[0] * shape[1])
        return {
            "flops": self._counted[largest],
            "compiled": pack.compiled[largest],
            "timer": fitted.timer,
            "compile_seconds": pack.compile_seconds + fitted.forward.compile_seconds,
        }

    @functools.cached_property
    def _shapes(self) -> dict[str, Any]:
        pack = self._fitted.pack
        assert pack is not None
        timed = self._fitted.timer.summary()["per_shape"]
        return {
            (name := "x".join(map(str, shape))): {
                **compiled_cost(compiled, self._counted[shape]),
                **timed.get(name, {}),
            }
            for shape, compiled in pack.compiled.items()
        }

    def _timed(
        self, prepared: Prepared, trained: Trained, dials: Dials
    ) -> dict[str, Any]:
        """Inference times; trials of equal shapes run equal programs."""
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), trained)
        key = str(shapes)
        if key not in self._inference:
            self._inference[key] = inference(
                prepared, self._fitted.frozen, trained, dials, self._batches
            )
        return self._inference[key]


def inference(
    prepared: Prepared,
    frozen: Frozen,
    trained: Trained,
    dials: Dials,
    batches: TrainBatches,
) -> dict[str, Any]:
    """Latency of one row and throughput of a batch: base, unmerged and merged.

    The three programs are the model as it was given, the model with corrections
    beside its weights, and the model as it was given with merged weights; the first
    and the last differ in their numbers only.
    """
    sizes_ = batches.shapes()
    rows, width = max(rows for rows, _ in sizes_), min(width for _, width in sizes_)
    adapted = prepared.adapted
    merged = adapted.merge(frozen, trained, dials)
    base = jax.jit(adapted.base_apply)
    unmerged = jax.jit(lambda f, t, d, x: adapted.apply(f, t, x, dials=d))
    table: dict[str, Any] = {}
    for count in (1, rows):
        x = prepared.problem.full(count, width)
        programs = {
            "base": (base, (prepared.base.params, x)),
            "unmerged": (unmerged, (frozen, trained, dials, x)),
            "merged": (base, (merged, x)),
        }
        for arm, (program, args) in programs.items():
            timed = latency(program, args, REPEATS, num_examples=count)
            table[f"{arm}, {count} x {width}"] = timed
    return table
