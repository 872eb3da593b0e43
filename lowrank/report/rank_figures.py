"""Ranks that moved, drawn: over time, within their budget, and as they ended.

Every figure is drawn from a history alone, see `io.history`. What a layer is called is
split in two, `place_of`: the kind of weight and the layer's number.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lowrank.io.history import RankHistory
from lowrank.report.arms import numbers
from lowrank.report.drawing import STYLE, Drawing

#: Of a layer that has no correction left.
_NONE = "0.9"
#: Inches that a row of a heat map takes if there is room, and the most of them all.
_ROW, _TALLEST = 0.16, 11.0
#: Inches that the label of a row needs.
_LABEL = 0.11
#: Columns of layers up to which cells of the final ranks say their number.
_TOLD = 48
_TARGET, _USED, _FORWARD = "0.55", to_hex("C0"), to_hex("C1")
#: Moves in the order they are stacked: column, colour, direction.
_MOVES = (
    ("births", "#21918c", 1),
    ("revivals", "#fd9a44", 1),
    ("deaths", "#443983", -1),
)


def draw_ranks(history: RankHistory) -> list[Drawing]:
    """Every figure of this file."""
    return [draw(history) for draw in RANK_DRAWINGS]


def ranks_over_time(history: RankHistory) -> Drawing:
    """Rank per layer (rows, by kind of weight) over the steps of training."""
    places = _ordered(history)
    kinds, depths = [kind for kind, _, _ in places], [depth for _, depth, _ in places]
    edges, rows = _edges(history)
    grid = history.grid[rows][:, [at for _, _, at in places]].T
    height = min(max(_ROW * len(places), 1.2), _TALLEST)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((7.2, 1.1 + height), layout="constrained")
        axes = figure.add_subplot()
        most = int(history.grid.max(initial=0))
        colors, norm = _colors(most)
        axes.pcolormesh(
            edges, np.arange(len(places) + 1) - 0.5, grid, cmap=colors, norm=norm
        )
        axes.invert_yaxis()
        _name_rows(axes, kinds, depths, height / len(places))
        axes.set_ylabel("weight and layer" if any(depths) else "weight")
        _step_axis(axes)
        _rank_bar(figure, axes, colors, norm, most)
    note = (
        "Components that each layer kept, from event to event; grey: none."
        f"{_left_out(kinds)}"
    )
    return Drawing("ranks_over_time", "Rank per layer over time", note, figure)


def budget_over_time(history: RankHistory) -> Drawing:
    """The budget, asked for and used, and how many components each event moved."""
    budget, averages = history.budget, history.averages
    edges, rows = _edges(history)
    with mpl.rc_context(STYLE):
        figure = Figure((7.2, 4.8), layout="constrained")
        top, bottom = figure.subplots(
            2, 1, sharex=True, gridspec_kw={"height_ratios": [2, 1]}
        )
        lines = [("used", _USED, "-", 2.0), ("target", "0.25", "--", 1.2)]
        if history.revivable:
            lines.insert(0, ("forward", _FORWARD, "-", 2.0))
        for name, color, style, width in lines:
            values = budget[name].to_numpy()
            words = "computed with" if name == "forward" else name
            top.stairs(
                values[rows], edges, baseline=None, color=color, ls=style, lw=width,
                label=f"{words}: {values[0]:,} to {values[-1]:,}, "
                f"time average {amount(averages[name])}",
            )  # fmt: skip
        top.axhline(averages["used"], color=_USED, lw=0.8, ls=":")
        top.annotate(
            f"time average of used {amount(averages['used'])}",
            (edges[-1], averages["used"]), (0, 3), textcoords="offset points",
            ha="right", color=_USED, fontsize=8,
        )  # fmt: skip
        highest = float(budget[["target", "used", "forward"]].max().max())
        top.set_ylim(0, 1.08 * max(highest, 1.0))
        top.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        top.set_ylabel(f"budget, {history.unit}")
        figure.legend(loc="outside upper left", ncols=1)
        _moves_panel(bottom, history, edges)
    note = (
        f"Above: the budget in {history.unit} that are kept, as the schedule asked and "
        "as it was used, from event to event. Below: components that each event moved, "
        "of all layers."
    )
    if history.revivable:
        note += (
            " Losers kept their gates until the last event, so training computed with "
            "more than it kept."
        )
    return Drawing("budget_over_time", "Budget and moves", note, figure)


def final_ranks(history: RankHistory) -> Drawing:
    """The ranks that were left: kind of weight (rows) by layer (columns)."""
    places = _ordered(history)
    kinds = list(dict.fromkeys(kind for kind, _, _ in places))
    depths = sorted({depth for _, depth, _ in places}, key=_by_number)
    grid = np.full((len(kinds), len(depths)), math.nan)
    for kind, depth, at in places:
        grid[kinds.index(kind), depths.index(depth)] = history.grid[-1, at]
    width = min(max(0.3 * len(depths), 1.6), 12.0)
    height = min(max(0.3 * len(kinds), 0.6), _TALLEST)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((3.4 + width, 1.1 + height), layout="constrained")
        axes = figure.add_subplot()
        most = int(history.grid[-1].max(initial=0))
        colors, norm = _colors(most)
        axes.imshow(grid, cmap=colors, norm=norm, aspect="auto")
        axes.set_ylabel("weight")
        if len(depths) <= _TOLD and height / len(kinds) > _LABEL:
            _write_cells(axes, grid, colors, norm)
        _name_rows(axes, kinds, [""] * len(kinds), height / len(kinds))
        letters = max(map(len, depths))
        every = math.ceil((0.1 + 0.08 * letters) * len(depths) / width)
        axes.set_xticks(range(0, len(depths), every), depths[::every])
        axes.set_xlabel("layer" if depths != [""] else "")
        _rank_bar(figure, axes, colors, norm, most)
    total = int(history.grid[-1].sum())
    note = (
        f"{total:,} components in {len(history.layers)} layers; a layer of rank 0, in "
        f"grey, has no correction left.{_left_out(kinds)}"
    )
    return Drawing("final_ranks", "Final ranks", note, figure)


#: In the order of a report.
RANK_DRAWINGS: tuple[Callable[[RankHistory], Drawing], ...] = (
    ranks_over_time,
    budget_over_time,
    final_ranks,
)


def place_of(layer: str) -> tuple[str, str]:
    """The kind of weight that a layer is, and its number.

    "encoder/layer[3]/query/kernel" is ("encoder/layer/query/kernel", "3"). Without a
    bracket the first number in the name counts, as models that are not stacked have it:
    "encoder/layer_3/query/kernel" is ("encoder/layer_*/query/kernel", "3"). A layer
    without any number has the number "".
    """
    if found := re.search(r"\[([^\[\]/]*)\]", layer):
        return layer[: found.start()] + layer[found.end() :], found[1]
    if found := re.search(r"\d+", layer):
        return f"{layer[: found.start()]}*{layer[found.end() :]}", found[0]
    return layer, ""


def shorten(kinds: Sequence[str]) -> tuple[list[str], str, str]:
    """Names without the first and last segments that all of them share.

    Returns:
      The names, and what was left out before and behind; none of them gets empty.
    """
    parts = [kind.split("/") for kind in dict.fromkeys(kinds)]
    least = min(map(len, parts))
    before = behind = 0
    if len(parts) > 1:
        while before < least - 1 and len({tuple(p[: before + 1]) for p in parts}) == 1:
            before += 1
        room = least - before - 1
        while behind < room and len({tuple(p[-behind - 1 :]) for p in parts}) == 1:
            behind += 1
    own = [kind.split("/") for kind in kinds]
    short = ["/".join(one[before : len(one) - behind]) for one in own]
    first = parts[0]
    return short, "/".join(first[:before]), "/".join(first[len(first) - behind :])


def amount(value: float) -> str:
    """An average as a person would write it: 53.4, or 6,626,168."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def _ordered(history: RankHistory) -> list[tuple[str, str, int]]:
    """(kind, number, place in the history): kinds as they come, layers by number."""
    found = [(*place_of(layer), at) for at, layer in enumerate(history.layers)]
    kinds = {kind: order for order, (kind, _, _) in reversed([*enumerate(found)])}
    return sorted(found, key=lambda one: (kinds[one[0]], _by_number(one[1])))


def _by_number(depth: str) -> tuple[int, ...]:
    return tuple(int(one) for one in re.findall(r"\d+", depth))


def _edges(
    history: RankHistory,
) -> tuple[Float64[np.ndarray, " edges"], Int64[np.ndarray, " shown"]]:
    """Edges of rows on an axis of steps, and the rows that stood for any."""
    rows = np.flatnonzero(history.durations)
    if not len(rows):
        return np.array([0.0, 1.0]), np.array([len(history.steps) - 1])
    ends = history.steps[rows] + history.durations[rows]
    return np.array([*history.steps[rows], ends[-1]], float), rows


def _colors(most: int) -> tuple[ListedColormap, BoundaryNorm]:
    """A step of viridis per rank, and grey for 0."""
    steps = mpl.colormaps["viridis"](np.linspace(0.05, 1, max(most, 1)))
    colors = ListedColormap([to_rgba(_NONE), *map(tuple, steps)])
    return colors, BoundaryNorm(np.arange(max(most, 1) + 2) - 0.5, colors.N)


def _rank_bar(figure: Figure, axes: Axes, colors: Any, norm: Any, most: int) -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, colors), ax=axes, label="rank, components", fraction=0.06,
        aspect=24, pad=0.02,
    )  # fmt: skip
    ticks = MaxNLocator(9, integer=True, steps=[1, 2, 4, 5, 10])
    shown = ticks.tick_values(0, max(most, 1))
    bar.set_ticks([tick for tick in shown if 0 <= tick <= max(most, 1)])
    bar.minorticks_off()


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _name_rows(
    axes: Axes, kinds: Sequence[str], depths: Sequence[str], inches: float
) -> None:
    """Every kind once, at the middle of its rows; their numbers as far as they fit."""
    short, _, _ = shorten(kinds)
    starts = [at for at in range(len(kinds)) if not at or kinds[at] != kinds[at - 1]]
    ends = [*starts[1:], len(kinds)]
    room = inches * len(kinds) / len(starts)
    every = max(math.ceil(_LABEL / room), 1)
    shown = [*zip(starts, ends, strict=True)][::every]
    axes.set_yticks([(a + b - 1) / 2 for a, b in shown], [short[a] for a, _ in shown])
    size = 8 if room > 0.13 else 6.5
    numbered = any(depths)
    axes.tick_params(axis="y", length=0, pad=20 if numbered else 3, labelsize=size)
    if numbered:
        step = max(math.ceil(_LABEL / inches), 1)
        # Counted within each kind, so that all kinds show the same numbers, none of
        # them close to the first one of the next kind.
        picked = [
            at
            for a, b in zip(starts, ends, strict=True)
            for at in range(a, b, step)
            if at == a or b - at >= step
        ]
        # A number in the middle of a kind stands where the kind's name does.
        axes.yaxis.remove_overlapping_locs = False
        axes.set_yticks(picked, [depths[at] for at in picked], minor=True)
        axes.tick_params(axis="y", which="minor", length=2, pad=1, labelsize=6.5)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", lw=1.5)


def _write_cells(
    axes: Axes, grid: Float64[np.ndarray, "kinds depths"], colors: Any, norm: Any
) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if math.isnan(value):
            continue
        red, green, blue, _ = colors(norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip


def _moves_panel(
    axes: Axes, history: RankHistory, edges: Float64[np.ndarray, " edges"]
) -> None:
    """Births and revivals upward, deaths downward, at the step of their event."""
    events = history.moves["event"].to_numpy()
    steps = history.steps[1:]
    gaps = np.diff(steps)[np.diff(steps) > 0]
    span = edges[-1] - edges[0]
    width = min(0.7 * gaps.min(initial=span / 12), span / 12)
    base = np.zeros(history.num_events)
    for name, color, sign in _MOVES:
        moved = numbers(history.moves, name)
        values = sign * np.bincount(events, moved, history.num_events + 1)[1:]
        if values.any():
            below = base if sign > 0 else np.zeros_like(base)
            axes.bar(steps, values, width, bottom=below, color=color, label=name)
            base = below + values if sign > 0 else base
    axes.axhline(0, color="0.3", lw=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_ylabel("moved, components")
    _step_axis(axes)
    axes.set_xlim(edges[0], edges[-1])
    if len(events):
        axes.legend(loc="best", ncols=3)


def _left_out(kinds: Sequence[str]) -> str:
    """What names on an axis lack, since all of them have it."""
    _, before, behind = shorten(kinds)
    told = [f"begin with {before}/"] * bool(before) + [f"end in /{behind}"] * bool(
        behind
    )
    return f" All names {' and '.join(told)}." if told else ""
