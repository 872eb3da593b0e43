"""The results of a sweep: as files for other programs, as a table for a terminal."""

import io
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank.io.files import write_atomically
from lowrank.report.arms import arm_labels, is_missing, plain, records
from lowrank.sweeps.agreement import rung_lines
from lowrank.sweeps.load import LOWER_IS_BETTER, Sweep
from lowrank.track.trackers import Track, summarize

CSV, PARQUET = "results.csv", "results.parquet"


def write_results(sweep: Sweep) -> pd.DataFrame:
    """Writes `sweep.trials` to results.csv and results.parquet in its directory.

    Each file is whole or as it was. Numbers keep all their digits in both.

    Returns:
      What was written, the best arm's trials first where there is a number to rank by.

    Raises:
      CannotWrite: The file system refused.
    """
    frame = storable(ranked_trials(sweep))
    text = frame.to_csv(index=False).encode()
    write_atomically(sweep.directory / CSV, lambda file: file.write(text))
    packed = io.BytesIO()
    frame.to_parquet(packed, index=False)
    content = packed.getvalue()
    write_atomically(sweep.directory / PARQUET, lambda file: file.write(content))
    return frame


def ranked_trials(sweep: Sweep) -> pd.DataFrame:
    """All trials, ordered by their arm and seed; as they come if nothing ranks them."""
    if not sweep.metrics:
        return sweep.trials
    order = {arm: place for place, arm in enumerate(sweep.arms()["arm"])}
    keys = pd.DataFrame(
        {
            "place": arm_labels(sweep.trials, sweep.varied)
            .map(order)
            .fillna(len(order)),
            "seed": pd.to_numeric(sweep.trials["seed"], errors="coerce"),
        }
    )
    return sweep.trials.loc[keys.sort_values(["place", "seed"]).index]


def storable(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of one type each, as Parquet wants: mixed ones become text."""
    frame = frame.reset_index(drop=True).copy()
    mixed = [name for name in frame if frame[name].dtype == np.dtype(object)]
    for name in mixed:
        kinds = {type(value) for value in frame[name].dropna()}
        if not kinds or len(kinds) > 1:
            text = frame[name].map(lambda v: None if pd.isna(v) else str(v))
            frame[name] = text.astype("string")
    return frame


def show_results(
    sweep: Sweep,
    console: Console | None = None,
    *,
    by: str | None = None,
    most: int = 20,
) -> None:
    """Prints the arms, the best first, and what became of the trials.

    Args:
      sweep: What was loaded.
      console: Where to; the terminal if None.
      by: The validation number that ranks.
      most: Arms shown; how many are not is said.
    """
    console = console or Console()
    console.print(f"{len(sweep.trials)} trials: {told_statuses(sweep.trials)}")
    if sweep.metrics:
        by = by or sweep.select
        arms = sweep.arms(by)
        console.print(_arms_table(arms.head(most), sweep.varied, by))
        if len(arms) > most:
            console.print(f"and {len(arms) - most} arms that came after these")
    for line in rung_lines(sweep):
        console.print(line)
    unfinished = [one for one in records(sweep.trials) if one["status"] != "done"]
    if unfinished:
        table = Table(title="Not done")
        for name in ("trial", "status", "reason"):
            table.add_column(name)
        for trial in unfinished:
            reason = "" if is_missing(trial["reason"]) else str(trial["reason"])
            table.add_row(*map(escape, (trial["trial"], trial["status"], reason)))
        console.print(table)


def told_statuses(trials: pd.DataFrame) -> str:
    """How many trials have which status: `65 done, 1 failed`."""
    counts = trials["status"].value_counts()
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def send_summary(sweep: Sweep, track: Track, name: str) -> None:
    """Gives the arms and the trials as tables to one more run of the sweep's group.

    The trials' own runs are in that group because their `track.group` says so.
    """
    tables = {"trials": storable(ranked_trials(sweep))}
    if sweep.metrics:
        tables = {"arms": storable(sweep.arms())} | tables
    summarize(track, tables, name=name, directory=sweep.directory)


def _arms_table(arms: pd.DataFrame, varied: Sequence[str], by: str) -> Table:
    order = "lowest" if by in LOWER_IS_BETTER else "highest"
    table = Table(
        title=f"Arms by validation {escape(by)}, {order} first; mean over seeds [95 %]"
    )
    table.add_column("#", justify="right")
    for name in varied:
        table.add_column(escape(name), justify="right")
    table.add_column("done", justify="right")
    table.add_column(escape(by), justify="right", no_wrap=True)
    for place, arm in enumerate(records(arms), start=1):
        mean = "-" if math.isnan(arm["mean"]) else f"{arm['mean']:.4f}"
        ends = (
            "" if math.isnan(arm["low"]) else f" [{arm['low']:.4f}, {arm['high']:.4f}]"
        )
        table.add_row(
            str(place),
            *(escape(plain(arm[name])) for name in varied),
            f"{arm['num_done']}/{arm['num_trials']}",
            escape(mean + ends),
        )
    return table
