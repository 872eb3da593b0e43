"""What is refused before anything is compiled: plans of training that cannot work."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from lowrank.core.errors import BadInput
from lowrank.evaluate.metrics import STANDARD, Rows, Tally
from lowrank.run.forward import Batch
from lowrank.sharding.mesh import check_rows, check_trials
from lowrank.train.batches import TrainBatches
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import AdamW


def check_metric(field: str, name: str, validation: Sequence[Batch]) -> None:
    """Refuses a number that a validation split does not give.

    Raises:
      BadInput: There are others.
    """
    labels = np.concatenate([b["label"][b["weight"] > 0] for b in validation])
    flat = np.zeros((len(labels), int(labels.max()) + 1), np.float32)
    values = Tally.of(Rows.of(flat, labels), STANDARD).compute()
    known = [name for name, value in values.items() if value is not None]
    if name not in known:
        raise BadInput(
            f"{field} = {name!r} is not a number that this validation split "
            f"of {len(labels)} rows gives; there are {', '.join(known)}"
        )


def check_plan(
    batches: TrainBatches,
    validation: Sequence[Batch] | None,
    optims: Sequence[AdamW],
    seeds: Sequence[int],
    devices: jax.sharding.Mesh,
    loop: LoopSpec,
    check_select: Callable[[str, str, Sequence[Batch]], None] = check_metric,
) -> None:
    """Checks what would otherwise fail while compiling or in the middle of training.

    Raises:
      BadInput: Seeds, settings of optimizers, batch sizes, trials, devices, or the
        number that chooses the best state do not fit together.
    """
    made_for = batches.state(0)["trial_seeds"]
    if list(seeds) != made_for:
        raise BadInput(
            f"the batches were made for the seeds {made_for} and the trials have "
            f"{list(seeds)}; give both the same"
        )
    static = {(o.schedule, o.warmup, o.accumulate, o.clip is None) for o in optims}
    if len(optims) != len(seeds) or len(static) != 1:
        raise BadInput(
            f"{len(seeds)} trials have {len(optims)} settings of the optimizer; give "
            "one each, alike in schedule, warmup, accumulate and whether they clip"
        )
    check_trials(devices, len(seeds))
    for size, _ in batches.shapes():
        check_rows(devices, size, "data.batching.batch_size")
        if size % optims[0].accumulate:
            raise BadInput(
                f"optim.accumulate = {optims[0].accumulate} does not divide "
                f"data.batching.batch_size = {size}"
            )
    for batch in validation or ():
        check_rows(devices, len(batch["weight"]), "evaluate.batch_size")
    if validation:
        check_select("loop.select", loop.select, validation)
