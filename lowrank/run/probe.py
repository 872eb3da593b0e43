"""The frozen probe of a trial's own base, data and splits: what no adaptation gives."""

import logging
import time
from typing import Any

import jax
import numpy as np

from lowrank.core.errors import BadInput
from lowrank.evaluate.probe import fit_probe
from lowrank.evaluate.score import Predictions, report
from lowrank.run.forward import inputs_of
from lowrank.run.pictured import Pictured
from lowrank.run.prepare import Prepared

logger = logging.getLogger(__name__)


def run_probe(prepared: Prepared) -> dict[str, Any]:
    """Logistic regression on pooled features of the frozen base.

    The regularization constant is chosen on the validation split and the classifier
    refitted on train and validation, so it sees the same rows as a run that is
    refitted.

    Returns:
      The scores of the test split, in the form of a run's, and the seconds taken.

    Raises:
      BadInput: There is no validation split to choose the constant on, no test
        split, or the rows have no classes.
    """
    problem = prepared.problem
    if not isinstance(problem, Pictured):
        problem = prepared.labeled
    task = problem.task
    for split in ("validation", "test"):
        if split not in task.splits:
            raise BadInput(
                f"the frozen probe needs a {split} split, and {task.name!r} "
                "has none (data.train_on_validation merges it into train)"
            )
    began = time.perf_counter()
    base = problem.base
    forward = jax.jit(base.features)
    params = base.params
    splits = task.splits
    settings = prepared.settings

    def features(split: str) -> np.ndarray:
        rows = prepared.evaluation(split)
        found = [np.asarray(forward(params, inputs_of(batch))) for batch in rows]
        index = np.concatenate([batch["index"] for batch in rows])
        kept = np.concatenate(found)[index >= 0]
        return kept[np.argsort(index[index >= 0])]

    logger.info("embedding the rows for the frozen probe")
    given = {name: (features(name), split.labels) for name, split in splits.items()}
    probe = fit_probe(
        given["train"],
        given["validation"],
        given["test"][0],
        len(task.classes),
        refit=True,
    )
    test = splits["test"]
    predictions = Predictions(
        np.arange(len(test.labels)),
        probe.logits,
        test.labels,
        tuple(task.classes),
        None if test.groups is None else np.asarray(test.groups),
    )
    evaluation = settings.evaluate
    found = report(predictions, resamples=evaluation.resamples, level=evaluation.level)
    return {
        "scores": {"test": found},
        "strength": probe.strength,
        "seconds": time.perf_counter() - began,
    }
