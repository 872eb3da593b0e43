"""The weights of a base as a table for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_ROLES = {"stack": "L", "in": "in", "out": "out"}


def show_sites(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what `run.survey` found: weights that can be adapted, then the others."""
    console = console or Console()
    weights = found["weights"]
    fits = [row for row in weights if row["adaptable"]]
    inputs = ", ".join(f"{n} {_sizes(x['shape'])}" for n, x in found["inputs"].items())
    title = f"{found['base']['name']}: {len(fits)} of {len(weights)} weights fit"
    table = Table(title=escape(title), caption=escape(f"traced with {inputs}"))
    for name in ("weight", "shape", "axes", "uses", "largest", "params", "FLOPs"):
        left = name in ("weight", "axes", "uses")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in fits:
        table.add_row(
            escape(row["first_layer"] or row["path"]),
            _sizes(row["shape"]),
            _axes(row["axes"], len(row["shape"])),
            escape(_uses(row["uses"])),
            f"{row['largest_rank']:,}",
            f"{row['parameters_per_rank']:,}",
            "-" if row["flops_per_rank"] is None else f"{row['flops_per_rank']:.3g}",
        )
    if fits:
        console.print(table)
        console.print(
            "L: layers of a stack, named [0], [1], ... as shown; largest rank; "
            "parameters and forward FLOPs that each component adds, all layers together"
        )
    if len(fits) < len(weights):
        console.print(_others([row for row in weights if not row["adaptable"]]))


def _others(weights: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Not to be corrected by a low-rank delta")
    table.add_column("weight", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("uses", no_wrap=True)
    table.add_column("why: it")
    for row in weights:
        cells = (_sizes(row["shape"]), escape(_uses(row["uses"])), row["obstacle"])
        table.add_row(escape(row["path"]), *cells)
    return table


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _axes(axes: Mapping[str, Sequence[int]], count: int) -> str:
    """The role of each axis in order: `L in out`."""
    roles = {d: _ROLES[role] for role, own in axes.items() for d in own}
    return " ".join(roles[d] for d in range(count))


def _uses(uses: Sequence[Mapping[str, Any]]) -> str:
    """Primitives with the trips of the loops around them: `dot_general x6`."""
    told = []
    for use in uses:
        trips = "?" if use["trips"] is None else f"{use['trips']:g}"
        told.append(use["primitive"] + (f" x{trips}" if trips != "1" else ""))
    return ", ".join(dict.fromkeys(told)) or "none"
