"""A finished run, judged again: on its own data, or on new data of the same classes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import BadInput
from lowrank.core.spec import build, refuse_targets, spec
from lowrank.data.tasks import CATALOGUE as DATA
from lowrank.run.answering import Answering
from lowrank.run.language import LanguageProblem
from lowrank.run.problem import ALL
from lowrank.run.problems import load_again
from lowrank.run.saying import Said
from lowrank.run.settings import (
    Evaluation,
    check_evaluation,
    check_groups,
    load_plugins,
    plain,
)
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
      split: Name of the split; "all": every row of other data.
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
    """Scores a run on a split of its own data, or of `data` (a data group).

    Rows are cut and grouped as in training, whatever `data.batching` of the other data
    says: a score belongs to the length that the run was trained at.
    """
    if split == ALL and not data:
        raise BadInput(
            f"split={ALL} has the rows in it that the run was trained on: name one of "
            "its splits, or give other data, as +data=table data.path=new.csv"
        )
    settings = dataclasses.replace(run.settings, evaluate=evaluation)
    check_evaluation(evaluation, settings.data.kind)
    if data is not None and not isinstance(data, Mapping):
        raise BadInput(f"data is a group, as +data=table, not {data!r}")
    if data:
        fields = {k: v for k, v in data.items() if k != "batching"}
        source = build(fields, DATA, "data")
        if source.kind != settings.data.kind:
            raise BadInput(
                f"data={fields['name']} are {source.kind}, and the run was trained on "
                f"{settings.data.kind}: give it more of its own kind"
            )
        settings = dataclasses.replace(settings, data=source)
    problem = load_again(settings, run.base, run.facts, split)
    outputs = run.outputs if not merged else _merged(run)

    def predict(batch: Mapping[str, Any]) -> Any:
        inputs = jax.tree.map(jnp.asarray, problem.inputs(batch))
        # A pack of one.
        return jax.tree.map(lambda x: x[None], outputs(inputs))

    (scored,) = problem.score(split, predict, progress)
    options = {"resamples": evaluation.resamples, "level": evaluation.level}
    found = scored.report(**options)
    if isinstance(problem, Answering) and evaluation.answers:
        said = _said(run, problem, split, evaluation, merged, progress)
        found["metrics"] |= problem.compared(split, said, **options)
    scores = {split: found}
    if isinstance(problem, LanguageProblem) and (kept := problem.kept(predict)):
        scores["known"] = kept[0].report(**options)
    return {
        "trial": settings.trial_id,
        "data": {"name": problem.name, "fingerprint": problem.fingerprint},
        "merged": merged,
        "scores": scores,
    }


def _said(
    run: Run,
    problem: Answering,
    split: str,
    evaluation: Evaluation,
    merged: bool,
    progress: bool,
) -> Said:
    assert evaluation.answers is not None
    speaker = problem.speaker(
        split,
        evaluation.answers,
        evaluation.batch_size,
        choose=evaluation.choose(),
        progress=progress,
    )
    adapted, frozen = run.adapted, run.adapted.frozen()
    if merged:
        return speaker.merged(adapted.merge(frozen, run.trained, run.dials))
    # A pack of one.
    trees = jax.tree.map(lambda x: x[None], (run.trained, run.dials))
    (said,) = speaker.unmerged(adapted, frozen, *trees)
    return said


def _merged(run: Run):
    params = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    apply = jax.jit(run.base.outputs)
    return lambda inputs: apply(params, inputs)
