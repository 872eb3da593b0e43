"""What a trained pack is worth: scores, costs and the result of each trial."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowrank.core.arrays import Dials, Trained
from lowrank.core.errors import NonFinite
from lowrank.core.trees import fingerprint
from lowrank.evaluate.score import Predictions, report, score_trials
from lowrank.io.record import Record
from lowrank.run.costs import Ledgers
from lowrank.run.fit import Fit
from lowrank.run.prepare import PreparedPack


class Results:
    """The results of a pack's trials; what they share is computed once."""

    def __init__(self, prepared: PreparedPack, fitted: Fit):
        self._prepared = prepared
        self._fitted = fitted
        self._ledgers = Ledgers(prepared.batches, fitted)
        self._scored: dict[str, list[Predictions]] = {}

    def trees(self, trial: int) -> tuple[Trained, Dials]:
        """A trial's chosen tree and its dials, as it would have them alone."""
        fitted = self._fitted
        return self._prepared.variants.own(
            trial, fitted.trained(trial), fitted.dials(trial)
        )

    def judge(self, trial: int, record: Record) -> dict[str, Any]:
        """Scores a trial, saves predictions and costs, puts its result together.

        Raises:
          NonFinite: Training ended with numbers that were not finite, or the trained
            model gives some.
        """
        fitted, prepared = self._fitted, self._prepared.trials[trial]
        ended = fitted.ended[trial]
        if ended and ended["failed"]:
            raise NonFinite(ended["why"])
        settings = prepared.settings
        scores = {}
        for name in ("validation", "test"):
            sealed = name == "test" and not settings.evaluate.test
            if name in prepared.task.splits and not sealed:
                predictions = self._predictions(name)[trial]
                ids = np.asarray(prepared.task.splits[name].ids)
                record.save_predictions(name, id=ids, **_by_row(predictions))
                scores[name] = report(
                    predictions,
                    resamples=settings.evaluate.resamples,
                    level=settings.evaluate.level,
                )
        costs = self._ledgers.of(prepared, *self.trees(trial))
        if fitted.pack is None and (earlier := record.read_json("costs.json")):
            # Training ended before this process began: its clock knows nothing of it.
            costs = earlier
        record.write_json("costs.json", costs)
        state = fitted.state
        own = lambda tree: jax.tree.map(lambda x: x[trial : trial + 1], tree)
        return {
            "trial": settings.trial_id,
            "base": {
                "name": prepared.base.name,
                "fingerprint": prepared.base.fingerprint,
            },
            "data": {
                "name": prepared.task.name,
                "fingerprint": prepared.task.fingerprint,
                "classes": list(prepared.task.classes),
                "rows": {k: len(v.labels) for k, v in prepared.task.splits.items()},
                "checks": prepared.checks,
            },
            "scores": scores,
            "steps": ended["step"] if ended else int(state.step),
            "stopped_early": ended["why"] if ended else None,
            "best_step": int(state.best_step[trial]) if fitted.validated else None,
            "skipped_steps": int(state.skipped[trial]),
            "costs": costs,
            "state": fingerprint(
                own({"trained": state.trained, "opt": state.opt, "key": state.key})
            ),
        }

    def _predictions(self, name: str) -> list[Predictions]:
        """Every trial's predictions of a split, from one pass over it."""
        if name not in self._scored:
            fitted, first = self._fitted, self._prepared.trials[0]
            split = first.task.splits[name]
            self._scored[name] = score_trials(
                lambda batch: fitted.forward(fitted.chosen, fitted.state.dials, batch),
                first.evaluation(name),
                first.task.classes,
                split.groups,
                num_rows=len(split.labels),
                progress=first.settings.run.progress,
            )
        return self._scored[name]


def flat_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The scores as flat numbers, for trackers."""
    found = {}
    for split, metrics in result["scores"].items():
        for name, value in metrics["metrics"].items():
            if value["estimate"] is not None:
                found[f"{split}/{name}"] = value["estimate"]
    return found


def _by_row(predictions: Predictions) -> dict[str, np.ndarray]:
    """What is stored per row; the names of the classes stand in the result."""
    arrays = predictions.arrays()
    return {name: array for name, array in arrays.items() if name != "classes"}
