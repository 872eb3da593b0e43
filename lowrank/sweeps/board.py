"""One line per trial while a sweep runs: a live table, or plain lines in a log."""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from lowrank.core.secrets import redact_text
from lowrank.io.record import METRICS
from lowrank.sweeps.group import Trial

logger = logging.getLogger(__name__)

_STYLES = {"done": "green", "failed": "bold red", "running": "cyan"}
_TAIL = 4096
_MAX_NOTE = 300
#: Rows that a live table can show, between its head and its count.
_ROOM = 6


@dataclasses.dataclass
class _Line:
    trial: Trial
    status: str = "waiting"
    pack: str = ""
    note: str = ""


class Board:
    """Shows what becomes of every trial.

    On a terminal a table is redrawn twice a second, whose running rows read how far
    their trials are from the ends of their own metrics files: whoever runs a pack need
    not know that somebody watches. Elsewhere every change of a status is one log line.
    """

    def __init__(self, trials: Sequence[Trial], progress: bool = True):
        """Takes the trials in the order of their lines."""
        self._lines = {trial.id: _Line(trial) for trial in trials}
        console = _console()
        self._live = None
        if progress and console.is_terminal:
            # On the console of the log, which then moves the table out of its way.
            self._live = Live(
                get_renderable=self.table,
                console=console,
                refresh_per_second=2,
                transient=True,
            )

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            if self._lines:
                self._live.console.print(self.table(whole=True))
        counts = self.counts()
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        logger.info("%d trials: %s", len(self._lines), told or "none")

    def tell(self, trial: Trial, status: str, note: str = "", pack: str = "") -> None:
        """Takes a trial's new status: waiting, running, done, failed or not run."""
        line = self._lines[trial.id]
        line.status, line.pack = status, pack or line.pack
        line.note = redact_text(note)
        if self._live is None:
            parts = [f"trial {trial.id}", trial.label, status, line.note]
            log = logger.error if status == "failed" else logger.info
            log("%s", ": ".join(part for part in parts if part))

    def counts(self) -> dict[str, int]:
        """Trials by status, in the order in which statuses first occur."""
        found: dict[str, int] = {}
        for line in self._lines.values():
            found[line.status] = found.get(line.status, 0) + 1
        return found

    def table(self, whole: bool = False) -> Table:
        """One row per trial; of a sweep longer than the screen, the ones that move."""
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "differs in", "pack", "status", ""):
            table.add_column(name, overflow="fold")
        lines = list(self._lines.values())
        room = max((self._live.console.height if self._live else 99) - _ROOM, 4)
        if len(lines) > room and not whole:
            # A stable sort: running ones first, then waiting, then what has ended.
            order = {"running": 0, "waiting": 1, "failed": 2}
            lines = sorted(lines, key=lambda line: order.get(line.status, 3))[:room]
        for line in lines:
            note = line.note
            if line.status == "running":
                note = progress_of(line.trial.directory / METRICS) or note
            table.add_row(
                line.trial.id,
                escape(line.trial.label),
                line.pack,
                f"[{_STYLES.get(line.status, 'dim')}]{line.status}[/]",
                escape(note[:_MAX_NOTE]),
            )
        if len(lines) < len(self._lines):
            counts = [f"{n} {status}" for status, n in self.counts().items()]
            table.add_row("", f"of {len(self._lines)}: {', '.join(counts)}", "", "", "")
        return table


def progress_of(path: Path) -> str:
    """How far a metrics file has come: `step 40, train/loss 0.31`; empty at first."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # Cut by the seek, or not yet whole.
            continue
        if isinstance(row, dict) and "step" in row and "train/loss" in row:
            return f"step {row['step']}, train/loss {row['train/loss']:.4g}"
    return ""


def _console() -> Console:
    """Where the log goes, if that is a console; else stderr."""
    handlers = logging.getLogger().handlers
    rich = [one for one in handlers if isinstance(one, RichHandler)]
    return rich[0].console if rich else Console(stderr=True)
