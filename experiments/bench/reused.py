"""Arm B: one process and one compiled step, reused trial after trial.

The strongest sequential rival of a pack: the step holds as many components as the
largest rank of the grid, and everything that differs between trials is data to it. It
writes no records, which is to its advantage.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.grid import Grid
from lowrank.core.trees import flatten
from lowrank.data.pipeline import TrainPipeline
from lowrank.evaluate.score import numbers, score_trials
from lowrank.run.forward import Forward, inputs_of, on_inputs
from lowrank.run.prepare import prepare_pack
from lowrank.run.texts import batching_of
from lowrank.sharding.mesh import batch_shapes, place_batch, replicate
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.pack import Pack
from lowrank.train.step import make_step


def run(grid: Grid) -> dict[str, Any]:
    """Trains the grid; seconds since the process began, and each trial's numbers."""
    trials = grid.settings("reused")
    prepared = prepare_pack(trials)
    together, first = prepared.variants.together, prepared.trials[0]
    mesh = trials[0].mesh.build()
    model = on_inputs(together.apply, inputs_of)
    frozen = replicate(together.frozen(), mesh)
    dials = prepared.variants.dials()
    validation = first.evaluation("validation")
    forward = Forward(model, frozen, mesh)
    put = lambda batch: place_batch(batch, mesh, 1)
    # One program for all starts, too: a start each would be compiled each.
    starts = states.start(
        together.init_trained,
        dials,
        [trial.optim for trial in trials],
        [trial.seed for trial in trials],
        together.leaves,
    )
    pack, found, losses = None, [], []
    for number, trial in enumerate(trials):
        batches = TrainPipeline(
            first.labeled.tokens["train"],
            first.labeled.task.splits["train"].labels,
            batching=batching_of(trial),
            trial_seeds=(trial.seed,),
            num_epochs=trial.optim.epochs,
        )
        state = replicate(_row(starts, number), mesh)
        if pack is None:
            step = make_step(
                model, cross_entropy, trial.optim, batches.num_steps, together.draws,
                together.active,
            )  # fmt: skip
            shapes = [batch_shapes(b, mesh, 1) for b in batches.examples()]
            pack = Pack(step, frozen, state, shapes, put, 1, mesh)
        metrics: Any = None
        for _, batch in batches.iterate():
            state, metrics = pack(state, batch)
        losses.append(float(metrics["loss"][0]))
        (scored,) = score_trials(
            lambda batch, s=state: forward(s.trained, s.dials, batch),
            validation,
            first.labeled.task.classes,
            progress=False,
        )
        found.append(numbers(scored))
    return {"results": found, "losses": losses}


def _row(state: states.TrainState, number: int) -> states.TrainState:
    """The state of one trial as that of a pack of one; the step has no trials."""
    own = jax.tree.map(lambda x: x[number : number + 1], state.replace(step=None))
    # A copy, since a pack's step donates its state.
    return own.replace(step=jnp.array(state.step, copy=True))


def export(grid: Grid) -> dict[str, Any]:
    """What the torch arm needs of us: batches and validation rows as arrays."""
    trials = grid.settings("export")
    prepared = prepare_pack(trials[:1]).trials[0]
    arrays: dict[str, Any] = {}
    for seed in {trial.seed for trial in trials}:
        batches = TrainPipeline(
            prepared.labeled.tokens["train"],
            prepared.labeled.task.splits["train"].labels,
            batching=batching_of(trials[0]),
            trial_seeds=(seed,),
            num_epochs=trials[0].optim.epochs,
        )
        for name in ("ids", "mask", "label", "weight"):
            stack = [batch[name][0] for _, batch in batches.iterate()]
            arrays[f"{seed}/{name}"] = jnp.stack(stack)
    for number, batch in enumerate(prepared.evaluation("validation")):
        for name in ("ids", "mask", "label", "weight"):
            arrays[f"validation/{number}/{name}"] = batch[name]
    leaves, _ = flatten(arrays)
    return jax.device_get(dict(leaves))


def main() -> None:
    """Reads a grid from the command line and prints the outcome as one line of JSON."""
    grid = Grid(**json.loads(sys.argv[1]))
    began = time.perf_counter()
    print(json.dumps({**run(grid), "inside_seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
