"""Whether rungs told the truth: their orders beside what came later.

Only trials that were not cut have a final value, so a rank correlation over them says
nothing of those that were, and is lower than over all trials would be: what is left
lies close together.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lowrank.report.arms import is_missing, numbers, records
from lowrank.sweeps.load import LOWER_IS_BETTER, Sweep
from lowrank.sweeps.rungs import Decision

#: With fewer pairs a rank correlation is 1 or -1, or not defined.
LEAST = 3
#: The setting whose values are told apart by who went on.
_RATE = "optim.lr"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two orders of the same trials.

    Attributes:
      num_trials: With both values.
      tau: Kendall's tau-b (Kendall 1945), which corrects for ties; None with fewer
        than `LEAST` trials, or where all values of one kind are equal.
      rho: Spearman's rank correlation, likewise.
    """

    num_trials: int
    tau: float | None
    rho: float | None


@dataclasses.dataclass(frozen=True)
class Told:
    """One rung and what came of it.

    Attributes:
      decision: As it was sealed.
      final: The order at the rung beside the final one, of the trials that are done.
      later: Beside the order at the next rung, of the trials that came to it; None at
        the last one.
      rates: Median learning rate of the trials that went on and of the others, where it
        varied.
    """

    decision: Decision
    final: Agreement
    later: Agreement | None
    rates: tuple[float, float] | None


def agreement(first: Sequence[float], second: Sequence[float]) -> Agreement:
    """The rank correlations of two lists of values of the same trials."""
    count = len(first)
    if count < LEAST or len(set(first)) == 1 or len(set(second)) == 1:
        return Agreement(count, None, None)
    # Here, and not above: no training command should wait for it.
    from scipy import stats

    tau, _ = stats.kendalltau(first, second)
    rho, _ = stats.spearmanr(first, second)
    return Agreement(count, *np.asarray([tau, rho], np.float64).tolist())


def rungs_of(sweep: Sweep) -> list[Told]:
    """All rungs of a sweep, those of a contest one after another."""
    trials = {one["trial"]: one for one in records(sweep.trials)}
    rates: dict[str, float] = {}
    if _RATE in sweep.trials:
        names = sweep.trials["trial"].tolist()
        rates = dict(zip(names, numbers(sweep.trials, _RATE).tolist(), strict=True))
    found = []
    for decision in sweep.rungs:
        after = [
            one
            for one in sweep.rungs
            if (one.contest, one.number) == (decision.contest, decision.number + 1)
        ]
        column = f"best.{decision.metric}"
        final = {
            name: row[column]
            for name, row in trials.items()
            if row["status"] == "done" and not is_missing(row.get(column))
        }
        found.append(
            Told(
                decision,
                _beside(decision, final),
                _beside(decision, dict(after[0].order)) if after else None,
                _rates(decision, rates),
            )
        )
    return found


def rungs_section(sweep: Sweep) -> str:
    """The rungs for report.md; empty of a sweep without halving."""
    told = rungs_of(sweep)
    if not told:
        return ""
    lines = [
        "## Rungs",
        "",
        "Kendall's tau-b (and Spearman's rho) of the order at a rung with the final "
        "one, over trials that are done, and with the order at the next rung. Values "
        "are the best so far, which later ones contain. A trial that was cut has no "
        "final value: these numbers say nothing of whether it would have won, and "
        "trials picked for being alike in rank correlate less. Early cuts favour low "
        "learning rates, and whatever else learns fast at first: where those that went "
        "on have another median rate than those that were cut, take a later first rung "
        "before believing it.",
        "",
        "| step | by | trials | went on | final order | next rung | "
        f"median `{_RATE}`: went on, cut |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in told:
        cells = [
            str(one.decision.step),
            one.decision.metric,
            str(len(one.decision.order)),
            str(len(one.decision.kept)),
            _cell(one.final),
            "-" if one.later is None else _cell(one.later),
            "-" if one.rates is None else f"{one.rates[0]:.3g}, {one.rates[1]:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rung_lines(sweep: Sweep) -> list[str]:
    """One line per rung, for a terminal."""
    found = []
    for one in rungs_of(sweep):
        decision = one.decision
        tau = "unknown" if one.final.tau is None else f"{one.final.tau:+.2f}"
        found.append(
            f"rung at step {decision.step}: {len(decision.kept)} of "
            f"{len(decision.order)} went on by {decision.metric}; Kendall's tau with "
            f"the final order of {one.final.num_trials}: {tau}. Those that were cut "
            "have no final value, and early cuts favour low learning rates."
        )
    return found


def _beside(decision: Decision, other: Mapping[str, float | None]) -> Agreement:
    """The order at a rung beside other values, of the trials that have both."""
    sign = -1 if decision.metric in LOWER_IS_BETTER else 1
    pairs = [
        (sign * value, sign * after)
        for trial, value in decision.order
        if value is not None and (after := other.get(trial)) is not None
    ]
    return agreement([one for one, _ in pairs], [two for _, two in pairs])


def _rates(
    decision: Decision, rates: Mapping[str, float]
) -> tuple[float, float] | None:
    kept: list[float] = []
    cut: list[float] = []
    for trial, _ in decision.order:
        own = kept if trial in decision.kept else cut
        own.append(rates.get(trial, math.nan))
    if not kept or not cut or len({*kept, *cut}) == 1 or np.isnan([*kept, *cut]).any():
        return None
    return float(np.median(kept)), float(np.median(cut))


def _cell(found: Agreement) -> str:
    if found.tau is None or found.rho is None:
        return f"- (of {found.num_trials})"
    return f"{found.tau:+.2f} ({found.rho:+.2f}) of {found.num_trials}"
