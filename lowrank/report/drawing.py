"""What the figures of a sweep have in common: what they show, their look, their axes.

Colours are steps of viridis, which colour-blind readers can tell apart, and every
series has a marker of its own. No figure takes part in the state of pyplot.
"""

import base64
import dataclasses
import html
import io
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from lowrank.report.arms import (
    arm_table,
    best_over,
    finished,
    groups,
    is_missing,
    matched,
    members,
    numbers,
    plain,
    records,
    rows,
)
from lowrank.report.tables import METRICS

RATE, RANK, DELTA = "optim.lr", "delta.rank", "delta.name"
Color = tuple[float, ...]
MARKERS = "osD^vP*X<>"
#: Of every figure; matplotlib types the names of its settings.
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 160,
    # The same figure gives the same file.
    "svg.hashsalt": "lowrank",
}


@dataclasses.dataclass(frozen=True)
class Trials:
    """What figures are drawn from.

    Attributes:
      frame: One row per trial, as `sweeps.load` makes it.
      varied: The settings, beside seed, that differ.
      metric: Column of the value, as `best.accuracy`.
      higher_is_better: Its direction.
    """

    frame: pd.DataFrame
    varied: Sequence[str]
    metric: str
    higher_is_better: bool = True

    @cached_property
    def arms(self) -> pd.DataFrame:
        """See `report.arms.arm_table`; only arms with a trial that is done."""
        arms = arm_table(
            self.frame, self.varied, self.metric, higher_is_better=self.higher_is_better
        )
        return rows(arms, numbers(arms, "num_done") > 0)

    @cached_property
    def looks(self) -> dict[str, tuple[Color, str]]:
        """The colour and marker of every line, the same in all panels."""
        names = [name for name, _ in series_of(self, self.arms)]
        return {
            name: (color, MARKERS[number % len(MARKERS)])
            for number, (name, color) in enumerate(
                zip(names, colors(len(names)), strict=True)
            )
        }

    @property
    def label(self) -> str:
        """The value with its unit, for an axis."""
        name = self.metric.partition(".")[2]
        words, share = self._words(name)
        unit = ", %" if share else ", nats" if name == "log_loss" else ""
        return f"validation {words}{unit}"

    @property
    def scale(self) -> float:
        """100 for a share, which is shown in percent."""
        return 100.0 if self._words(self.metric.partition(".")[2])[1] else 1.0

    @property
    def series(self) -> list[str]:
        """The settings that make a line of its own: rank, and kind of delta."""
        return [name for name in (DELTA, RANK) if name in self.varied]

    def values(self, name: str) -> list[float]:
        """The different numbers of a setting among the arms."""
        if name not in self.varied:
            return []
        found = numbers(self.arms, name)
        return sorted(set(found[np.isfinite(found)].tolist()))

    def chosen(self, keep: Sequence[str], per: Sequence[str] = ()) -> pd.DataFrame:
        """The best arm for each combination of `keep`, fairly where that can be."""
        others = self.others(keep)
        inner = [name for name in keep if name not in per]
        return best_over(matched(self.arms, others, inner, per), keep)

    def others(self, keep: Sequence[str]) -> list[str]:
        """The settings that vary beside `keep`."""
        return [name for name in self.varied if name not in keep]

    def seeds(self, arm: Mapping[str, Any]) -> np.ndarray:
        """The values of an arm's trials, scaled."""
        own = finished(members(self.frame, arm, self.varied), self.metric)
        return self.scale * numbers(own, self.metric)

    @staticmethod
    def _words(name: str) -> tuple[str, bool]:
        known = {key: (heading, share) for key, heading, share in METRICS}
        return known.get(name, (name.replace("_", " "), False))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with what has to be said about it; without one, why there is none.

    Notebooks show it as it is.
    """

    name: str
    title: str
    note: str
    figure: Figure | None = None

    def save(self, folder: Path) -> list[Path]:
        """Writes ``<name>.png`` and ``<name>.svg``; nothing without a figure."""
        if self.figure is None:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.{kind}" for kind in ("png", "svg")]
        with mpl.rc_context(STYLE):
            self.figure.savefig(paths[0])
            self.figure.savefig(paths[1], metadata={"Date": None})
        return paths

    def _repr_html_(self) -> str:
        told = f"<b>{html.escape(self.title)}.</b> {html.escape(self.note)}"
        if self.figure is None:
            return f"<p>{told}</p>"
        file = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(file, format="png")
        data = base64.b64encode(file.getvalue()).decode()
        style = f"width: {100 * self.figure.get_figwidth():.0f}px; max-width: 100%"
        image = f'<img src="data:image/png;base64,{data}" style="{style}">'
        return f"<figure>{image}<figcaption>{told}</figcaption></figure>"


def lines(axes: Axes, trials: Trials, best: pd.DataFrame, x: str) -> None:
    """One line per series through the means, with seeds and their range."""
    for name, own in series_of(trials, best):
        color, marker = trials.looks[name]
        own = rows(own, np.isfinite(numbers(own, x)))
        arms = sorted(records(own), key=lambda arm: arm[x])
        places = [float(arm[x]) for arm in arms]
        seeds = [trials.seeds(arm) for arm in arms]
        low, high = [s.min() for s in seeds], [s.max() for s in seeds]
        axes.fill_between(places, low, high, color=color, alpha=0.15, lw=0)
        means = [s.mean() for s in seeds]
        axes.plot(places, means, marker=marker, ms=4.5, color=color, label=name)
        for place, values in zip(places, seeds, strict=True):
            axes.plot([place] * len(values), values, ".", ms=3, color=color, alpha=0.5)


def series_of(trials: Trials, arms: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The arms by what makes a line of its own, in order, named."""
    ordered = best_over(arms, trials.series)
    found = {key: own for key, own in groups(arms, trials.series)}
    keys = [key for key, _ in groups(ordered, trials.series)]
    return [(name_of(records(found[key])[0]), found[key]) for key in keys]


def name_of(arm: Mapping[str, Any]) -> str:
    """What a line is called: `lora, rank 8`, as far as these vary."""
    rank, delta = arm.get(RANK), arm.get(DELTA)
    told = [] if is_missing(delta) else [plain(delta)]
    told += [] if is_missing(rank) else [f"rank {plain(rank)}"]
    return ", ".join(told)


def colors(count: int) -> list[Color]:
    """Steps of viridis without its pale end, which vanishes on white."""
    places = np.linspace(0.15, 0.85, count) if count > 1 else [0.3]
    return [tuple(mpl.colormaps["viridis"](place)) for place in places]


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side, three in a row, with one value axis for all."""
    columns = min(count, 3)
    height = math.ceil(count / columns)
    figure = Figure((1.6 + 2.9 * columns, 0.4 + 3.0 * height), layout="constrained")
    parts = figure.subplots(height, columns, sharey=True, squeeze=False).ravel()
    for spare in parts[count:]:
        spare.remove()
    return figure, list(parts[:count])


def log_axis(axes: Axes, values: list[float], label: str, base: int = 10) -> None:
    """A logarithmic axis; linear from 0 to the smallest amount if there is a 0."""
    if values and values[0] <= 0:
        step = min(abs(value) for value in values if value)
        axes.set_xscale("symlog", linthresh=step, linscale=0.5)
    else:
        axes.set_xscale("log", base=base)
    _ticks(axes, values)
    axes.set_xlabel(label)


def amount_axis(
    axes: Axes, amounts: Float64[np.ndarray, " arms"], label: str, unit: str
) -> None:
    """An axis of large or small amounts, as 42 ms; logarithmic if they span much."""
    if amounts.min() > 0 and amounts.max() / amounts.min() > 3:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.set_xlabel(label)


def _ticks(axes: Axes, values: list[float]) -> None:
    """Ticks where there are trials, while they fit."""
    if len(values) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, parts: Sequence[Axes]) -> None:
    """The names of the lines, beside the axes; none if there is one line only."""
    named = {}
    for axes in parts:
        handles, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    if any(named):
        figure.legend(named.values(), named.keys(), loc="outside right upper")


def rest(trials: Trials, keep: Sequence[str]) -> str:
    """What became of the settings that the figure does not show."""
    others = trials.others(keep)
    if not others:
        return ""
    return (
        f" Other settings ({', '.join(others)}) are at their best by that mean, among "
        "those tried everywhere if there are such."
    )


def absent(name: str, title: str, setting: str) -> Drawing:
    """In place of a figure whose axis would have one point."""
    note = f"Not drawn: {setting} takes no two values in the trials that are done."
    return Drawing(name, title, note)
