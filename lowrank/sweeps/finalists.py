"""Finalists: chosen on validation numbers, written down, and only then tested.

A test score that had a say in any choice is no longer a test score. So the choice is
made from validation numbers, stored in finalists.json before the first test score of
the sweep is looked at, and never changed: whoever wants other finalists has to remove
that file by hand, and to say that the test split had been seen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.io.files import now
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.io.view import load_record
from lowrank.report.arms import finished, members, numbers, records, rows
from lowrank.run.judge import judge
from lowrank.run.stored import load_run

#: The choice, in the directory of the sweep.
FINALISTS = "finalists.json"
#: run directory -> the scores of the test split as a result has them.
Score = Callable[[Path], Mapping[str, Any]]


def best_arms(
    trials: pd.DataFrame, arms: pd.DataFrame, varied: Sequence[str], metric: str, k: int
) -> pd.DataFrame:
    """The finished trials of the first `k` arms of a ranked table.

    Returns:
      Rows of `trials` with the columns place (1 for the best arm) and arm in front.

    Raises:
      BadInput: There are not `k` arms with a finished trial.
    """
    usable = rows(arms, numbers(arms, "num_done") > 0)
    if not 1 <= k <= len(usable):
        raise BadInput(
            f"{len(usable)} arms of the sweep have a finished trial with a value, so "
            f"{k} of them cannot be finalists; ask for 1 to {len(usable)}"
        )
    parts = []
    for place, arm in enumerate(records(usable.head(k)), start=1):
        own = finished(members(trials, arm, varied), metric).copy()
        own.insert(0, "place", place)
        own.insert(1, "arm", arm["arm"])
        parts.append(own)
    return pd.concat(parts, ignore_index=True)


def unseal(
    directory: Path,
    trials: pd.DataFrame,
    finalists: pd.DataFrame | Sequence[str],
    score: Score | None = None,
) -> pd.DataFrame:
    """Test scores of the finalists, after their names are stored for good.

    Scores are those of the trial's own result, if it was judged on the test split; else
    they are made now, which loads the base of each.

    Args:
      directory: Of the sweep.
      trials: All of its trials.
      finalists: What `Sweep.finalists` gave, or ids of trials.
      score: Replaces `judge_test`.

    Returns:
      One row per finalist: trial, seed, `test.<metric>`, and `test.<metric>.low` and
      `.high`, the interval over rows.

    Raises:
      BadInput: A trial is not done, or other finalists were chosen before.
      UnknownName: No trial is called so.
      Corrupt: finalists.json or a record is damaged.
    """
    if isinstance(finalists, pd.DataFrame):
        finalists = finalists["trial"].tolist()
    chosen = sorted(set(map(str, finalists)))
    own = _rows(trials, chosen)
    _store(directory / FINALISTS, chosen)
    rows = []
    for trial in records(own):
        found = _stored(directory / trial["directory"])
        found = found or (score or judge_test)(directory / trial["directory"])
        row = {"trial": trial["trial"], "seed": trial["seed"]}
        for name, value in found["metrics"].items():
            row[f"test.{name}"] = value["estimate"]
            row |= {f"test.{name}.{end}": value[end] for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def judge_test(directory: Path) -> Mapping[str, Any]:
    """The scores of a finished run on the test split of its own data."""
    run = load_run(directory)
    evaluation = dataclasses.replace(run.settings.evaluate, test=True)
    judged = judge(run, evaluation=evaluation, split="test", progress=False)
    return judged["scores"]["test"]


def _stored(directory: Path) -> Mapping[str, Any] | None:
    result = load_record(directory).result or {}
    return result.get("scores", {}).get("test")


def _rows(trials: pd.DataFrame, chosen: Sequence[str]) -> pd.DataFrame:
    """The rows of the chosen trials, in the order of `trials`."""
    if not chosen:
        raise BadInput("no finalist is named; choose them with Sweep.finalists(k)")
    known = set(trials["trial"])
    for name in chosen:
        if name not in known:
            raise UnknownName(
                f"no trial of the sweep is called {name!r}. Nearest: "
                f"{nearest(name, known)}."
            )
    own = rows(trials, trials["trial"].isin(chosen)).drop_duplicates("trial")
    for trial in records(own):
        if trial["status"] != "done":
            raise BadInput(
                f"trial {trial['trial']} is {trial['status']}, and only a trial that "
                "is done can be a finalist; finish it with the sweep's own command"
            )
    return own


def _store(path: Path, chosen: Sequence[str]) -> None:
    """Writes the choice, or refuses another one than is there."""
    if not path.exists():
        write_sealed(path, {"trials": list(chosen), "chosen": now()})
        return
    stored = read_sealed(path)
    if stored["trials"] != list(chosen):
        raise BadInput(
            f"{path} names {len(stored['trials'])} other finalists, chosen "
            f"{stored['chosen']}, whose test scores may have been seen: "
            f"{', '.join(stored['trials'][:3])}, not {', '.join(chosen[:3])}. "
            "Test those. To choose again, remove the file, and say so wherever the "
            "scores are told."
        )
