"""Progress bars of evaluations, which may be over at once or take an hour."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

# A bar that appears only to vanish is noise.
_QUIET_SECONDS = 2.0


@contextlib.contextmanager
def bar(wanted: bool, text: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that shows up once the work proves long.

    Args:
      wanted: Whether to show one; there is none without a terminal.
      text: What is done.
      total: How often it will advance; None if nobody knows.

    Yields:
      What advances it by one.
    """
    if not (wanted and sys.stderr.isatty()):
        yield lambda: None
        return
    shown_bar = Progress(console=Console(stderr=True), transient=True)
    task = shown_bar.add_task(text, total=total)
    began, shown = time.monotonic(), False

    def advance() -> None:
        nonlocal shown
        shown_bar.advance(task)
        if not shown and time.monotonic() - began > _QUIET_SECONDS:
            shown_bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            shown_bar.stop()
