"""The cost ledger of a run: what the compiled programs and the clock say."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.cost.count import jaxpr_flops
from lowrank.cost.measure import CostLedger, compiled_cost, latency
from lowrank.run.fit import Fit
from lowrank.run.prepare import Prepared, sizes
from lowrank.run.settings import Settings

#: Timed calls per inference figure.
REPEATS = 10


def ledger(prepared: Prepared, settings: Settings, fitted: Fit) -> dict[str, Any]:
    """Everything that was measured, ready for `costs.json`.

    The step's FLOPs and bytes are those of the largest batch shape; every shape's own
    figures stand under "shapes". A process that had nothing left to train has no step
    figures.
    """
    known: dict[str, Any] = {
        "counts": sizes(prepared.adapted),
        "inference": inference(prepared, fitted) if settings.evaluate.latency else None,
        "num_trials": len(fitted.state.skipped),
    }
    pack = fitted.pack
    if pack is None:
        return {**CostLedger.gather(**known).json(), "shapes": {}}
    counted = {
        shape: jaxpr_flops(pack.packed, fitted.frozen, fitted.state, batch)
        for shape, batch in pack.shapes.items()
    }
    largest = max(counted, key=lambda shape: shape[0] * shape[1])
    found = CostLedger.gather(
        **known,
        flops=counted[largest],
        compiled=pack.compiled[largest],
        timer=fitted.timer,
        compile_seconds=pack.compile_seconds + fitted.forward.compile_seconds,
    )
    timed = fitted.timer.summary()["per_shape"]
    shapes = {
        (name := "x".join(map(str, shape))): {
            **compiled_cost(compiled, counted[shape]),
            **timed.get(name, {}),
        }
        for shape, compiled in pack.compiled.items()
    }
    return {**found.json(), "shapes": shapes}


def inference(prepared: Prepared, fitted: Fit) -> dict[str, Any]:
    """Latency of one row and throughput of a batch: base, unmerged and merged.

    The three programs are the model as it was given, the model with corrections
    beside its weights, and the model as it was given with merged weights; the first
    and the last differ in their numbers only.
    """
    sizes_ = [batch["ids"].shape[1:] for batch in prepared.batches.examples()]
    rows, width = max(rows for rows, _ in sizes_), min(width for _, width in sizes_)
    adapted, trained, dials = prepared.adapted, fitted.trained(), fitted.dials()
    merged = adapted.merge(fitted.frozen, trained, dials)
    base = jax.jit(adapted.base_apply)
    unmerged = jax.jit(lambda f, t, d, x: adapted.apply(f, t, x, dials=d))
    table: dict[str, Any] = {}
    for count in (1, rows):
        x = _tokens(count, width)
        programs = {
            "base": (base, (prepared.base.params, x)),
            "unmerged": (unmerged, (fitted.frozen, trained, dials, x)),
            "merged": (base, (merged, x)),
        }
        for arm, (program, args) in programs.items():
            timed = latency(program, args, REPEATS, num_examples=count)
            table[f"{arm}, {count} x {width}"] = timed
    return table


def _tokens(rows: int, width: int) -> Mapping[str, jax.Array]:
    """A full batch: every position holds a token, so none is skipped as padding."""
    return {
        "ids": jnp.ones((rows, width), jnp.int32),
        "mask": jnp.ones((rows, width), bool),
    }
