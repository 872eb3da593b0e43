"""A finished run, judged again: on its own data, or on new data of the same classes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build, refuse_targets, spec
from lowrank.data.pipeline import eval_batches
from lowrank.data.tasks import CATALOGUE as DATA
from lowrank.data.tasks import Task
from lowrank.evaluate.score import report, score
from lowrank.run.prepare import max_length, tokenize_all
from lowrank.run.settings import Evaluation, check_groups, load_plugins, plain
from lowrank.run.stored import Run, load_run

_KEYS = ("run", "evaluate", "split", "merged", "data", "plugins")


@spec
class Where:
    """Which run is judged.

    Attributes:
      directory: Of the finished run.
      cache: Folder for bases and prepared data; the run's own if None.
      progress: Progress bar on a terminal.
    """

    directory: str
    cache: str | None = None
    progress: bool = True


@spec
class What:
    """What of it is judged.

    Attributes:
      split: Name of the split.
      merged: Whether the merged weights are scored instead of the factored model.
    """

    split: str = "test"
    merged: bool = False


def evaluate_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Scores a stored run on one split.

    Args:
      config: Composed from `conf/evaluate.yaml`: run.directory, split, merged,
        evaluate, and optionally a data group of the same classes.

    Returns:
      "trial", "data" and "scores", in the form of a run's result.

    Raises:
      BadInput: There is no finished run, no such split, or the classes differ.
    """
    refuse_targets(config)
    check_groups(config, _KEYS)
    load_plugins(config.get("plugins"))
    where = plain(Where, config.get("run"), "run")
    chosen = {name: config[name] for name in ("split", "merged") if name in config}
    what = plain(What, chosen, "config")
    evaluation = plain(Evaluation, config.get("evaluate"), "evaluate")
    return judge(
        load_run(Path(where.directory), cache=where.cache),
        evaluation=evaluation,
        split=what.split,
        merged=what.merged,
        data=config.get("data"),
        progress=where.progress,
    )


def judge(
    run: Run,
    *,
    evaluation: Evaluation,
    split: str = "test",
    merged: bool = False,
    data: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores a run on a split of its own data, or of `data` (a data group)."""
    settings = run.settings
    if data is not None and not isinstance(data, Mapping):
        raise BadInput(f"data is a group, as +data=table, not {data!r}")
    fields = {k: v for k, v in dict(data or {}).items() if k != "batching"}
    source = build(fields, DATA, "data") if data else settings.data
    cache = settings.run.cache
    task = source.load(Path(cache) / "data" if cache else None)
    if split not in task.splits:
        raise UnknownName(f"no split {split!r}; there are {', '.join(task.splits)}")
    limit = max_length(settings, run.base)
    rows = task.splits[split]
    labels = _labels(run, task, split)
    tokens = tokenize_all(task, run.base, limit, cache)[split]
    batching = dataclasses.replace(settings.batching, batch_size=evaluation.batch_size)
    predictions = score(
        _model(run, merged),
        eval_batches(tokens, labels, batching),
        run.classes,
        rows.groups,
        num_rows=len(rows.labels),
        progress=progress,
    )
    found = report(predictions, resamples=evaluation.resamples, level=evaluation.level)
    return {
        "trial": settings.trial_id,
        "data": {"name": task.name, "fingerprint": task.fingerprint},
        "merged": merged,
        "scores": {split: found},
    }


def _labels(run: Run, task: Task, split: str) -> np.ndarray:
    """Labels as the run numbers its classes; new data may lack some of them.

    Raises:
      BadInput: The split has a class that the run does not know.
    """
    known = {name: number for number, name in enumerate(run.classes)}
    labels = task.splits[split].labels
    if odd := [n for c in np.unique(labels) if (n := task.classes[c]) not in known]:
        raise BadInput(
            f"the {split} split of {task.name!r} has {len(odd)} classes that the run "
            f"does not know, as {odd[0]!r}; it knows {len(known)}, as "
            f"{run.classes[0]!r}"
        )
    numbers = [known.get(name, -1) for name in task.classes]
    return np.asarray(numbers, np.int32)[labels]


def _model(run: Run, merged: bool):
    if not merged:
        return run.logits
    params = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    apply = jax.jit(run.base.apply)
    return lambda batch: np.asarray(
        apply(params, {name: jnp.asarray(batch[name]) for name in ("ids", "mask")})
    )
