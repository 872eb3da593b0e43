"""Trials that differ in nothing but their seed are one arm: arms, ranked.

A frame of trials has one row per trial, with columns status, seed, one per setting
(dotted) and one per figure. Only trials that are done count; how many are not is said.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64

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
    found = []
    for key, own in groups(trials, varied):
        done = finished(own, metric)
        values = numbers(done, metric).tolist()
        _check_seeds(done)
        interval = over_seeds(values, level) if values else None
        figures = [
            interval and getattr(interval, n) for n in ("estimate", "low", "high")
        ]
        settings = dict(zip(varied, key, strict=True))
        found.append([*key, arm_label(settings), len(own), len(values), *figures])
    table = pd.DataFrame(found, columns=pd.Index([*varied, *FIGURES]))
    sign = -1 if higher_is_better else 1
    for name in FIGURES[3:]:
        table[name] = numbers(table, name)
    order = np.lexsort((sign * numbers(table, "mean"), -numbers(table, "num_done")))
    return table.take(order).reset_index(drop=True)


def best_over(arms: pd.DataFrame, keep: Sequence[str]) -> pd.DataFrame:
    """For every combination of the settings `keep`, the best arm of an `arm_table`.

    All other settings are thereby chosen, on the values that are shown: the figures of
    what has more arms to choose from are more flattered by it.

    Returns:
      One row each, in the order of `keep`; missing settings come last.
    """
    usable = rows(arms, numbers(arms, "num_done") > 0).reset_index(drop=True)
    best = sorted(groups(usable, keep), key=lambda group: _order(group[0]))
    return usable.take([int(own.index[0]) for _, own in best]).reset_index(drop=True)


def matched(
    arms: pd.DataFrame, others: Sequence[str], keep: Sequence[str], per: Sequence[str]
) -> pd.DataFrame:
    """The arms whose other settings were tried with every value of `keep`.

    A setting tried at one learning rate only would flatter that rate in a choice of
    the best over the others. Within each combination of `per`, arms stay whose values
    of `others` occur with all the values that `keep` has there; where none do, all
    stay.
    """
    stay = []
    for _, within in groups(arms.reset_index(drop=True), per):
        wanted = {key for key, _ in groups(within, keep)}
        tried = [own for _, own in groups(within, others)]
        fair = [own for own in tried if {k for k, _ in groups(own, keep)} == wanted]
        stay += [int(place) for own in fair or tried for place in own.index]
    return arms.take(sorted(stay))


def members(
    trials: pd.DataFrame, arm: Mapping[str, Any], varied: Sequence[str]
) -> pd.DataFrame:
    """The trials of one row of an `arm_table`."""
    wanted = _key(arm, varied)
    return rows(trials, [_key(one, varied) == wanted for one in records(trials)])


def finished(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The trials that are done and have a finite value."""
    done = np.array([status == "done" for status in trials["status"]], bool)
    return rows(trials, done & np.isfinite(numbers(trials, metric)))


def groups(
    frame: pd.DataFrame, names: Sequence[str]
) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The rows with equal values of `names`, as they come; NaN counts as None.

    Without names, all rows are one group; without rows, there is none.
    """
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(records(frame)):
        places.setdefault(_key(row, names), []).append(place)
    return [(key, frame.take(own)) for key, own in places.items()]


def rows(frame: pd.DataFrame, chosen: Any) -> pd.DataFrame:
    """The rows for which `chosen`, one truth value per row, holds."""
    return frame.take(np.flatnonzero(np.asarray(chosen, bool)))


def numbers(frame: pd.DataFrame, name: str) -> Float64[np.ndarray, " rows"]:
    """A column as numbers; what is none is NaN."""
    return np.asarray(pd.to_numeric(frame[name], errors="coerce"), np.float64)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame, each as column -> value."""
    names = list(map(str, frame.columns))
    cells = [frame[name].tolist() for name in frame.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def by_seed(trials: pd.DataFrame, metric: str) -> dict[Hashable, float]:
    """seed -> value, of the trials of one arm that are done."""
    done = finished(trials, metric)
    return {one["seed"]: float(one[metric]) for one in records(done)}


def arm_labels(trials: pd.DataFrame, varied: Sequence[str]) -> pd.Series:
    """The label of every trial's arm, as in the column "arm" of an `arm_table`."""
    labels = [
        arm_label(dict(zip(varied, _key(one, varied), strict=True)))
        for one in records(trials)
    ]
    return pd.Series(labels, trials.index, dtype=object)


def arm_label(settings: Mapping[str, Any]) -> str:
    """Settings as a command line would have them: `delta.rank=8 optim.lr=0.001`."""
    told = [f"{name}={plain(value)}" for name, value in settings.items()]
    return " ".join(told) or "all trials"


def plain(value: Any) -> str:
    """A value of a frame as a person would write it: 8 for 8.0, null for NaN."""
    if is_missing(value):
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


def _check_seeds(done: pd.DataFrame) -> None:
    seen: dict[Any, Any] = {}
    for one in records(done):
        if one["seed"] in seen:
            raise BadInput(
                f"two trials are one arm and have seed {plain(one['seed'])}: "
                f"{seen[one['seed']]} and {one.get('directory')}. Move one of them out "
                "of the sweep."
            )
        seen[one["seed"]] = one.get("directory")


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(None if is_missing(row[name]) else row[name] for name in names)


def _order(key: tuple[Any, ...]) -> list[tuple[bool, bool, Any]]:
    """Numbers by size, then texts, then what is missing."""
    return [
        (one is None, isinstance(one, str), "" if one is None else one) for one in key
    ]


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN or their like."""
    return value is None or bool(pd.isna(value))
