"""Trials that differ in nothing but their seed are one arm: arms, ranked.

A frame of trials has one row per trial, with columns status, seed, one per setting
(dotted) and one per figure. Only trials that are done count; how many are not is said.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.evaluate.stats import LEVEL, over_seeds

#: Columns of `arm_table` beside the settings that vary.
FIGURES = ("arm", "num_trials", "num_done", "mean", "low", "high")


def arm_table(
    trials: pd.DataFrame,
    varied: Sequence[str],
    metric: str,
    *,
    higher_is_better: bool = True,
    level: float = LEVEL,
) -> pd.DataFrame:
    """One row per arm, the best first.

    Arms with fewer trials done come after those with more: a mean over the seeds that
    happened to survive is no rival to one over all of them.

    Args:
      trials: One row per trial.
      varied: The settings that tell arms apart; seed is none of them.
      metric: Column of the value that ranks.
      higher_is_better: Its direction.
      level: Confidence level of the interval over seeds.

    Returns:
      The columns `varied` and "arm" (their values as a command line would have them),
      "num_trials", "num_done" (with a finite value), "mean", "low", "high" (NaN where
      there is no interval, see `evaluate.stats.over_seeds`).

    Raises:
      UnknownName: There is no such column.
      BadInput: Two trials of one arm that are done have the same seed.
    """
    for name in (*varied, metric, "status", "seed"):
        check_column(trials, name)
    rows = []
    for key, members in _groups(trials, varied):
        done = finished(members, metric)
        if done["seed"].duplicated().any():
            twice = done[done["seed"].duplicated(keep=False)]
            raise BadInput(
                f"{len(twice)} trials are one arm and one seed, such as "
                f"{' and '.join(map(str, twice.get('directory', twice.index)[:2]))}. "
                "Move all but one out of the sweep."
            )
        values = [float(value) for value in done[metric]]
        found = over_seeds(values, level) if values else None
        rows.append(
            {
                **dict(zip(varied, key, strict=True)),
                "arm": arm_label(dict(zip(varied, key, strict=True))),
                "num_trials": len(members),
                "num_done": len(values),
                "mean": _number(found and found.estimate),
                "low": _number(found and found.low),
                "high": _number(found and found.high),
            }
        )
    table = pd.DataFrame(rows, columns=[*varied, *FIGURES])
    order = np.lexsort(
        (
            table["mean"].to_numpy() * (-1 if higher_is_better else 1),
            -table["num_done"].to_numpy(),
        )
    )
    return table.iloc[order].reset_index(drop=True)


def best_over(arms: pd.DataFrame, keep: Sequence[str]) -> pd.DataFrame:
    """For every combination of the settings `keep`, the best arm of an `arm_table`.

    All other settings are thereby chosen, on the values that are shown: the figures of
    what has more arms to choose from are more flattered by it.
    """
    usable = arms[arms["num_done"] > 0]
    if not keep:
        return usable.head(1)
    first = ~usable.duplicated(list(keep))
    return usable[first].sort_values(list(keep)).reset_index(drop=True)


def matched(
    arms: pd.DataFrame, others: Sequence[str], keep: Sequence[str], per: Sequence[str]
) -> pd.DataFrame:
    """The arms whose other settings were tried with every value of `keep`.

    A setting tried at one learning rate only would flatter that rate in a choice of
    the best over the others. Within each combination of `per`, arms stay whose values
    of `others` occur with all the values that `keep` has there; where none do, all
    stay.
    """
    if not others or not len(arms):
        return arms
    told = lambda names: arms[list(names)].astype(str).agg("|".join, axis=1)
    frame = pd.DataFrame(
        {"others": told(others), "keep": told(keep) if keep else "", "per": ""},
        index=arms.index,
    )
    if per:
        frame["per"] = told(per)
    wanted = frame.groupby("per")["keep"].transform("nunique")
    has = frame.groupby(["per", "others"])["keep"].transform("nunique")
    fair = has == wanted
    none = ~fair.groupby(frame["per"]).transform("any")
    return arms[fair | none]


def members(
    trials: pd.DataFrame, arm: pd.Series | dict[str, Any], varied: Sequence[str]
) -> pd.DataFrame:
    """The trials of one row of an `arm_table`."""
    chosen = np.ones(len(trials), bool)
    for name in varied:
        value = arm[name]
        chosen &= (
            trials[name].isna() if _is_missing(value) else trials[name] == value
        ).to_numpy()
    return trials[chosen]


def finished(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The trials that are done and have a finite value."""
    values = pd.to_numeric(trials[metric], errors="coerce")
    return trials[(trials["status"] == "done") & np.isfinite(values)]


def by_seed(trials: pd.DataFrame, metric: str) -> dict[Hashable, float]:
    """seed -> value, of the trials of one arm that are done."""
    done = finished(trials, metric)
    return {seed: float(v) for seed, v in zip(done["seed"], done[metric], strict=True)}


def arm_labels(trials: pd.DataFrame, varied: Sequence[str]) -> pd.Series:
    """The label of every trial's arm, as in the column "arm" of an `arm_table`."""
    labels = [
        arm_label(dict(zip(varied, values, strict=True)))
        for values in trials[list(varied)].itertuples(index=False, name=None)
    ]
    return pd.Series(labels, trials.index, dtype=object)


def arm_label(settings: dict[str, Any]) -> str:
    """Settings as a command line would have them: `delta.rank=8 optim.lr=0.001`."""
    told = [f"{name}={plain(value)}" for name, value in settings.items()]
    return " ".join(told) or "all trials"


def plain(value: Any) -> str:
    """A value of a frame as a person would write it: 8 for 8.0, null for NaN."""
    if _is_missing(value):
        return "null"
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(value)


def check_column(frame: pd.DataFrame, name: str) -> None:
    """Refuses a name that is no column.

    Raises:
      UnknownName: The nearest ones are named.
    """
    if name not in frame:
        raise UnknownName(
            f"the trials have no column {name!r}. Nearest: "
            f"{nearest(name, map(str, frame.columns))}."
        )


def _groups(trials: pd.DataFrame, varied: Sequence[str]):
    if not varied:
        return [((), trials)] if len(trials) else []
    return trials.groupby(list(varied), dropna=False, sort=False)


def _is_missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
