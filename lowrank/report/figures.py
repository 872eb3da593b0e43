"""What a sweep shows, drawn: from frames of trials, for files and notebooks alike.

Each figure shows the single seeds, not only their mean. One that has nothing to show
says why instead.
"""

import math
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank.report.arms import finished, members
from lowrank.report.drawing import (
    DELTA,
    RANK,
    RATE,
    STYLE,
    Drawing,
    Trials,
    absent,
    amount_axis,
    legend,
    lines,
    log_axis,
    name_of,
    panels,
    rest,
    series_of,
    styled,
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
    ("costs.step_flops", "work of a step, per trial", "FLOP", True),
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
        legend(figure, axes)
    note = f"Line: mean over seeds; dots: seeds; band: their range.{rest(trials, keep)}"
    return Drawing("rate_curves", title, note, figure)


def heat_map(trials: Trials) -> Drawing:
    """The mean over seeds for every rank and learning rate."""
    title = "Rank and learning rate"
    for name in (RANK, RATE):
        if len(trials.values(name)) < 2:
            return absent("heat_map", title, name)
    best = trials.chosen([RANK, RATE]).dropna(subset=[RANK, RATE])
    ranks, rates = trials.values(RANK), trials.values(RATE)
    table = best.pivot_table(index=RANK, columns=RATE, values="mean")
    values = trials.scale * table.reindex(index=ranks, columns=rates).to_numpy(float)
    winner = np.nanargmax(values if trials.higher_is_better else -values)
    digits = 1 if trials.scale == 100 else 3
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(
            (1.8 + 0.85 * len(rates), 1.5 + 0.5 * len(ranks)), layout="constrained"
        )
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="cividis", aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(values):
            text = "\N{EN DASH}" if np.isnan(value) else f"{value:.{digits}f}"
            won = row * len(rates) + column == winner
            # White on the darker half of the map.
            dark = not np.isnan(value) and image.norm(value) < 0.55
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
    short = best[best["num_done"] < best["num_trials"]]
    if len(short):
        cells = [
            f"rank {a[RANK]:g} at {a[RATE]:g}: {a['num_done']} of {a['num_trials']}"
            for _, a in short.iterrows()
        ]
        note += f" Of some cells not all seeds are done ({'; '.join(cells)})."
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
        ranked = best[best[RANK].notna()]
        kinds = ranked.groupby(DELTA) if DELTA in trials.varied else [("", ranked)]
        for color, marker, (name, own) in styled([*kinds]):
            _ranks_line(axes, trials, own, color, marker, name)
        for (_, arm), dash in zip(
            best[best[RANK].isna()].iterrows(), ("--", ":", "-."), strict=False
        ):
            axes.axhline(
                trials.scale * arm["mean"], ls=dash, color="0.4", label=name_of(arm)
            )
        log_axis(axes, trials.values(RANK), "rank (delta.rank)", base=2)
        axes.set_ylabel(trials.label)
        legend(figure, axes)
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
            count = best.groupby(trials.series or (lambda _: 0), dropna=False)[name]
            best = best[count.transform("nunique") > 1]
            lines(axes, trials, best, name)
            log_axis(axes, trials.values(name), name)
            axes.set_ylabel(trials.label)
            axes.label_outer(remove_inner_ticks=False)
        legend(figure, parts[0])
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
        groups = series_of(trials, trials.arms)
        for axes, (label, unit, found) in zip(parts, costs, strict=True):
            for color, marker, (name, own) in styled(groups):
                axes.plot(
                    found[own.index], trials.scale * own["mean"], marker, color=color,
                    alpha=0.75, label=name,
                )  # fmt: skip
            front = _front(found, trials.arms["mean"], trials.higher_is_better)
            axes.plot(
                found[front], trials.scale * trials.arms["mean"][front],
                color="0.5", lw=1, zorder=1,
            )  # fmt: skip
            amount_axis(axes, found, label, unit)
            axes.set_ylabel(trials.label)
            axes.label_outer(remove_inner_ticks=False)
        legend(figure, parts[0])
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
    color: tuple[float, ...],
    marker: str,
    name: str,
) -> None:
    """Means with intervals over ranks, seeds beside them, and the rates chosen."""
    means = trials.scale * arms["mean"]
    reach = trials.scale * (arms["high"] - arms["mean"]).fillna(0)
    axes.errorbar(
        arms[RANK], means, reach, fmt=f"{marker}-", color=color, capsize=3, label=name
    )
    for place, (_, arm) in zip(means.index, arms.iterrows(), strict=True):
        seeds = trials.seeds(arm)
        # Beside the interval, which would hide them.
        axes.plot([arm[RANK] / 1.04] * len(seeds), seeds, ".", color="0.5")
        if RATE in trials.varied:
            axes.annotate(
                f"lr {arm[RATE]:g}", (arm[RANK], means[place]), (6, -11),
                textcoords="offset points", fontsize=7.5, color="0.3",
            )  # fmt: skip


def _cost(trials: Trials, column: str, shared: bool) -> pd.Series | None:
    """The mean cost of every arm; None where a trial that is done did not tell it."""
    if column not in trials.frame:
        return None
    found = []
    for _, arm in trials.arms.iterrows():
        own = finished(members(trials.frame, arm, trials.varied), trials.metric)
        values = own[column].to_numpy(float)
        if shared:
            values = values / own["costs.num_trials"].to_numpy(float)
        found.append(values.mean())
    series = pd.Series(found, trials.arms.index)
    return None if series.isna().any() or series.empty else series


def _front(costs: pd.Series, means: pd.Series, higher_is_better: bool) -> list[int]:
    """The arms that no arm of equal or less cost equals, the cheapest first."""
    front, best = [], -math.inf
    value = means if higher_is_better else -means
    for place in np.lexsort((-value.to_numpy(), costs.to_numpy())):
        if value.iloc[place] > best:
            best = value.iloc[place]
            front.append(costs.index[place])
    return front
