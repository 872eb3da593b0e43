"""The tables of docs/pods.md: python -m experiments.rehearsal_tables

Each rehearsal is a command of its own, as a user would give it; its report is kept as
JSON. With --write alone the tables are made of the reports that are there.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import BadInput
from lowrank.report.rehearsal import markdown

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "experiments" / "results" / "rehearsals"
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- rehearsals: begin -->", "<!-- rehearsals: end -->"
_SAME = ("delta.rank=16", "rehearse.rows=128", "rehearse.length=2048")
#: Name of the report -> what the command is given.
RUNS: Mapping[str, Sequence[str]] = {
    "8b_v5e_256": ("base=llama3_8b", "mesh=v5e_256", *_SAME),
    "8b_v5e_256_tensor_16": (
        *("base=llama3_8b", "mesh=v5e_256", "mesh.fsdp=16", "mesh.tensor=16", *_SAME),
    ),
    "8b_v5p_128": ("base=llama3_8b", "mesh=v5p_128", *_SAME),
    "70b_v5p_128": ("base=llama3_70b", "mesh=v5p_128", *_SAME),
    "1b_pack_v5e_16": (
        *("base=llama3_1b", "mesh=v5e_16", "mesh.trial=4", "mesh.fsdp=4"),
        *("delta.rank=16", "rehearse.trials=8", "rehearse.rows=8"),
        "rehearse.length=1024",
    ),
    "8b_full_v5e_256": (
        *("base=llama3_8b", "mesh=v5e_256", "delta=full"),
        *("rehearse.rows=128", "rehearse.length=2048"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearses what is named, or all, and writes the tables."""
    parser = argparse.ArgumentParser("python -m experiments.rehearsal_tables")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--write", action="store_true", help="the tables alone")
    options = parser.parse_args(arguments)
    if unknown := {*options.names} - {*RUNS}:
        parser.error(f"unknown {sorted(unknown)}; there are {', '.join(RUNS)}")
    for name in () if options.write else options.names or RUNS:
        print(f"rehearsing {name}", file=sys.stderr)
        line = [sys.executable, "-m", "experiments.rehearse", *RUNS[name]]
        # As seen from the project: the line is kept in the report.
        line.append(f"rehearse.out={(REPORTS / name).relative_to(ROOT)}.json")
        if code := subprocess.run(line, cwd=ROOT).returncode:
            return code
    PAGE.write_text(with_tables(PAGE.read_text(), stored()))
    return 0


def stored() -> dict[str, dict[str, Any]]:
    """The reports that are there, by their names."""
    found = {}
    for name in RUNS:
        file = REPORTS / f"{name}.json"
        if file.is_file():
            found[name] = json.loads(file.read_text())
    return found


def with_tables(page: str, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with tables of these reports between its marks.

    Raises:
      BadInput: It has no such marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise BadInput(f"{PAGE} has no {BEGIN} and {END}, between which tables go")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{tables(reports)}{END}{tail}"


def tables(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """What each step takes, and what compiling it took here."""
    if not reports:
        return "\n"
    lines = ["", markdown([*reports.values()]), ""]
    lines += [
        "| command, `python -m experiments.rehearse` ... | trained, all parameters | "
        "FLOPs | layers gathered at once | compiled in s | host GiB | by |",
        "|" + "---|" * 7,
    ]
    for name, one in reports.items():
        counts = one["parameters"]
        layers = (one.get("gathers") or {}).get("layers_at_once", "-")
        lines.append(
            f"| `{' '.join(RUNS[name])}` | {counts['trained']:,}, {counts['total']:,} "
            f"| {one['flops']:.3g} | {layers} | {one['compile_seconds']:.0f} | "
            f"{one['host_peak_bytes'] / 2**30:.1f} | {one['versions']['compiler']}, "
            f"jax {one['versions']['jax']}, {one['date']} |"
        )
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    sys.exit(main())
