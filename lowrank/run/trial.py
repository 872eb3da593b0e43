"""One trial from its config to its record: trained, judged, priced and shipped."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowrank.core.errors import Corrupt, Preempted
from lowrank.core.secrets import redact
from lowrank.core.trees import fingerprint
from lowrank.evaluate.score import Predictions, report, score
from lowrank.io.checkpoints import Checkpoints
from lowrank.io.files import write_atomically
from lowrank.io.record import METRICS, Record
from lowrank.run.costs import ledger
from lowrank.run.fit import Fit, Storage, check_plan, fit
from lowrank.run.forward import Batch
from lowrank.run.prepare import Prepared, prepare, ranks_array, site_rows
from lowrank.run.preview import preview
from lowrank.run.settings import Settings, read
from lowrank.run.ship import ship
from lowrank.track.jsonl import JsonlTracker
from lowrank.track.trackers import Trackers, build_trackers
from lowrank.train.guard import interruptible
from lowrank.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def run_trial(
    config: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the trial that `config` describes, continues it, or returns what it left.

    Args:
      config: Composed and resolved.
      overrides: The arguments it was composed with, for the record.

    Returns:
      The result, as in `result.json`; of a preview, what was shown.

    Raises:
      LowrankError: See `core.errors`; bad input is found before anything is compiled.
    """
    with interruptible():
        return _run_trial(config, overrides)


def _run_trial(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    settings = read(config)
    prepared = prepare(settings)
    validation = _validation(prepared)
    check_plan(
        prepared.batches,
        validation,
        [settings.optim],
        [settings.seed],
        settings.mesh.build(),
        settings.loop,
    )
    if settings.run.preview:
        return preview(prepared)
    with Record.open(
        prepared.directory,
        config=settings.config,
        identity=prepared.identity,
        force=settings.run.force,
    ) as record:
        if record.finished is not None:
            logger.info("finished earlier: %s", record.directory)
            return record.finished
        write_hydra(record.directory, config, overrides)
        with Watchdog(
            settings.run.hang_seconds,
            settings.run.pause_seconds,
            report=lambda reason: record.set_status("failed", f"hang: {reason}"),
        ) as watchdog:
            return _run(prepared, settings, record, validation, watchdog)


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


def _validation(prepared: Prepared) -> list[Batch] | None:
    has_validation = "validation" in prepared.task.splits
    return prepared.evaluation("validation") if has_validation else None


def _run(
    prepared: Prepared,
    settings: Settings,
    record: Record,
    validation: list[Batch] | None,
    watchdog: Watchdog,
) -> dict[str, Any]:
    record.write_json("sites.json", site_rows(prepared.adapted))
    record.save_arrays("ranks", **_flat(ranks_array(prepared.adapted)))
    before = fingerprint(prepared.adapted.frozen())
    jsonl = JsonlTracker(record.path(METRICS))
    storage = Storage(
        Checkpoints(record.path("checkpoints"), identity=prepared.identity),
        offset=jsonl.offset,
        sha256=jsonl.sha256,
        truncate=jsonl.truncate,
    )
    watch = _Watch(settings, record, jsonl)
    status = "failed"
    try:
        fitted = fit(
            prepared.adapted,
            prepared.batches,
            validation=validation,
            optim=settings.optim,
            seeds=(settings.seed,),
            mesh=settings.mesh,
            loop=settings.loop,
            non_finite=settings.non_finite,
            log=watch.log,
            storage=storage,
            progress=settings.run.progress,
            alive=watchdog.alive,
        )
        result = _judge(prepared, settings, record, fitted, watchdog)
        # Promise M1: the base is never changed.
        if fingerprint(fitted.frozen) != before:
            raise Corrupt("the frozen base changed during the run; please report this")
        watchdog.alive("writing the adapter")
        ship(record.directory, prepared, fitted)
        # The result comes last and seals what is there; a kill in between drops the
        # summary with the metrics behind the last checkpoint.
        watch.trackers(int(fitted.state.step)).summary(_numbers(result))
        record.result(result)
        status = "done"
    except (Preempted, KeyboardInterrupt):
        status = "preempted"
        raise
    finally:
        watch.close(status)
    logger.info("finished at step %d: %s", result["steps"], record.directory)
    return result


class _Watch:
    """The trackers, made at the first thing to track.

    By then a continued run has cut its metrics file back to its checkpoint, which is
    what an offline tracker replays.
    """

    def __init__(self, settings: Settings, record: Record, jsonl: JsonlTracker):
        self._settings, self._record, self._jsonl = settings, record, jsonl
        self._trackers: Trackers | None = None

    def trackers(self, step: int) -> Trackers:
        if self._trackers is None:
            self._trackers = build_trackers(
                self._settings.track,
                self._jsonl,
                name=self._settings.trial_id,
                run_id=self._settings.trial_id,
                config=self._settings.config,
                directory=self._record.directory,
                first_step=step,
            )
        return self._trackers

    def log(self, position: int, rows: Sequence[Mapping[str, float]]) -> None:
        self.trackers(position).log(position, rows[0])

    def close(self, status: str) -> None:
        (self._trackers or self._jsonl).close(status)


def _judge(
    prepared: Prepared,
    settings: Settings,
    record: Record,
    fitted: Fit,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Scores the splits, saves predictions and costs, and puts the result together."""
    scores: dict[str, Any] = {}
    for name in ("validation", "test"):
        if name in prepared.task.splits and (name != "test" or settings.evaluate.test):
            watchdog.alive(f"evaluation on {name}")
            scores[name] = _score(prepared, settings, record, fitted, name)
    watchdog.alive("measuring costs")
    costs = ledger(prepared, settings, fitted)
    if fitted.pack is None and (earlier := record.read_json("costs.json")):
        # Training ended before this process began: its clock knows nothing of it.
        costs = earlier
    record.write_json("costs.json", costs)
    state = fitted.state
    return {
        "trial": settings.trial_id,
        "base": {"name": prepared.base.name, "fingerprint": prepared.base.fingerprint},
        "data": {
            "name": prepared.task.name,
            "fingerprint": prepared.task.fingerprint,
            "classes": list(prepared.task.classes),
            "rows": {k: len(v.labels) for k, v in prepared.task.splits.items()},
            "checks": prepared.checks,
        },
        "scores": scores,
        "steps": int(state.step),
        "best_step": int(state.best_step[0]) if fitted.validated else None,
        "skipped_steps": int(state.skipped[0]),
        "costs": costs,
        "state": fingerprint(
            {"trained": state.trained, "opt": state.opt, "key": state.key}
        ),
    }


def _score(
    prepared: Prepared, settings: Settings, record: Record, fitted: Fit, name: str
) -> dict[str, Any]:
    split = prepared.task.splits[name]
    predictions = score(
        lambda batch: fitted.forward(fitted.chosen, fitted.state.dials, batch)[0],
        prepared.evaluation(name),
        prepared.task.classes,
        split.groups,
        num_rows=len(split.labels),
        progress=settings.run.progress,
    )
    record.save_predictions(name, id=np.asarray(split.ids), **_by_row(predictions))
    return report(
        predictions,
        resamples=settings.evaluate.resamples,
        level=settings.evaluate.level,
    )


def _by_row(predictions: Predictions) -> dict[str, np.ndarray]:
    """What is stored per row; the names of the classes stand in the result."""
    arrays = predictions.arrays()
    return {name: array for name, array in arrays.items() if name != "classes"}


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The scores as flat numbers, for trackers."""
    found = {}
    for split, metrics in result["scores"].items():
        for name, value in metrics["metrics"].items():
            if value["estimate"] is not None:
                found[f"{split}/{name}"] = value["estimate"]
    return found


def _flat(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path.replace("/", "."): array for path, array in arrays.items()}
