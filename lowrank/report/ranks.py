"""Ranks that moved, told: a table, ranks.md with its figures, and how to go on."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank.core.errors import Corrupt
from lowrank.io.files import write_atomically
from lowrank.io.history import RankHistory, load_ranks
from lowrank.report.arms import numbers, records
from lowrank.report.drawing import Drawing
from lowrank.report.rank_figures import amount, draw_ranks

#: Folder in the run directory, and what is written to it.
FOLDER, REPORT, LAYERS, MOVES = "ranks", "ranks.md", "ranks.csv", "moves.csv"
#: Rows of the table in ranks.md; how many more there are is said.
MOST = 40
_OVERRIDES = ".hydra/overrides.yaml"
#: Arguments that are of the run that was, not of one that is to follow it.
_OF_THE_RUN = ("ranks", "sweep", "run.directory", "run.force", "loop.stop_after")
_FIELDS = ("start", "final", "moved", "births", "deaths", "revivals")


def report_ranks(directory: str, console: Console | None = None) -> Path:
    """Shows how a run's ranks moved and writes `<directory>/ranks/`.

    Args:
      directory: Of a finished run.
      console: Where to.

    Returns:
      The path of ranks.md.

    Raises:
      BadInput: It is no run, it has not finished, or its ranks were fixed.
      Corrupt: A file of it is damaged.
      CannotWrite: The file system refused.
    """
    history = load_ranks(directory)
    show_ranks(history, console)
    return write_ranks(history)


def show_ranks(history: RankHistory, console: Console | None = None) -> None:
    """Prints every layer's rank at the start and the end, and how often it moved."""
    console = console or Console()
    table = Table(title=escape(_title(history)), caption=escape(_budget(history)))
    table.add_column("site", no_wrap=True)
    for name in ("start rank", "final rank", "times moved"):
        table.add_column(name, justify="right", min_width=5)
    for row in records(history.summary):
        cells = [f"{row[name]:,}" for name in ("start", "final", "moved")]
        table.add_row(escape(row["layer"]), *cells)
    console.print(table)
    console.print("Train from the start with the final ranks:")
    # Whole, so that it can be copied.
    console.print(retrain(history), markup=False, highlight=False, soft_wrap=True)


def write_ranks(history: RankHistory, folder: Path | None = None) -> Path:
    """Writes ranks.md, its figures, and its tables as ranks.csv and moves.csv.

    Args:
      history: From `lowrank.load_ranks`.
      folder: Where to; `ranks` in the run directory if None.

    Returns:
      The path of ranks.md.

    Raises:
      CannotWrite: The file system refused.
    """
    folder = history.record.directory / FOLDER if folder is None else folder
    # First what says in a word that a folder cannot be written.
    _write(folder / LAYERS, history.summary.to_csv(index=False))
    _write(folder / MOVES, history.moves.to_csv(index=False))
    drawings = draw_ranks(history)
    for drawing in drawings:
        drawing.save(folder)
    parts = [_head(history), *map(_figure, drawings), _table(history)]
    _write(folder / REPORT, "\n\n".join(parts) + "\n")
    return folder / REPORT


def retrain(history: RankHistory) -> str:
    """The command that trains from the start with the final ranks, else alike.

    The arguments are those that the run was given, without what chose its ranks. A run
    that was called from Python has left none: give its settings.
    """
    source = str(history.record.directory)
    if not re.fullmatch(r"[\w./-]+", source):
        # Other signs mean something to Hydra.
        source = "'" + source.replace("'", r"\'") + "'"
    kept = [one for one in _overrides(history) if not _of_the_run(one)]
    arguments = shlex.join([*kept, "ranks=given", f"ranks.from={source}"])
    return f"python -m experiments.train {arguments}"


def _overrides(history: RankHistory) -> Sequence[str]:
    path = history.record.directory / _OVERRIDES
    history.record.check(_OVERRIDES)
    try:
        found = yaml.safe_load(path.read_bytes()) if path.exists() else []
    except (OSError, yaml.YAMLError) as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error
    if not isinstance(found, list):
        raise Corrupt(f"{path} is no list of arguments; it was edited")
    return [str(one) for one in found]


def _of_the_run(argument: str) -> bool:
    name = argument.lstrip("+~").partition("=")[0].partition("@")[0]
    return any(name == one or name.startswith(f"{one}.") for one in _OF_THE_RUN)


def _title(history: RankHistory) -> str:
    status = history.record.status
    name = (history.record.config.get("ranks") or {}).get("name", "ranks")
    trial = status["identity"].get("config", history.record.directory)
    return f"Trial {trial}: ranks={name}, {_events(history)}"


def _events(history: RankHistory) -> str:
    return f"{history.num_events:,} event{'' if history.num_events == 1 else 's'}"


def _budget(history: RankHistory) -> str:
    used, averages = history.budget["used"].tolist(), history.averages
    text = (
        f"budget used: {used[0]:,} to {used[-1]:,} {history.unit}, time average "
        f"{amount(averages['used'])}"
    )
    if history.revivable:
        text += f" ({amount(averages['forward'])} computed with)"
    return text


def _head(history: RankHistory) -> str:
    summary = history.summary
    told = [f"{numbers(summary, name).sum():,.0f} {name}" for name in _FIELDS[3:]]
    steps = history.steps[1:].tolist()
    events = _events(history)
    if steps:
        events += (
            f", before steps {steps[0]:,} to {steps[-1]:,} of {history.num_steps:,}"
        )
    empty = np.sum(numbers(summary, "final") == 0)
    moved = np.sum(numbers(summary, "moved") > 0)
    return "\n".join(
        [
            f"# {_title(history)}",
            "",
            f"- {_capital(_budget(history))}; the schedule asked for "
            f"{history.target[0]:,} to {history.target[-1]:,}.",
            f"- {_capital(events)}.",
            f"- {', '.join(told)}; {moved} of {len(summary)} layers moved, {empty} "
            "ended with rank 0.",
            "",
            "Train from the start with the final ranks, at the same scale:",
            "",
            f"```bash\n{retrain(history)}\n```",
        ]
    )


def _figure(drawing: Drawing) -> str:
    image = f"![{drawing.title}]({drawing.name}.png)"
    return f"## {drawing.title}\n\n{image}\n\n{drawing.note}"


def _table(history: RankHistory) -> str:
    rows = records(history.summary)
    lines = [
        "## Layers",
        "",
        "| layer | start | final | times moved | births | deaths | revivals |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows[:MOST]:
        cells = " | ".join(str(row[name]) for name in _FIELDS)
        lines.append(f"| `{row['layer']}` | {cells} |")
    if len(rows) > MOST:
        lines += ["", f"{len(rows) - MOST} more are in {LAYERS}."]
    return "\n".join([*lines, "", f"Every move is in {MOVES}."])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
