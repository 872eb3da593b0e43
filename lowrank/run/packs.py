"""Trials trained together, each with a record of its own.

A pack's checkpoints hold all its trials, so they lie in a folder of the pack's, and are
continued by the same trials in the same order only. The pack of one that a single
command runs keeps its checkpoints in its own run directory.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank.core.errors import (
    BadInput,
    Corrupt,
    LowrankError,
    NonFinite,
    OutOfMemory,
)
from lowrank.core.spec import digest
from lowrank.io.checkpoints import Checkpoints
from lowrank.io.history import MOVES
from lowrank.io.record import Record
from lowrank.run.checks import check_plan
from lowrank.run.fit import Fit, fit
from lowrank.run.forward import Batch, on_inputs
from lowrank.run.placing import marks, place
from lowrank.run.prepare import PreparedPack, prepare_pack, ranks_array, site_rows
from lowrank.run.preview import Planned, lowered
from lowrank.run.profile import Profile, watched
from lowrank.run.ranks import begun, gauges, moves, over_time
from lowrank.run.recording import open_records
from lowrank.run.results import Results, flat_numbers
from lowrank.run.settings import Settings
from lowrank.run.ship import ship
from lowrank.run.storage import Source, Storage
from lowrank.run.watch import Watch, watching
from lowrank.sharding.processes import agree, first
from lowrank.train.guard import interruptible
from lowrank.train.penalties import impose
from lowrank.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

#: Where a pack's states are, in its folder.
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one trial: its result, or why it has none.

    Attributes:
      result: As in `result.json`.
      error: What ended it.
      paused: The step at which it waits, saved, to be continued.
      cut: Why it was not continued, though nothing was wrong with it.
    """

    result: Mapping[str, Any] | None
    error: Exception | None = None
    paused: int | None = None
    cut: str | None = None


@dataclasses.dataclass(frozen=True)
class Origin:
    """The pack that a trial was in before, and may be taken out of.

    Attributes:
      folder: Of that pack.
      trials: The ids of its trials, in their order.
      step: The checkpoint to continue from.
      row: The trial's place in the pack.
    """

    folder: Path
    trials: tuple[str, ...]
    step: int
    row: int


def run_pack(
    trials: Sequence[Settings],
    overrides: Sequence[Sequence[str]] | None = None,
    *,
    folder: Path | None = None,
    until: int | None = None,
    origins: Sequence[Origin] = (),
) -> list[Outcome]:
    """Trains trials as one pack, continues them, or returns what they left.

    Args:
      trials: Alike in everything but what may differ within a pack.
      overrides: The arguments that each was composed with, for its record.
      folder: Where the pack's checkpoints are; a pack of one may leave it out and
        keeps them in its run directory.
      until: The step of a validation at which to pause, with the state saved; None:
        train to the end. Trials that have ended by themselves by then are finished.
      origins: One per trial: where the pack begins, if it has no checkpoint of its own.
        Its trials end as they would have, had they been in this pack from the start.

    Returns:
      One outcome per trial. A trial whose numbers ceased to be finite has an error;
      its neighbors are as they would be without it.

    Raises:
      LowrankError: What ends the whole pack, see `core.errors`: bad input, found
        before anything compiles or is written; `Preempted`, with the state saved;
        `OutOfMemory`; and of a pack of one, whatever ends its trial.
    """
    if len(trials) > 1 and folder is None:
        raise BadInput("a pack of several trials needs a folder for its checkpoints")
    given = [[]] * len(trials) if overrides is None else overrides
    with interruptible(), _memory_errors(len(trials)):
        prepared = prepare_pack(trials)
        sources = [_source(one, prepared) for one in origins]
        return _run_pack(prepared, given, folder, until, sources)


def _source(origin: Origin, prepared: PreparedPack) -> Source:
    folder = origin.folder / CHECKPOINTS
    checkpoints = _checkpoints(folder, prepared, origin.trials)
    return Source(checkpoints, origin.step, origin.row)


def _checkpoints(folder: Path, prepared: PreparedPack, ids: Sequence[str]):
    """Those of the pack of these trials, which share all but their configs."""
    identity = {**prepared.trials[0].identity, "config": _pack_id(ids)}
    return Checkpoints(folder, identity=identity)


def _run_pack(
    prepared: PreparedPack,
    overrides: Sequence[Sequence[str]],
    folder: Path | None,
    until: int | None,
    sources: Sequence[Source],
) -> list[Outcome]:
    validation = check_pack(prepared)
    identity = prepared.trials[0].identity
    agree(
        {f"the {name} fingerprint": mark for name, mark in identity.items()},
        "Give all of them the same files: base, data and this package.",
    )
    run = prepared.trials[0].settings.run
    with contextlib.ExitStack() as stack:
        records = open_records(prepared.trials, overrides, stack)
        done = [record.finished for record in records]
        if all(one is not None for one in done):
            for record in records:
                logger.info("finished earlier: %s", record.directory)
            return [Outcome(one) for one in done]

        def fail(reason: str) -> None:
            for record in records:
                if record.finished is None:
                    record.set_status("failed", f"hang: {reason}")

        watchdog = stack.enter_context(
            Watchdog(run.hang_seconds, run.pause_seconds, report=fail)
        )
        at = folder / CHECKPOINTS if folder else records[0].path(CHECKPOINTS)
        ids = [one.settings.trial_id for one in prepared.trials]
        with watching(prepared, records) as watches:
            files = [watch and watch.jsonl for watch in watches]
            storage = Storage(_checkpoints(at, prepared, ids), files, sources)
            return _train(
                prepared, records, watches, validation, watchdog, storage, until
            )


def check_pack(prepared: PreparedPack) -> Sequence[Batch] | None:
    """Checks what would fail later; returns the validation batches, if there are any.

    Raises:
      BadInput: See `run.checks.check_plan`, `run.ranks.begun` and
        `train.penalties.impose`.
    """
    first = prepared.trials[0]
    found = "validation" in first.problem.rows
    validation = first.evaluation("validation") if found else None
    settings = [trial.settings for trial in prepared.trials]
    placed = place(
        prepared.variants.together,
        first.settings.mesh,
        rules=first.problem.base.partition,
    )
    check_plan(
        prepared.batches,
        validation,
        [one.optim for one in settings],
        [one.seed for one in settings],
        placed.mesh,
        first.settings.loop,
        first.problem.judge.check,
    )
    first.settings.profile.check(prepared.batches.num_steps)
    _check_ranks_and_penalties(prepared)
    return validation


def _check_ranks_and_penalties(prepared: PreparedPack) -> None:
    """What `fit` would refuse, before there are records."""
    together = prepared.variants.together
    settings = [trial.settings for trial in prepared.trials]
    impose([one.penalty for one in settings], together.sites, together.thin)
    problem = prepared.trials[0].problem
    model = on_inputs(together.apply, problem.inputs)
    begun(
        together,
        [one.ranks.moving for one in settings],
        prepared.slots(),
        prepared.variants.dials(),
        prepared.batches.num_steps,
        gauges(model, problem.loss),
    )


def pack_memory(settings: Settings, widths: Sequence[int]) -> dict[int, int | None]:
    """Bytes that one device must hold for the widest batch, by trials in the pack.

    From the compiler's analysis of the step, compiled from shapes alone; None where
    the backend does not tell.
    """
    planned = Planned.of(prepare_pack([settings]).trials[0])
    found = {}
    for width in widths:
        found[width] = lowered(planned, width).costs()["peak_bytes"]
        logger.info("a pack of %d needs %s bytes", width, found[width])
    return found


def _train(
    prepared: PreparedPack,
    records: Sequence[Record],
    watches: Sequence[Watch | None],
    validation: Sequence[Batch] | None,
    watchdog: Watchdog,
    storage: Storage,
    until: int | None,
) -> list[Outcome]:
    """Trains, judges and ships whatever has no result yet and does not pause."""
    trials = prepared.trials
    settings = [trial.settings for trial in trials]
    for trial, record, watch in zip(trials, records, watches, strict=True):
        if watch:
            record.write_json("sites.json", site_rows(trial.adapted))
            record.save_arrays("ranks", **_flat(ranks_array(trial.adapted)))
    together, problem = prepared.variants.together, trials[0].problem
    mesh, partition = settings[0].mesh, problem.base.partition
    where = place(together, mesh, rules=partition).frozen
    before = marks(together.frozen(), where)

    def log(position: int, rows: Sequence[Mapping[str, float]]) -> None:
        for watch, row in zip(watches, rows, strict=True):
            if watch and row:
                watch.log(position, row)

    try:
        fitted = fit(
            together,
            prepared.batches,
            validation=validation,
            loss=problem.loss,
            judge=problem.judge,
            inputs=problem.inputs,
            optim=[one.optim for one in settings],
            penalty=[one.penalty for one in settings],
            ranks=[one.ranks.moving for one in settings],
            slots=prepared.slots(),
            seeds=[one.seed for one in settings],
            dials=prepared.variants.dials(),
            starts=prepared.starts,
            mesh=mesh,
            partition=partition,
            loop=settings[0].loop,
            until=until,
            non_finite=settings[0].non_finite,
            log=log,
            storage=storage,
            progress=settings[0].run.progress,
            alive=watchdog.alive,
            watch=_profiled(settings[0].profile, records[0].directory),
        )
    except NonFinite as error:
        if len(trials) == 1:
            raise
        return [_failed(record, error) for record in records]
    # Promise M1: the base is never changed.
    if marks(fitted.frozen, where) != before:
        raise Corrupt("the frozen base changed during the run; please report this")
    results = Results(prepared, fitted, watchdog.alive)
    outcomes = []
    for number, (record, watch) in enumerate(zip(records, watches, strict=True)):
        watchdog.alive(f"judging trial {number}")
        if watch is None:
            outcomes.append(Outcome(record.finished))
            continue
        if fitted.paused is not None and not fitted.ended[number]:
            why = f"waits at step {fitted.paused} for other trials"
            record.set_status("preempted", why)
            watch.status = "preempted"
            outcomes.append(Outcome(None, paused=fitted.paused))
            continue
        try:
            outcomes.append(_finish(prepared, number, record, watch, fitted, results))
        except NonFinite as error:
            if len(trials) == 1:
                raise
            outcomes.append(_failed(record, error))
    return outcomes


def _profiled(profile: Profile, directory: Path):
    """What `fit` is to be watched by; the first trial's directory has the table."""
    if not profile.steps or not first():
        return None
    return lambda pack: watched(pack, profile, directory)


def _finish(
    prepared: PreparedPack,
    number: int,
    record: Record,
    watch: Watch,
    fitted: Fit,
    results: Results,
) -> Outcome:
    result = results.judge(number, record)
    if fitted.events is not None and prepared.trials[number].settings.ranks.move:
        moved = over_time(fitted.events, fitted.state, number)
        record.save_arrays("ranks", **_flat(moved))
        record.write_json(MOVES, moves(fitted.events, fitted.state, number))
    trees = results.trees(number)
    if record.writes:
        ship(record.directory, prepared.trials[number], *trees)
    # The result comes last and seals what is there; a kill in between drops the
    # summary with the metrics behind the last checkpoint.
    watch.summary(int(fitted.state.step), flat_numbers(result))
    record.result(result)
    watch.status = "done"
    logger.info("finished at step %d: %s", result["steps"], record.directory)
    return Outcome(result)


def _failed(record: Record, error: LowrankError) -> Outcome:
    if record.finished is not None:
        return Outcome(record.finished)
    record.set_status("failed", f"{type(error).__name__}: {error}")
    return Outcome(None, error)


def _pack_id(ids: Sequence[str]) -> str:
    """What the checkpoints of a pack belong to; of a pack of one, its trial."""
    return ids[0] if len(ids) == 1 else digest(list(ids))


@contextlib.contextmanager
def _memory_errors(num_trials: int) -> Iterator[None]:
    """Tells a device without room from a bug."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(
            f"the device has no room for a pack of {num_trials}: "
            f"{str(error).splitlines()[0]}. Lower sweep.width or "
            "data.batching.batch_size, or set base.remat=full; after training, lower "
            "evaluate.batch_size."
        ) from error


def _flat(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path.replace("/", "."): array for path, array in arrays.items()}
