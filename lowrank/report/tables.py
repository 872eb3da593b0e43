"""Results as tables for a terminal: quality with intervals beside what it cost."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

#: Metrics in the order shown: key, heading, whether it is a share.
METRICS = (
    ("accuracy", "accuracy", True),
    ("macro_f1", "macro F1", True),
    ("worst_class_recall", "worst class recall", True),
    ("calibration_error", "calibration error", True),
    ("log_loss", "log loss", False),
    ("accuracy_per_token", "accuracy, per token", True),
    ("rmse", "root mean squared error", False),
    ("mae", "mean absolute error", False),
    ("r2", "R squared", False),
    ("pearson", "Pearson's r", False),
    ("spearman", "Spearman's r", False),
    ("loss", "loss, nats per token", False),
    ("perplexity", "perplexity", False),
    ("base_loss", "loss of the base", False),
    ("rise", "loss above the base's", False),
    ("bleu", "BLEU", False),
    ("chrf", "chrF", False),
    ("rouge_l", "ROUGE-L", False),
    ("exact", "exact answers, %", False),
)


def show_result(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a finished run: its scores on every split it was judged on, its costs."""
    console = console or Console()
    show_scores(result, console)
    console.print(cost_table(result))


def show_scores(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the scores of every split that was judged."""
    table = Table(title=escape(f"Trial {result['trial']}: {result['data']['name']}"))
    table.add_column("metric")
    for split in result["scores"]:
        table.add_column(split, justify="right")
    for key, heading, share in METRICS:
        found = [split["metrics"].get(key) for split in result["scores"].values()]
        if not any(found):
            # Of another kind of data.
            continue
        cells = [cell(one, share) for one in found]
        table.add_row(heading, *cells)
    (console or Console()).print(table)


def show_comparison(
    arms: Mapping[str, Mapping[str, Any]], console: Console | None = None
) -> None:
    """Prints the test scores of several arms side by side."""
    table = Table(title="Test split, same rows for every arm")
    table.add_column("metric")
    for name in arms:
        table.add_column(escape(name), justify="right")
    for key, heading, share in METRICS:
        found = [arm["scores"]["test"]["metrics"].get(key) for arm in arms.values()]
        if not any(found):
            continue
        cells = [cell(one, share) for one in found]
        table.add_row(heading, *cells)
    (console or Console()).print(table)


def cost_table(result: Mapping[str, Any]) -> Table:
    """What a run cost, as it was measured."""
    costs = result["costs"]
    table = Table(title=f"Cost, measured on {costs['device']}")
    table.add_column("what")
    table.add_column("figure", justify="right")
    rows = [
        ("trained parameters", f"{costs['trained_parameters']:,}"),
        ("all parameters", f"{costs['total_parameters']:,}"),
        ("adapter", f"{costs['adapter_bytes'] / 2**20:.2f} MiB"),
        ("steps", f"{result['steps']:,}"),
        ("compilation", _maybe(costs["compile_seconds"], 1, ".1f", "s")),
        ("step, median", _maybe(costs["step_median_seconds"], 1e3, ".0f", "ms")),
        ("examples per second", _maybe(costs["examples_per_second"], 1, ".0f", "")),
        ("largest step, FLOPs", _maybe(costs["step_flops"], 1e-9, ".2f", "GF")),
        (
            "largest step, memory",
            _maybe(costs["step_peak_bytes"], 2**-20, ".0f", "MiB"),
        ),
        (
            "peak resident memory",
            _maybe(costs["peak_resident_bytes"], 2**-30, ".2f", "GiB"),
        ),
    ]
    for arm, found in (costs["inference"] or {}).items():
        rows.append(
            (f"inference, {arm}", _maybe(found["median_seconds"], 1e3, ".1f", "ms"))
        )
    for row in rows:
        table.add_row(*row)
    return table


def _maybe(value: float | None, scale: float, digits: str, unit: str) -> str:
    return "-" if value is None else f"{scale * value:{digits}} {unit}".rstrip()


def show_preview(shown: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what a run would be."""
    console = console or Console()
    table = Table(title=f"Sites of trial {shown['trial']}")
    for name in ("path", "layers", "d_in", "d_out", "rank", "parameters", "FLOPs"):
        table.add_column(
            name, justify="left" if name == "path" else "right", no_wrap=True
        )
    for site in shown["sites"]:
        numbers = [f"{site[k]:,}" for k in ("layers", "d_in", "d_out", "parameters")]
        numbers.insert(3, ranks_cell(site["ranks"]))
        table.add_row(escape(site["path"]), *numbers, f"{site['flops']:.3g}")
    console.print(table)
    sizes, step = shown["sizes"], shown["step"]
    facts = Table(title="Compiled, not run")
    facts.add_column("what")
    facts.add_column("figure", justify="right")
    for row in (
        ("trained in full", escape(", ".join(shown["whole"])) or "nothing"),
        ("trained parameters", f"{sizes['trained_parameters']:,}"),
        ("all parameters", f"{sizes['total_parameters']:,}"),
        ("adapter", f"{sizes['adapter_bytes'] / 2**20:.2f} MiB"),
        ("steps", f"{shown['steps']:,}"),
        (
            "batches (rows x tokens)",
            ", ".join("x".join(map(str, b)) for b in shown["batches"]),
        ),
        *_moves(shown.get("ranks")),
        ("FLOPs of the largest step", f"{step['flops']:.3g}"),
        ("memory of the largest step", f"{step['peak_bytes'] / 2**20:.0f} MiB"),
    ):
        facts.add_row(*row)
    console.print(facts)


def _moves(ranks: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows about ranks that move."""
    if ranks is None:
        return []
    ends = f"{ranks['budget_at_start']:,} to {ranks['budget_at_end']:,}"
    every = ranks["measured_every"]
    when = f"every {every} steps" if every else "before the first step"
    return [
        (f"{ranks['unit']} that are open, in {ranks['events']} events", ends),
        *((f"{name}, {when}", cost) for name, cost in ranks["signals"].items()),
    ]


def ranks_cell(ranks: Sequence[int]) -> str:
    """The rank of all layers, or runs of equal ones in their order: `4 x3, 12 x3`."""
    if len({*ranks}) == 1:
        return f"{ranks[0]:,}"
    runs = [(rank, len([*own])) for rank, own in itertools.groupby(ranks)]
    return ", ".join(f"{rank} x{n}" if n > 1 else str(rank) for rank, n in runs)


def cell(value: Any, share: bool) -> str:
    """A figure with its interval: `82.3 [80.1, 84.4]`; a dash where there is none."""
    if not isinstance(value, Mapping) or value.get("estimate") is None:
        return "-"
    scale, digits = (100, 1) if share else (1, 3)
    middle = f"{scale * value['estimate']:.{digits}f}"
    if value["low"] is None:
        return middle
    low, high = (f"{scale * value[name]:.{digits}f}" for name in ("low", "high"))
    return f"{middle} [{low}, {high}]"
