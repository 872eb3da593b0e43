"""The report of a sweep: report.md with its figures, from nothing but the records."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank.core.spec import fields_of, refuse_targets, spec
from lowrank.evaluate.compare import Comparison, compare_arms
from lowrank.evaluate.stats import LEVEL
from lowrank.io.files import write_atomically
from lowrank.report.arms import (
    by_seed,
    groups,
    is_missing,
    members,
    numbers,
    plain,
    records,
    rows,
)
from lowrank.report.drawing import Drawing, Trials
from lowrank.report.figures import draw_all
from lowrank.run.settings import check_groups
from lowrank.run.settings import plain as plain_spec
from lowrank.sweeps.agreement import rungs_section
from lowrank.sweeps.load import LOWER_IS_BETTER, Sweep, load_sweep
from lowrank.sweeps.results import (
    send_summary,
    show_results,
    told_statuses,
    write_results,
)
from lowrank.track.trackers import Track

REPORT, FIGURES = "report.md", "figures"
ARMS, DIFFERENCES = "arms.csv", "differences.csv"
#: Rows of a table; how many more there are is said.
MOST = 20
_log = logging.getLogger(__name__)


@spec
class ReportSpec:
    """What is reported: the fields of `conf/report.yaml` beside the group track.

    Attributes:
      directory: Of the sweep.
      by, baseline, margin, level: See `write_report`.
    """

    directory: str
    by: str | None = None
    baseline: str | None = None
    margin: float | None = None
    level: float = LEVEL


def report_sweep(config: Mapping[str, Any]) -> Sweep:
    """Reads a sweep, writes its results and report, and shows the ranked arms.

    With a group track that uses W&B, a summary run is sent as well.

    Raises:
      BadInput: A setting is unknown or does not fit, or there is no such sweep.
    """
    refuse_targets(config)
    check_groups(config, (*fields_of(ReportSpec), "track"))
    fields = {name: value for name, value in config.items() if name != "track"}
    chosen = plain_spec(ReportSpec, fields, "config")
    track = plain_spec(Track, config.get("track"), "track")
    sweep = load_sweep(chosen.directory)
    path = write_report(
        sweep,
        by=chosen.by,
        baseline=chosen.baseline,
        margin=chosen.margin,
        level=chosen.level,
    )
    write_results(sweep)
    show_results(sweep, by=chosen.by)
    send_summary(sweep, track, track.group or sweep.directory.name)
    _log.info("wrote %s", path)
    return sweep


def write_report(
    sweep: Sweep,
    *,
    by: str | None = None,
    baseline: str | None = None,
    margin: float | None = None,
    level: float = LEVEL,
) -> Path:
    """Writes report.md, its figures to figures/, and its tables as arms.csv and
    differences.csv, in the sweep's directory.

    Args:
      sweep: What was loaded.
      by: The validation number that it is about; `sweep.select` if None.
      baseline: The arm that others are compared with, named as in the report
        ("delta.rank=8 optim.lr=0.001"); the best one if None.
      margin: Differences below it do not matter, in the unit of the number (0.01 is
        one point of accuracy); None: equivalence is not tested.
      level: Confidence level of the intervals and tests.

    Returns:
      The path of report.md.

    Raises:
      UnknownName: There is no such number or arm.
      BadInput: The margin or level is out of its range.
      CannotWrite: The file system refused.
    """
    by = by or sweep.select
    drawings = draw_all(trials_of(sweep, by))
    for drawing in drawings:
        drawing.save(sweep.directory / FIGURES)
    found = compare(sweep, by, baseline=baseline, margin=margin, level=level)
    parts = [
        head(sweep, by),
        arms_section(sweep, by, level),
        differences_section(found, baseline is None, margin, level),
        *map(_figure, drawings),
        rungs_section(sweep),
        _unfinished(sweep.trials),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    _write(sweep.directory / ARMS, sweep.arms(by, level).to_csv(index=False))
    _write(sweep.directory / DIFFERENCES, comparison_frame(found).to_csv(index=False))
    _write(sweep.directory / REPORT, text)
    return sweep.directory / REPORT


def trials_of(sweep: Sweep, by: str | None = None) -> Trials:
    """What the figures of `lowrank.report.figures` are drawn from."""
    by = by or sweep.select
    return Trials(sweep.trials, sweep.varied, f"best.{by}", by not in LOWER_IS_BETTER)


def compare(
    sweep: Sweep,
    by: str | None = None,
    *,
    baseline: str | None = None,
    margin: float | None = None,
    level: float = LEVEL,
) -> list[Comparison]:
    """Every arm with a finished trial against the baseline, over the seeds of both.

    Args:
      sweep: What was loaded.
      by, baseline, margin, level: As in `write_report`.

    Raises:
      UnknownName: There is no such number, or no such arm with a finished trial.
    """
    by = by or sweep.select
    table = sweep.arms(by)
    arms = {
        arm["arm"]: by_seed(members(sweep.trials, arm, sweep.varied), f"best.{by}")
        for arm in records(rows(table, numbers(table, "num_done") > 0))
    }
    if not arms:
        return []
    return compare_arms(
        arms,
        next(iter(arms)) if baseline is None else baseline,
        higher_is_better=by not in LOWER_IS_BETTER,
        margin=margin,
        level=level,
    )


def comparison_frame(found: Sequence[Comparison]) -> pd.DataFrame:
    """Comparisons as a frame, one row per arm."""
    cells = [
        {
            "arm": one.arm,
            "baseline": one.baseline,
            "seeds": one.difference.num_groups,
            "difference": one.difference.estimate,
            "low": one.difference.low,
            "high": one.difference.high,
            "p": one.p,
            "adjusted_p": one.adjusted_p,
            "exact_p": one.exact_p,
            "exact_floor": one.exact_floor,
            "equivalence_p": one.adjusted_equivalence_p,
            "verdict": one.verdict,
        }
        for one in found
    ]
    return pd.DataFrame(cells)


def head(sweep: Sweep, by: str) -> str:
    """What was swept, and what has to be known before comparing."""
    trials = sweep.trials
    lines = [
        f"# Sweep {sweep.directory.name}",
        "",
        f"{len(trials)} trials: {told_statuses(trials)}. Trials that differ in their "
        f"seed only are one arm. Ranked by validation {by} of the state that each "
        "trial kept; test scores are sealed and have no part in this.",
        "",
    ]
    for name, words in (("base.name", "Base"), ("data.name", "Data")):
        if name in trials:
            lines.append(f"- {words}: {_values(trials, name)}")
    for name in sweep.varied:
        lines.append(f"- `{name}`: {_values(trials, name)}")
    lines.append(f"- `seed`: {_values(trials, 'seed')}")
    for name in ("code", "base", "data"):
        marks = {one.get(f"identity.{name}") for one in records(trials)}
        count = len([mark for mark in marks if not is_missing(mark)])
        if count > 1 and not any(v.startswith(f"{name}.") for v in sweep.varied):
            lines.append(
                f"- **{count} fingerprints of {name}**, where one was to be expected: "
                "differences may come from there."
            )
    return "\n".join(lines)


def arms_section(sweep: Sweep, by: str, level: float = LEVEL) -> str:
    """The arms, ranked, with their intervals over seeds."""
    arms = sweep.arms(by, level)
    columns = [*(f"`{name}`" for name in sweep.varied), "done", by, f"{level:.0%}"]
    cells = []
    for arm in records(arms.head(MOST)):
        ends = (arm["low"], arm["high"])
        cells.append(
            [
                *(plain(arm[name]) for name in sweep.varied),
                f"{arm['num_done']} of {arm['num_trials']}",
                _figures(arm["mean"]),
                "-" if math.isnan(ends[0]) else f"[{', '.join(map(_figures, ends))}]",
            ]
        )
    note = (
        "Mean over seeds with its t interval. An arm of which fewer trials are done "
        "comes after those with more."
    )
    return "\n".join(
        ["## Arms", "", note, "", *_table(columns, cells, len(arms), ARMS)]
    )


def differences_section(
    found: Sequence[Comparison],
    picked: bool,
    margin: float | None = None,
    level: float = LEVEL,
) -> str:
    """The arms beside the baseline; `picked` says that the same numbers chose it."""
    if not found:
        return "## Differences\n\nThere are no two arms with a finished trial."
    lines = ["## Differences", "", f"To `{found[0].baseline}`, paired over seeds. "]
    if picked:
        lines[-1] += (
            "It was picked as the best on the same numbers, which biases the "
            "differences in its favour; name a baseline to avoid that. "
        )
    lines[-1] += (
        "p: paired t test, Holm-adjusted over all arms of the sweep; exact p: sign "
        "flips, which assume no distribution, with the least value that so many seeds "
        "allow. "
    )
    lines[-1] += (
        "No margin was stated, so equivalence was not tested, and inconclusive does "
        "not mean equal."
        if margin is None
        else f"Equivalent: within {margin:g} either way by two one-sided t tests, "
        "Holm-adjusted too."
    )
    columns = ["arm", "seeds", "difference", f"{level:.0%}", "p", "exact p (least)"]
    columns += ["equivalence p"] * (margin is not None) + ["verdict"]
    cells = []
    for one in found[:MOST]:
        d = one.difference
        row = [
            f"`{one.arm}`",
            str(d.num_groups),
            _figures(d.estimate, "+"),
            d.method if d.low is None else f"[{d.low:+.4f}, {d.high:+.4f}]",
            f"{one.adjusted_p:.3g}",
            "-"
            if one.exact_p is None
            else f"{one.exact_p:.3g} ({one.exact_floor:.3g})",
        ]
        if margin is not None:
            row.append(_p(one.adjusted_equivalence_p))
        cells.append([*row, one.verdict])
    return "\n".join([*lines, "", *_table(columns, cells, len(found), DIFFERENCES)])


def _figure(drawing: Drawing) -> str:
    lines = [f"## {drawing.title}", ""]
    if drawing.figure is not None:
        lines += [f"![{drawing.title}]({FIGURES}/{drawing.name}.png)", ""]
    return "\n".join([*lines, drawing.note])


def _unfinished(trials: pd.DataFrame) -> str:
    cells = [
        [f"`{one['trial']}`", one["status"], _cell(one["reason"])]
        for one in records(trials)
        if one["status"] != "done"
    ]
    if not cells:
        return ""
    table = _table(["trial", "status", "reason"], cells, len(cells), "")
    return "\n".join(["## Not done", "", *table])


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], total: int, file: str
) -> list[str]:
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    left = total - len(rows)
    return [*lines, "", f"{left} more are in {file}."] if left else lines


def _values(trials: pd.DataFrame, name: str) -> str:
    values = [key for (key,), _ in groups(trials, [name]) if key is not None]
    if not any(isinstance(value, str) for value in values):
        values = sorted(values)
    return ", ".join(map(plain, values)) or "none"


def _figures(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.4f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _cell(value: object) -> str:
    """Text that cannot end a cell of a table."""
    text = "" if is_missing(value) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
