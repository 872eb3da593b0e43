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
import yaml

from lowrank.core.errors import (
    BadInput,
    Corrupt,
    LowrankError,
    NonFinite,
    OutOfMemory,
    Preempted,
)
from lowrank.core.secrets import redact
from lowrank.core.spec import digest
from lowrank.core.trees import fingerprint
from lowrank.io.checkpoints import Checkpoints
from lowrank.io.files import write_atomically
from lowrank.io.record import METRICS, Record
from lowrank.run.fit import Fit, Storage, check_plan, fit
from lowrank.run.forward import Batch
from lowrank.run.prepare import PreparedPack, prepare_pack, ranks_array, site_rows
from lowrank.run.preview import lowered
from lowrank.run.results import Results, flat_numbers
from lowrank.run.settings import Settings
from lowrank.run.ship import ship
from lowrank.track.jsonl import JsonlTracker
from lowrank.track.trackers import Trackers, build_trackers
from lowrank.train.guard import interruptible
from lowrank.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

_PENALTY = "train/penalty/"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one trial: its result, or why it has none."""

    result: Mapping[str, Any] | None
    error: Exception | None = None


def run_pack(
    trials: Sequence[Settings],
    overrides: Sequence[Sequence[str]] | None = None,
    *,
    folder: Path | None = None,
) -> list[Outcome]:
    """Trains trials as one pack, continues them, or returns what they left.

    Args:
      trials: Alike in everything but what may differ within a pack.
      overrides: The arguments that each was composed with, for its record.
      folder: Where the pack's checkpoints are; a pack of one may leave it out and
        keeps them in its run directory.

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
        return _run_pack(prepare_pack(trials), given, folder)


def _run_pack(
    prepared: PreparedPack, overrides: Sequence[Sequence[str]], folder: Path | None
) -> list[Outcome]:
    validation = check_pack(prepared)
    run = prepared.trials[0].settings.run
    with contextlib.ExitStack() as stack:
        records = [
            stack.enter_context(
                Record.open(
                    trial.directory,
                    config=trial.settings.config,
                    identity=trial.identity,
                    force=trial.settings.run.force,
                )
            )
            for trial in prepared.trials
        ]
        done = [record.finished for record in records]
        if all(one is not None for one in done):
            for record in records:
                logger.info("finished earlier: %s", record.directory)
            return [Outcome(one) for one in done]
        for trial, record, own in zip(prepared.trials, records, overrides, strict=True):
            if record.finished is None:
                write_hydra(record.directory, trial.settings.config, own)
        fail = lambda reason: [
            record.set_status("failed", f"hang: {reason}")
            for record in records
            if record.finished is None
        ]
        watchdog = stack.enter_context(
            Watchdog(run.hang_seconds, run.pause_seconds, report=fail)
        )
        at = folder / "checkpoints" if folder else records[0].path("checkpoints")
        with _watching(prepared, records) as watches:
            return _train(prepared, records, watches, validation, watchdog, at)


def check_pack(prepared: PreparedPack) -> list[Batch] | None:
    """Checks what would fail later; returns the validation batches, if there are any.

    Raises:
      BadInput: See `run.fit.check_plan`.
    """
    first = prepared.trials[0]
    found = "validation" in first.task.splits
    validation = first.evaluation("validation") if found else None
    settings = [trial.settings for trial in prepared.trials]
    check_plan(
        prepared.batches,
        validation,
        [one.optim for one in settings],
        [one.seed for one in settings],
        first.settings.mesh.build(),
        first.settings.loop,
    )
    return validation


def pack_memory(settings: Settings, widths: Sequence[int]) -> dict[int, int | None]:
    """Bytes that one device must hold for the widest batch, by trials in the pack.

    From the compiler's analysis of the step, compiled from shapes alone; None where
    the backend does not tell.
    """
    prepared = prepare_pack([settings]).trials[0]
    found = {}
    for width in widths:
        found[width] = lowered(prepared, width).costs()["peak_bytes"]
        logger.info("a pack of %d needs %s bytes", width, found[width])
    return found


def _train(
    prepared: PreparedPack,
    records: Sequence[Record],
    watches: Sequence["_Watch | None"],
    validation: list[Batch] | None,
    watchdog: Watchdog,
    checkpoints: Path,
) -> list[Outcome]:
    """Trains, judges and ships whatever has no result yet."""
    trials = prepared.trials
    settings = [trial.settings for trial in trials]
    for trial, record, watch in zip(trials, records, watches, strict=True):
        if watch:
            record.write_json("sites.json", site_rows(trial.adapted))
            record.save_arrays("ranks", **_flat(ranks_array(trial.adapted)))
    together = prepared.variants.together
    before = fingerprint(together.frozen())
    identity = {**trials[0].identity, "config": _pack_id(settings)}
    storage = Storage(
        Checkpoints(checkpoints, identity=identity),
        [watch and watch.jsonl for watch in watches],
    )

    def log(position: int, rows: Sequence[Mapping[str, float]]) -> None:
        for watch, row in zip(watches, rows, strict=True):
            if watch and row:
                watch.log(position, row)

    try:
        fitted = fit(
            together,
            prepared.batches,
            validation=validation,
            optim=[one.optim for one in settings],
            penalty=[one.penalty for one in settings],
            seeds=[one.seed for one in settings],
            dials=prepared.variants.dials(),
            mesh=settings[0].mesh,
            loop=settings[0].loop,
            non_finite=settings[0].non_finite,
            log=log,
            storage=storage,
            progress=settings[0].run.progress,
            alive=watchdog.alive,
        )
    except NonFinite as error:
        if len(trials) == 1:
            raise
        return [_failed(record, error) for record in records]
    # Promise M1: the base is never changed.
    if fingerprint(fitted.frozen) != before:
        raise Corrupt("the frozen base changed during the run; please report this")
    results = Results(prepared, fitted)
    outcomes = []
    for number, (record, watch) in enumerate(zip(records, watches, strict=True)):
        watchdog.alive(f"judging trial {number}")
        if watch is None:
            outcomes.append(Outcome(record.finished))
            continue
        try:
            outcomes.append(_finish(prepared, number, record, watch, fitted, results))
        except NonFinite as error:
            if len(trials) == 1:
                raise
            outcomes.append(_failed(record, error))
    return outcomes


def _finish(
    prepared: PreparedPack,
    number: int,
    record: Record,
    watch: "_Watch",
    fitted: Fit,
    results: Results,
) -> Outcome:
    result = results.judge(number, record)
    ship(record.directory, prepared.trials[number], *results.trees(number))
    # The result comes last and seals what is there; a kill in between drops the
    # summary with the metrics behind the last checkpoint.
    watch.trackers(int(fitted.state.step)).summary(flat_numbers(result))
    record.result(result)
    watch.status = "done"
    logger.info("finished at step %d: %s", result["steps"], record.directory)
    return Outcome(result)


def _failed(record: Record, error: LowrankError) -> Outcome:
    if record.finished is not None:
        return Outcome(record.finished)
    record.set_status("failed", f"{type(error).__name__}: {error}")
    return Outcome(None, error)


def _pack_id(trials: Sequence[Settings]) -> str:
    """What the checkpoints of a pack belong to; of a pack of one, its trial."""
    ids = [one.trial_id for one in trials]
    return ids[0] if len(ids) == 1 else digest(ids)


def write_hydra(
    directory: Path, config: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Writes `.hydra/` as Hydra would, had it heard of secrets."""
    folder = directory / ".hydra"
    contents = {"config": redact(config), "overrides": redact(list(overrides))}
    for name, value in contents.items():
        text = yaml.safe_dump(value, sort_keys=False).encode()
        write_atomically(
            folder / f"{name}.yaml", lambda file, text=text: file.write(text)
        )


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
            "data.batching.batch_size, or set base.remat=full."
        ) from error


class _Watch:
    """A trial's trackers, made at the first thing to track.

    By then a continued run has cut its metrics file back to its checkpoint, which is
    what an offline tracker replays.
    """

    def __init__(self, settings: Settings, record: Record):
        self._settings, self._record = settings, record
        self._trackers: Trackers | None = None
        self.jsonl = JsonlTracker(record.path(METRICS))
        self.status = "failed"

    def trackers(self, step: int) -> Trackers:
        if self._trackers is None:
            self._trackers = build_trackers(
                self._settings.track,
                self.jsonl,
                name=self._settings.trial_id,
                run_id=self._settings.trial_id,
                config=self._settings.config,
                directory=self._record.directory,
                first_step=step,
            )
        return self._trackers

    def log(self, position: int, row: Mapping[str, float]) -> None:
        """Logs a trial's numbers, without those of penalties only neighbors have."""
        wanted = self._settings.penalty.named
        self.trackers(position).log(
            position,
            {
                name: value
                for name, value in row.items()
                if _PENALTY not in name or name.split(_PENALTY)[1] in wanted
            },
        )

    def close(self) -> None:
        (self._trackers or self.jsonl).close(self.status)


@contextlib.contextmanager
def _watching(
    prepared: PreparedPack, records: Sequence[Record]
) -> Iterator[list[_Watch | None]]:
    """Trackers of every trial that has no result yet; closed however it ends."""
    watches: list[_Watch | None] = []
    try:
        for trial, record in zip(prepared.trials, records, strict=True):
            todo = record.finished is None
            watches.append(_Watch(trial.settings, record) if todo else None)
        yield watches
    except (Preempted, KeyboardInterrupt):
        for watch in watches:
            if watch and watch.status != "done":
                watch.status = "preempted"
        raise
    finally:
        for watch in watches:
            if watch:
                watch.close()


def _flat(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path.replace("/", "."): array for path, array in arrays.items()}
