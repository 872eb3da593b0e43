"""A rehearsal as tables for a terminal, and as rows of a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_GIB, _MIB = 2**30, 2**20


def show_rehearsal(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what a step would take: memory, FLOPs, exchanges, an estimate."""
    console = console or Console()
    console.print(_memory(report))
    if report.get("exchanges") is not None:
        console.print(_exchanges(report))
        console.print(_estimate(report))
    for line in advice(report):
        console.print(escape(line), soft_wrap=True)


def show_search(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the candidates that were compiled, the best first."""
    table = Table(title=f"{len(found['tried'])} of {found['candidates']} candidates")
    for name in ("mesh", "remat", "micro-batches", "fits", "peak GiB", "ms, estimated"):
        table.add_column(name, justify="left" if name == "mesh" else "right")
    for one in found["tried"]:
        estimate = one.get("estimate")
        table.add_row(
            axes(one["mesh"]),
            one["remat"],
            str(one["accumulate"]),
            _fits(one),
            _gib(one["bytes_per_chip"].get("peak")),
            "-" if estimate is None else _between(estimate),
        )
    (console or Console()).print(table)


def axes(mesh: Mapping[str, int]) -> str:
    """Axes of a mesh, those of one device left out: `fsdp 16 x tensor 16`."""
    return " x ".join(f"{n} {c}" for n, c in mesh.items() if c > 1) or "one device"


def _memory(report: Mapping[str, Any]) -> Table:
    chip = report["chip"]
    title = (
        f"{report['base']}, {report['delta']}, on {report['topology']}: "
        f"{axes(report['mesh'])}"
    )
    table = Table(title=escape(title), caption=report["versions"]["compiler"])
    table.add_column("on one chip")
    table.add_column("GiB", justify="right")
    for name, value in report["bytes_per_chip"].items():
        table.add_row(name, _gib(value))
    table.add_row(f"memory of a {chip['name']}", _gib(chip["memory"]))
    table.add_row("fits", _fits(report))
    return table


def _exchanges(report: Mapping[str, Any]) -> Table:
    table = Table(title="Between chips, of one chip in one step")
    table.add_column("moves")
    table.add_column("by")
    for name in ("chips", "times", "MiB sent", "largest"):
        table.add_column(name, justify="right")
    for row in report["exchanges"]:
        table.add_row(
            row["moves"],
            row["kind"],
            str(row["group"]),
            f"{row['times']:,.0f}",
            f"{row['bytes'] / _MIB:,.2f}",
            row["largest"],
        )
    if not report["exchanges"]:
        table.add_row("nothing", *[""] * 5)
    return table


def _estimate(report: Mapping[str, Any]) -> Table:
    table = Table(title="At least, by published figures: an estimate, no measurement")
    table.add_column("what")
    table.add_column("ms", justify="right")
    for name in ("products", "memory", "exchanges"):
        table.add_row(name, f"{1e3 * report['estimate'][name]:,.1f}")
    table.add_row("a step", _between(report["estimate"]))
    table.add_row("FLOPs of a step, all chips", f"{report['flops']:.3g}")
    return table


def advice(report: Mapping[str, Any]) -> list[str]:
    """What to change where a step does not fit; nothing where it does."""
    lines = []
    gathers = report.get("gathers") or {}
    if gathers.get("layers_at_once", 0) > 1:
        lines.append(
            f"{gathers['layers_at_once']} layers of a weight are gathered at once: the "
            "compiler does not go layer by layer here (base.scan=true?)"
        )
    if report["fits"] is not False:
        return lines
    lines.append(f"It does not fit. {report.get('why', '')}".strip())
    if report["remat"] != "full":
        lines.append("base.remat=full keeps of a layer its input alone.")
    lines.append(
        f"optim.accumulate={2 * report['accumulate']} makes micro-batches half as "
        "large; a smaller rehearse.rows does the same to the batch."
    )
    held = report["bytes_per_chip"]
    if held["base"] > 0.25 * report["chip"]["memory"]:
        lines.append(
            "More devices along mesh.fsdp or mesh.tensor hold less of the base."
        )
    if held["optimizer"] > 0.25 * report["chip"]["memory"]:
        lines.append("A lower mesh.small splits factors and their moments, too.")
    lines.append("rehearse.search=true looks for what fits.")
    return lines


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """One row per rehearsal."""
    header = (
        "| step | topology, mesh | fits | peak | base | factors, moments | "
        "kept, other | base moved | trained and gradients moved | activations moved | "
        "ms, estimated |"
    )
    lines = [header, "|" + "---|" * 11]
    for one in reports:
        held = one["bytes_per_chip"]
        own = held["factors"] + held["best factors"] + held["optimizer"]
        temporaries = [
            _gib(held.get(name))
            for name in ("kept for the pass back", "other temporaries")
        ]
        sent = {}
        for row in one.get("exchanges") or ():
            sent[row["moves"]] = sent.get(row["moves"], 0) + row["bytes"]
        moved = [sent.get(name, 0) for name in ("base", "gradients", "activations")]
        moved[1] += sent.get("trained", 0)
        estimate = one.get("estimate")
        cells = [
            f"{one['base']}, {one['delta']}, {one['trials']} x {one['rows']} x "
            f"{one['length']}, remat {one['remat']}",
            f"{one['topology']}, {axes(one['mesh'])}",
            _fits(one),
            _gib(held.get("peak")),
            _gib(held["base"]),
            _gib(own),
            ", ".join(temporaries),
            *[f"{size / _GIB:.3f}" for size in moved],
            "-" if estimate is None else _between(estimate),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fits(report: Mapping[str, Any]) -> str:
    return {True: "yes", False: "no", None: "not told"}[report["fits"]]


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / _GIB:.3f}"


def _between(estimate: Mapping[str, float]) -> str:
    low, high = estimate["overlapped"], estimate["one_after_another"]
    return f"{1e3 * low:,.0f} to {1e3 * high:,.0f}"
