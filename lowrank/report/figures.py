"""What a sweep shows, drawn: from frames of trials, for files and notebooks alike.

Each figure shows the single seeds, not only their mean. One that has nothing to show
says why instead.
"""

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank.report.arms import finished, groups, members, numbers, records, rows
from lowrank.report.drawing import (
    DELTA,
    MARKERS,
    RANK,
    RATE,
    STYLE,
    Color,
    Drawing,
    Trials,
    absent,
    amount_axis,
    colors,
    legend,
    lines,
    log_axis,
    name_of,
    panels,
    rest,
    series_of,
)

#: Settings that regularise, beside the whole group `penalty`.
REGULARIZERS = (
    "delta.dropout",
    "delta.rank_dropout",
    "optim.weight_decay",
    "optim.label_smoothing",
)
#: Costs to set quality against: column, axis label, unit, whether a pack shares it.
COSTS = (
    ("costs.trained_parameters", "trained parameters", "", False),
    ("costs.step_flops", "FLOPs of a step, per trial", "", True),
    ("costs.step_median_seconds", "time of a step, per trial", "s", True),
)


def draw_all(trials: Trials) -> list[Drawing]:
    """Every figure of this file, drawn or with the reason why not."""
    return [draw(trials) for draw in DRAWINGS]


def rate_curves(trials: Trials) -> Drawing:
    """Value against learning rate, one line per rank, single seeds and their range."""
    title = "Learning-rate curves"
    if len(trials.values(RATE)) < 2:
        return absent("rate_curves", title, RATE)
    with mpl.rc_context(STYLE):
        figure = Figure((6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        keep = [*trials.series, RATE]
        lines(axes, trials, trials.chosen(keep, trials.series), RATE)
        log_axis(axes, trials.values(RATE), "learning rate (optim.lr)")
        axes.set_ylabel(trials.label)
        legend(figure, [axes])
    note = f"Line: mean over seeds; dots: seeds; band: their range.{rest(trials, keep)}"
    return Drawing("rate_curves", title, note, figure)


def heat_map(trials: Trials) -> Drawing:
    """The mean over seeds for every rank and learning rate."""
    title = "Rank and learning rate"
    for name in (RANK, RATE):
        if len(trials.values(name)) < 2:
            return absent("heat_map", title, name)
    best = {(arm[RANK], arm[RATE]): arm for arm in records(trials.chosen([RANK, RATE]))}
    ranks, rates = trials.values(RANK), trials.values(RATE)
    cell = lambda *pair: best[pair]["mean"] if pair in best else math.nan
    values = trials.scale * np.array([[cell(k, lr) for lr in rates] for k in ranks])
    winner = np.nanargmax(values if trials.higher_is_better else -values)
    digits = 1 if trials.scale == 100 else 3
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            (1.8 + 0.85 * len(rates), 1.5 + 0.5 * len(ranks)), layout="constrained"
        )
        axes = figure.add_subplot()
        # The better, the brighter.
        cmap = "cividis" if trials.higher_is_better else "cividis_r"
        image = axes.imshow(values, cmap=cmap, aspect="auto", origin="lower")
        place: Any = image.norm
        brightness = lambda v: place(v) if trials.higher_is_better else 1 - place(v)
        for (row, column), value in np.ndenumerate(values):
            text = "\N{EN DASH}" if np.isnan(value) else f"{value:.{digits}f}"
            won = row * len(rates) + column == winner
            # White on the darker half of the map.
            dark = not np.isnan(value) and brightness(value) < 0.55
            axes.text(
                column, row, text, ha="center", va="center",
                color="white" if dark else "black", weight="bold" if won else None,
            )  # fmt: skip
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
        axes.set_xlabel("learning rate (optim.lr)")
        axes.set_ylabel("rank (delta.rank)")
        figure.colorbar(image, label=trials.label)
    note = f"Mean over seeds, the best in bold.{rest(trials, [RANK, RATE])}"
    short = [
        f"rank {a[RANK]:g} at {a[RATE]:g}: {a['num_done']} of {a['num_trials']}"
        for a in best.values()
        if a["num_done"] < a["num_trials"]
    ]
    if short:
        note += f" Of some cells not all seeds are done ({'; '.join(short)})."
    return Drawing("heat_map", title, note, figure)


def best_by_rank(trials: Trials) -> Drawing:
    """The value of each rank at its own best learning rate."""
    title = "Ranks, each at its best"
    if len(trials.values(RANK)) < 2:
        return absent("best_by_rank", title, RANK)
    best = trials.chosen(trials.series)
    with mpl.rc_context(STYLE):
        figure = Figure((6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        has_rank = np.isfinite(numbers(best, RANK))
        kinds = groups(rows(best, has_rank), [DELTA] if DELTA in trials.varied else [])
        for number, (color, (kind, own)) in enumerate(
            zip(colors(len(kinds)), kinds, strict=True)
        ):
            _ranks_line(axes, trials, own, color, MARKERS[number % len(MARKERS)], *kind)
        others = records(rows(best, ~has_rank))
        for number, arm in enumerate(others):
            axes.axhline(
                trials.scale * arm["mean"], ls=("--", ":", "-.")[number % 3],
                color="0.4", label=name_of(arm),
            )  # fmt: skip
        log_axis(axes, trials.values(RANK), "rank (delta.rank)", base=2)
        axes.set_ylabel(trials.label)
        legend(figure, [axes])
    note = (
        "Points: mean over seeds and its 95 % interval (t), where there are two seeds "
        f"or more; grey: seeds.{rest(trials, trials.series)} The choice was made on "
        "the values shown, which flatters each of them."
    )
    return Drawing("best_by_rank", title, note, figure)


def regularization_curves(trials: Trials) -> Drawing:
    """Value against every regulariser that varies, one line per rank."""
    title = "Regularisation"
    names = [
        name
        for name in trials.varied
        if (name in REGULARIZERS or name.startswith("penalty."))
        and len(trials.values(name)) > 1
    ]
    if not names:
        told = ", ".join(REGULARIZERS)
        note = f"Not drawn: no two trials differ in {told} or a field of penalty."
        return Drawing("regularization", title, note)
    with mpl.rc_context(STYLE):
        figure, parts = panels(len(names))
        for axes, name in zip(parts, names, strict=True):
            best = trials.chosen([*trials.series, name], trials.series)
            # One point is no curve.
            curves = [own for _, own in groups(best, trials.series) if len(own) > 1]
            lines(axes, trials, pd.concat(curves) if curves else best.head(0), name)
            log_axis(axes, trials.values(name), name)
            axes.set_ylabel(trials.label)
            axes.label_outer(remove_inner_ticks=False)
        legend(figure, parts)
    note = (
        "Line: mean over seeds; dots: seeds; band: their range. Each line takes the "
        "best of the other settings among those tried with all its values."
    )
    return Drawing("regularization", title, note, figure)


def cost_quality(trials: Trials) -> Drawing:
    """Value against what a trial costs; the line joins arms that none beats in both."""
    title = "Cost and quality"
    costs = [
        (label, unit, found)
        for column, label, unit, shared in COSTS
        if (found := _cost(trials, column, shared)) is not None and np.ptp(found) > 0
    ]
    if not costs:
        told = ", ".join(column for column, *_ in COSTS)
        note = f"Not drawn: no two arms that are done differ in {told}."
        return Drawing("cost_quality", title, note)
    with mpl.rc_context(STYLE):
        figure, parts = panels(len(costs))
        means = trials.scale * numbers(trials.arms, "mean")
        for axes, (label, unit, found) in zip(parts, costs, strict=True):
            for name, own in series_of(trials, trials.arms):
                color, marker = trials.looks[name]
                place = [int(place) for place in own.index]
                axes.plot(
                    found[place], means[place], marker, color=color, alpha=0.75,
                    label=name,
                )  # fmt: skip
            front = _front(found, means if trials.higher_is_better else -means)
            axes.plot(found[front], means[front], color="0.5", lw=1, zorder=1)
            amount_axis(axes, found, label, unit)
            axes.set_ylabel(trials.label)
            axes.label_outer(remove_inner_ticks=False)
        legend(figure, parts)
    note = (
        "One point per arm, mean over seeds; the grey line joins those that no cheaper "
        "arm equals. What a pack measured is divided by its trials."
    )
    return Drawing("cost_quality", title, note, figure)


#: In the order of a report.
DRAWINGS: tuple[Callable[[Trials], Drawing], ...] = (
    rate_curves,
    heat_map,
    best_by_rank,
    regularization_curves,
    cost_quality,
)


def _ranks_line(
    axes: Axes,
    trials: Trials,
    arms: pd.DataFrame,
    color: Color,
    marker: str,
    name: str = "",
) -> None:
    """Means with intervals over ranks, seeds beside them, and the rates chosen."""
    ranks, means = numbers(arms, RANK), trials.scale * numbers(arms, "mean")
    reach = np.nan_to_num(trials.scale * numbers(arms, "high") - means)
    axes.errorbar(
        ranks, means, reach, fmt=f"{marker}-", color=color, capsize=3, label=name
    )
    for rank, mean, arm in zip(ranks, means, records(arms), strict=True):
        seeds = trials.seeds(arm)
        # Beside the interval, which would hide them.
        axes.plot([rank / 1.04] * len(seeds), seeds, ".", color="0.5")
        if RATE in trials.varied:
            axes.annotate(
                f"lr {arm[RATE]:g}", (rank, mean), (6, -11),
                textcoords="offset points", fontsize=7.5, color="0.3",
            )  # fmt: skip


def _cost(
    trials: Trials, column: str, shared: bool
) -> Float64[np.ndarray, " arms"] | None:
    """The mean cost of every arm; None where a trial that is done did not tell it."""
    if column not in trials.frame or not len(trials.arms):
        return None
    found = []
    for arm in records(trials.arms):
        own = finished(members(trials.frame, arm, trials.varied), trials.metric)
        values = numbers(own, column)
        if shared:
            values = values / numbers(own, "costs.num_trials")
        found.append(values.mean())
    costs = np.array(found)
    return None if np.isnan(costs).any() else costs


def _front(
    costs: Float64[np.ndarray, " arms"], values: Float64[np.ndarray, " arms"]
) -> list[int]:
    """The arms that no arm of equal or less cost equals, the cheapest first."""
    front, best = [], -math.inf
    for place in np.lexsort((-values, costs)).tolist():
        if values[place] > best:
            best = values[place]
            front.append(place)
    return front
