"""How a benchmark ends: a report, shown and kept, or an error and its exit code."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowrank.core.errors import LowrankError, exit_code
from lowrank.io.files import write_json_atomically


def reported(
    compare: Callable[[], Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    out: str | None,
) -> int:
    """Runs a comparison and prints its table; the exit code says whether it could.

    Args:
      compare: Makes the report, of JSON types.
      table: The report as Markdown.
      out: File of the report, its table beside it as .md; None: neither.
    """
    try:
        report = compare()
    except LowrankError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    print(table(report))
    if out:
        path = Path(out)
        write_json_atomically(path, report)
        path.with_suffix(".md").write_text(table(report), "utf-8")
    return 0
