"""A pack of trials, run: each with a record of its own and an outcome of its own."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank.core.errors import Corrupt, LowrankError, Preempted
from lowrank.cost.measure import compiled_cost
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.run.forward import inputs_of, on_inputs
from lowrank.run.prepare import prepare
from lowrank.run.settings import Settings
from lowrank.run.trial import run_trial
from lowrank.sharding import batch_shapes, replicated
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step

logger = logging.getLogger(__name__)

#: The trial ids of a pack, in order; written before its first step.
COMPOSITION = "composition.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one trial: its result, or why it has none."""

    result: Mapping[str, Any] | None
    error: Exception | None


def run_pack(
    settings: Sequence[Settings],
    overrides: Sequence[Sequence[str]],
    *,
    folder: Path,
) -> list[Outcome]:
    """Runs trials that share a static key, one after another.

    Args:
      settings: One per trial, in the order of the pack; finished trials left out.
      overrides: The arguments each was composed with, for its record.
      folder: The pack's own, for its composition.

    Returns:
      One outcome per trial.

    Raises:
      Preempted: The pack was asked to stop; what was saved is kept.
      Corrupt: `folder` belongs to a pack of other trials.
    """
    check_composition(folder, [one.trial_id for one in settings])
    found = []
    for one, given in zip(settings, overrides, strict=True):
        try:
            found.append(Outcome(run_trial(one.config, given), None))
        except Preempted:
            raise
        except LowrankError as error:
            found.append(Outcome(None, error))
    return found


def check_composition(folder: Path, trials: Sequence[str]) -> None:
    """Writes the composition of a pack, or compares it with the one that is there.

    Trials that have finished since are no longer named: what is left must stand in
    the order in which it stood.

    Raises:
      Corrupt: The folder belongs to a pack of other trials.
    """
    path = folder / COMPOSITION
    if not path.exists():
        write_sealed(path, {"trials": list(trials)})
        return
    stored = read_sealed(path)["trials"]
    if [one for one in stored if one in trials] != list(trials):
        raise Corrupt(
            f"{folder} is of a pack of the trials {stored}, not of {list(trials)}; "
            "give the line that began it, or move the folder away to start over"
        )


def pack_memory(settings: Settings, widths: Sequence[int]) -> dict[int, int | None]:
    """Bytes that one device must hold for the widest batch, by trials in the pack.

    From the compiler's analysis of the step, compiled from shapes alone; None where
    the backend does not tell.
    """
    prepared = prepare(settings)
    adapted, optim = prepared.adapted, settings.optim
    mesh = settings.mesh.build()
    model = on_inputs(adapted.apply, inputs_of)
    largest = max(prepared.batches.examples(), key=lambda batch: batch["ids"].size)
    sharded = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        tree,
    )
    step = make_step(
        model,
        cross_entropy,
        optim,
        prepared.batches.num_steps,
        adapted.draws,
        adapted.active,
    )
    found = {}
    for width in widths:
        start = lambda width=width: states.start(
            adapted.init_trained, adapted.dials(), [optim] * width, range(width)
        )
        state, frozen = sharded(jax.eval_shape(start)), sharded(adapted.frozen())
        batch = {
            name: jax.ShapeDtypeStruct(
                (width, *one.shape[1:]), one.dtype, sharding=one.sharding
            )
            for name, one in batch_shapes(largest, mesh, 1).items()
        }
        jitted = jax.jit(over_trials(step, width), donate_argnums=1)
        compiled = jitted.lower(frozen, state, batch).compile()
        found[width] = compiled_cost(compiled)["peak_bytes"]
        logger.info("a pack of %d needs %s bytes", width, found[width])
    return found
