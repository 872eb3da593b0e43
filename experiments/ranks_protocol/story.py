"""A study that was made, as frames and figures: what a notebook shows of it.

Nothing is trained and nothing is computed anew: intervals and verdicts are those of the
results that `report.write` left.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.ranks_protocol.arms import BASELINE, ORACLE
from experiments.ranks_protocol.training import SCHEMA
from lowrank.core.errors import BadInput
from lowrank.report.drawing import MARKERS, STYLE, colors

Found = Mapping[str, Any]


def load(path: str | Path) -> Found:
    """The results of a study.

    Args:
      path: Of the JSON file.

    Raises:
      BadInput: There is no such file, or it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(
            f"{path} cannot be read as results of a study: {error}"
        ) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BadInput(
            f"{path} holds no results of a study with schema {SCHEMA}; write them with "
            "python -m experiments.ranks_protocol"
        )
    return found


def outcomes(found: Found) -> pd.DataFrame:
    """What was wanted, task by task, and what became of it."""
    return pd.DataFrame(found["outcomes"])


def arms(found: Found, task: str) -> pd.DataFrame:
    """One row per arm: error, difference to uniform with its interval, budgets.

    Raises:
      BadInput: The study has no such task.
    """
    own, rows = _task(found, task), []
    for row in own["rows"]:
        ratio = (row["ratio"] or {}).get("difference") or {}
        rows.append(
            {
                "arm": row["arm"],
                "rate": row["rate"],
                "rate at end of grid": row["at_end"],
                "error": row["error"],
                "to uniform": ratio.get("estimate"),
                "low": ratio.get("low"),
                "high": ratio.get("high"),
                "p (Holm)": row["p"],
                "verdict": row["verdict"],
                "misallocation": row["misallocation"]["estimate"],
                "components, final": row["final_components"],
                "components, average": row["average_components"],
                "FLOPs of uniform in corrected weights": row["open_flops"],
            }
        )
    return pd.DataFrame(rows).set_index("arm")


def teachers(found: Found) -> list[str]:
    """The tasks with targets of a teacher, whose errors are compared as ratios."""
    return [name for name, own in found["tasks"].items() if not own["in_points"]]


def ratios(found: Found) -> Figure:
    """Log-ratio to uniform of every arm, with intervals; a panel per teacher."""
    names = teachers(found)
    if not names:
        raise BadInput("the study has no teacher to show ratios of")
    labels = [a for a in found["protocol"]["arms"] if a != BASELINE]
    with mpl.rc_context(STYLE):
        figure = Figure(
            (1.4 + 2.1 * len(names), 0.9 + 0.27 * len(labels)), layout="constrained"
        )
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            table = arms(found, name)
            own = [a for a in labels if a in table.index]
            # An arm that a task leaves out keeps its empty row.
            places = [labels.index(a) for a in own]
            _bars(axes, table.loc[own], places, "C0")
            axes.axvline(0, color="0.5", linewidth=0.8)
            axes.set_title(name)
            axes.set_yticks(range(len(labels)), labels)
        panels[0].invert_yaxis()
        figure.supxlabel("log of the error over that of uniform; negative is better")
    return figure


def _bars(axes: Axes, table: pd.DataFrame, places: Sequence[int], color: str) -> None:
    middle = table["to uniform"].to_numpy(float)
    # Where all seeds agree there is no interval, and the dot is all there is.
    ends = [table[name].fillna(table["to uniform"]).to_numpy(float) for name in
            ("low", "high")]  # fmt: skip
    away = np.abs(np.stack(ends) - middle)
    axes.errorbar(middle, places, xerr=away, fmt="o", markersize=4, color=color)


def ranks(found: Found, task: str, seed: int | None = None) -> Figure:
    """Final rank per layer of one seed, beside what its teacher has.

    Every seed has a teacher of its own, whose layers stand in another order: a mean
    over seeds would hide what each one found.

    Args:
      found: The results.
      task: Its name.
      seed: One of those that were judged; the first one by default.

    Raises:
      BadInput: The study has no such task or seed, or no arm of it ended.
    """
    whole = _task(found, task)
    judged, layers = whole["judged"], whole["layers"]
    seeds = [one["seed"] for one in next(iter(judged.values()))]
    seed = seeds[0] if seed is None else seed
    own = {a: one for a, rows in judged.items() for one in rows if one["seed"] == seed}
    rows = {arm: one["ranks"] for arm, one in own.items()}
    truth = next((one["truth"] for one in own.values() if one["truth"]), None)
    shown = {n: row for n, row in {"the teacher": truth, **rows}.items() if row}
    if not shown:
        raise BadInput(
            f"no arm of {task!r} was trained to its end with seed {seed}; the seeds "
            f"are {', '.join(map(str, seeds))}"
        )
    grid = np.array([*shown.values()])
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            (2.0 + 0.42 * min(len(layers), 24), 1.0 + 0.27 * len(shown)),
            layout="constrained",
        )
        axes = figure.add_subplot()
        image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=0)
        if len(layers) <= 16:
            for (row, column), value in np.ndenumerate(grid):
                dark = value < 0.55 * grid.max()
                axes.text(
                    column, row, f"{value:g}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
        axes.set_yticks(range(len(shown)), [*shown])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer, in the order of the model")
        figure.colorbar(image, label=f"components, seed {seed}")
    return figure


def rates(found: Found, task: str) -> Figure:
    """How every arm chose its learning rate: mean error of the tuning seeds.

    Raises:
      BadInput: The study has no such task, or nothing to choose from.
    """
    own = _task(found, task)
    if not own["tuned"]:
        raise BadInput(f"the arms of {task!r} had one learning rate to choose from")
    with mpl.rc_context(STYLE):
        figure = Figure((6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        looks = zip(colors(len(own["tuned"])), own["tuned"].items(), strict=True)
        for number, (color, (arm, records)) in enumerate(looks):
            tried = sorted({one["rate"] for one in records})
            middle = [_middle(records, rate, own["in_points"]) for rate in tried]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(tried, middle, color=color, marker=marker, label=arm)
        axes.set_xscale("log")
        axes.set_xticks(own["grid"], [f"{rate:g}" for rate in own["grid"]])
        axes.minorticks_off()
        if not own["in_points"]:
            axes.set_yscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("error, tuning seeds")
        axes.set_title(task)
        figure.legend(loc="outside right upper")
    return figure


def _middle(
    records: Sequence[Mapping[str, Any]], rate: float, in_points: bool
) -> float:
    """Mean error at a rate: of its logarithm where errors are ratios."""
    of = np.array(
        [o["error"] for o in records if o["rate"] == rate and o["error"] is not None]
    )
    return float(of.mean() if in_points else np.exp(np.log(of).mean()))


def texts(found: Found) -> Figure:
    """Real text: points of error beside uniform against the budget, per source.

    Raises:
      BadInput: The study has no part on real text.
    """
    sources: dict[str, dict[int, pd.DataFrame]] = {}
    for name, own in found["tasks"].items():
        if own["in_points"]:
            source, _, rank = name.rpartition("@")
            sources.setdefault(source, {})[int(rank)] = arms(found, name)
    if not sources:
        raise BadInput("the study has no real text; see conf/size for one that has")
    left_out = (BASELINE, ORACLE)
    first = next(iter(next(iter(sources.values())).values()))
    names = [arm for arm in first.index if arm not in left_out]
    with mpl.rc_context(STYLE):
        figure = Figure((1.4 + 2.4 * len(sources), 3.4), layout="constrained")
        panels = figure.subplots(1, len(sources), sharey=True, squeeze=False)[0]
        for axes, (source, tables) in zip(panels, sources.items(), strict=True):
            for number, (color, arm) in enumerate(
                zip(colors(len(names)), names, strict=True)
            ):
                middle, low, high = (
                    100 * np.array([table.loc[arm, name] for table in tables.values()],
                                   float)
                    for name in ("to uniform", "low", "high")
                )  # fmt: skip
                # Arms side by side, so that their intervals can be told apart.
                places = np.arange(len(tables)) + 0.12 * (number - (len(names) - 1) / 2)
                away = np.abs(np.nan_to_num(np.stack([low, high]) - middle))
                axes.errorbar(
                    places, middle, yerr=away, color=color, linestyle="none",
                    marker=MARKERS[number % len(MARKERS)], markersize=4, label=arm,
                )  # fmt: skip
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.set_xticks(range(len(tables)), [str(rank) for rank in tables])
            axes.set_title(source)
        panels[0].set_ylabel("points of error to uniform")
        figure.supxlabel("components per layer, on average")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def _task(found: Found, task: str) -> Mapping[str, Any]:
    if task not in found["tasks"]:
        raise BadInput(
            f"the study has no task {task!r}; it has {', '.join(found['tasks'])}"
        )
    return found["tasks"][task]
