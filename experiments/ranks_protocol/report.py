"""A study as JSON and as Markdown: the tables, whatever they say."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ranks_protocol import verdicts
from experiments.ranks_protocol.arms import BASELINE, ORACLE
from experiments.ranks_protocol.settings import Protocol, shown
from experiments.ranks_protocol.training import SCHEMA, code
from experiments.ranks_protocol.verdicts import Records, Study
from lowrank.evaluate.compare import Comparison
from lowrank.io.files import write_atomically

HEADINGS = (
    "arm", "rate", "error", "to uniform [95 %]", "p (Holm)", "verdict",
    "to oracle [95 %]", "misallocation", "Spearman", "components, final",
    "average", "FLOPs of uniform in corrected weights, open", "as run", "seeds",
)  # fmt: skip


#: What a reader must know of how the arms came about.
_HISTORY = (
    "Adaptive arms judge components in the singular basis of their layer, which was "
    "devised after a look at earlier seeds and then confirmed on fresh ones; arms that "
    "end in -own judge each component by itself. What is seen here beyond what was "
    "wanted beforehand is exploratory until other seeds confirm it."
)


def results(study: Study, protocol: Protocol) -> dict[str, Any]:
    """Everything that the tables show, and the records they are made from."""
    ratio, far = (
        {
            task: verdicts.comparisons(own["judged"], name, protocol, own["in_points"])
            for task, own in study.items()
        }
        for name in (BASELINE, ORACLE)
    )
    adjusted = verdicts.corrected(ratio)
    tasks = {}
    for task, own in study.items():
        rows = []
        for arm, records in own["judged"].items():
            p = adjusted[task].get(arm)
            row = _row(arm, own, ratio[task].get(arm), far[task].get(arm), p, protocol)
            rows.append({**row, "failed": _failures(records)})
        tasks[task] = {"rows": rows, **own, **_kept(own)}
    seconds = [own["seconds"] for own in study.values()]
    asked = verdicts.outcomes(study, protocol)
    return {
        "schema": SCHEMA,
        "protocol": shown(protocol),
        "code": code(),
        "seconds": sum(seconds),
        "processors": os.cpu_count(),
        "outcomes": [dataclasses.asdict(one) for one in asked],
        "tasks": tasks,
    }


def _kept(own: Mapping[str, Any]) -> dict[str, Any]:
    """The records without what tables hold already; ranks in the order of "layers"."""
    every = [one for records in own["judged"].values() for one in records]
    whole = (one["ranks"] for one in every if one.get("ranks"))
    layers = [*next(whole, {})]
    listed = lambda ranks: ranks and [ranks[name] for name in layers]
    names = ("seed", "rate", "error", "misallocation")
    judged = {
        arm: [
            {name: one.get(name) for name in names}
            | {name: listed(one.get(name)) for name in ("ranks", "truth")}
            for one in records
        ]
        for arm, records in own["judged"].items()
    }
    tuned = {
        arm: [{name: one.get(name) for name in names[:3]} for one in records]
        for arm, records in own["tuned"].items()
    }
    return {"layers": layers, "judged": judged, "tuned": tuned}


def _row(
    arm: str,
    own: Mapping[str, Any],
    ratio: Comparison | None,
    far: Comparison | None,
    p: float | None,
    protocol: Protocol,
) -> dict[str, Any]:
    records, level = own["judged"][arm], protocol.level
    in_points = own["in_points"]
    values = list(verdicts.errors(records, in_points).values())
    middle = float(np.mean(values)) if values else None
    rate = own["rates"][arm]
    tried = own["grid"]
    budgets = lambda name, of=records: _mean(
        [one["budgets"][name] for one in of if one["budgets"]]
    )
    uniform = own["judged"][BASELINE]
    share = lambda name: _over(budgets(name), budgets(name, uniform))
    return {
        "arm": arm,
        "rate": rate,
        # At an end of the grid a better rate may lie beyond it.
        "at_end": len(tried) > 1 and rate in (min(tried), max(tried)),
        "error": middle if middle is None or in_points else float(np.exp(middle)),
        "ratio": ratio and ratio.json(),
        "to_oracle": far and far.json(),
        "p": p,
        "verdict": ratio and verdict(ratio, p, 1 - level),
        "misallocation": verdicts.averaged(records, "misallocation", level).json(),
        "rank_correlation": verdicts.averaged(
            records, "rank_correlation", level
        ).json(),
        "final_components": budgets("final_components"),
        "final_parameters": budgets("final_parameters"),
        "average_components": budgets("average_components"),
        "open_flops": share("open_flops"),
        "held_flops": share("held_flops"),
        "seeds": len(values),
    }


def verdict(ratio: Comparison, p: float | None, alpha: float) -> str:
    """A comparison's verdict with the correction over the whole study."""
    if ratio.verdict == "equivalent" or ratio.difference.estimate is None:
        return ratio.verdict
    if p is None or p >= alpha:
        return "inconclusive"
    return "better" if ratio.difference.estimate < 0 else "worse"


def markdown(found: Mapping[str, Any]) -> str:
    """The results as text."""
    protocol = found["protocol"]
    lines = [
        "# Do ranks that adapt help?",
        "",
        f"`python -m experiments.ranks_protocol`: {protocol['seeds']} judged seeds on "
        f"{protocol['bases']} base(s), {protocol['steps']} steps, {protocol['rows']} "
        f"rows, noise {protocol['noise']:g}. Every arm chose its learning rate from "
        f"{', '.join(f'{rate:g}' for rate in protocol['rates'])} on "
        f"{protocol['tuning_seeds']} other seeds; * marks an end of the grid. Errors "
        "are geometric means over seeds of the mean square error against targets "
        "without noise; log-ratios are paired, and negative where the arm is better. "
        "To uniform and to the oracle, log-ratios are shown. Holm's correction is over "
        "all arms and tasks; of equivalence, over those of a task.",
        "",
        f"Compiling, training and judging took {found['seconds'] / 60:.0f} minutes on "
        f"{found['processors']} processors.",
        "",
        _HISTORY,
        "",
        "## What was wanted",
        "",
        *_table(
            ("task", "arm", "wanted", "found", "answer"),
            [
                [one["task"], one["arm"], one["wanted"], one["found"], one["answer"]]
                for one in found["outcomes"]
            ],
        ),
    ]
    for task, own in found["tasks"].items():
        rows = [_cells(row, own["in_points"]) for row in own["rows"]]
        lines += ["", f"## {task}", ""]
        if own["in_points"]:
            lines += [_of_text(protocol["real"], own["grid"]), ""]
        lines += _table(HEADINGS, rows)
        lines += [
            f"\n{row['arm']}: {text}" for row in own["rows"] for text in row["failed"]
        ]
    return "\n".join([*lines, ""])


def write(found: Mapping[str, Any], path: str) -> tuple[Path, Path]:
    """Writes both files; returns their paths."""
    files = Path(f"{path}.json"), Path(f"{path}.md")
    packed = json.dumps(found, separators=(",", ":"), allow_nan=False).encode()
    write_atomically(files[0], lambda file: file.write(packed))
    text = markdown(found).encode()
    write_atomically(files[1], lambda file: file.write(text))
    return files


def _of_text(real: Mapping[str, Any], grid: Sequence[float]) -> str:
    """What is to be known of a table on real text."""
    rates = ", ".join(f"{rate:g}" for rate in grid)
    return (
        f"{real['seeds']} judged seeds, {real['steps']} steps of {real['batch_size']} "
        f"rows, rates {rates} chosen on {real['tuning_seeds']} other seed(s) and the "
        "validation split. Errors are means over seeds of the share of test rows with "
        f"a wrong label (of {real['test_rows']} drawn at random, or all), and "
        "differences to uniform are points of it."
    )


def _cells(row: Mapping[str, Any], in_points: bool) -> list[str]:
    scale, digits = (100.0, 2) if in_points else (1.0, 3)
    error = "-" if row["error"] is None else f"{row['error']:.3g}"
    if in_points and row["error"] is not None:
        error = f"{100 * row['error']:.2f} %"
    number = lambda x, form: "-" if x is None else format(x, form)
    return [
        row["arm"],
        f"{row['rate']:g}" + ("*" if row["at_end"] else ""),
        error,
        _interval(row["ratio"] and row["ratio"]["difference"], scale, digits),
        number(row["p"], ".2g"),
        row["verdict"] or "-",
        _interval(row["to_oracle"] and row["to_oracle"]["difference"]),
        _interval(row["misallocation"]),
        number(row["rank_correlation"]["estimate"], "+.2f"),
        number(row["final_components"], ".1f"),
        number(row["average_components"], ".1f"),
        number(row["open_flops"], ".2f"),
        number(row["held_flops"], ".2f"),
        str(row["seeds"]),
    ]


def _interval(
    value: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 3
) -> str:
    if value is None:
        return "-"
    ends = ("estimate", "low", "high")
    scaled = {n: value[n] and scale * value[n] for n in ends}
    return verdicts.shown(verdicts.Interval(**{**value, **scaled}), digits)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(headings), "|" + "---|" * len(headings), *map(line, rows)]


def _failures(records: Records) -> list[str]:
    return [
        f"seed {one['seed']} left out: {one['failed']}"
        for one in records
        if one["failed"]
    ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by
