"""Ends a run that hangs: shows where every thread stands, and exits with 76.

A stuck collective, file system or data loader raises nothing and returns never; a
scheduler sees a job that is alive. This thread sees that nothing has been reported for
too long. Steps have a short budget; compiling, restoring, evaluating and saving have
one of their own, so that a slow compilation is no false alarm.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from lowrank.core.errors import HANG, BadInput

logger = logging.getLogger(__name__)

#: What is reported while training; everything else has the longer budget.
STEP = "training"
#: How long the last words (a status file) may take: their disk may be what hangs.
_REPORT_SECONDS = 5.0


class Watchdog:
    """Watches one run, from `with` to the end of the block.

    Only time in which this process could run counts: a suspended one has not hung.
    A thread that holds Python's lock for good (in foreign code) cannot be seen.
    """

    def __init__(
        self,
        step_seconds: float | None,
        other_seconds: float | None,
        report: Callable[[str], None] = lambda reason: None,
    ):
        """Starts nothing yet.

        Args:
          step_seconds: Longest time between two steps; None: not watched.
          other_seconds: Longest compilation, restore, evaluation or save; likewise.
          report: Receives the reason before the process ends, in a thread of its own.

        Raises:
          BadInput: A limit is not positive.
        """
        for limit in (step_seconds, other_seconds):
            if limit is not None and not limit > 0:
                raise BadInput(f"a hang is told after a positive time, not {limit} s")
        self._limits = (step_seconds, other_seconds)
        self._report = report
        # One tuple, replaced as a whole: read and written without a lock.
        self._doing: tuple[str, int] = ("preparing", 0)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        limits = [limit for limit in self._limits if limit is not None]
        if limits:
            # Short beside the limit, and never a burden.
            self._interval = min(1.0, min(limits) / 10)
            self._thread = threading.Thread(
                target=self._watch, name="watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def alive(self, doing: str) -> None:
        """Reports progress: from here on the run does this, and its budget begins."""
        self._doing = (doing, self._doing[1] + 1)

    def _watch(self) -> None:
        seen, idle, last = self._doing, 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            passed, last = now - last, now
            if self._doing is not seen:
                seen, idle = self._doing, 0.0
                continue
            # A tick that took far longer than its interval was a suspended process.
            idle += min(passed, 2 * self._interval)
            limit = self._limits[seen[0] != STEP]
            if limit is not None and idle > limit:
                self._end(f"{seen[0]} has not moved for {limit:g} s")

    def _end(self, reason: str) -> None:
        logger.error(
            "HANG: %s; the stacks of all threads follow. The last checkpoint is good: "
            "the same command continues. Raise run.hang_seconds or "
            "run.pause_seconds if this was only slow.",
            reason,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        words = threading.Thread(target=self._report, args=(reason,), daemon=True)
        words.start()
        words.join(_REPORT_SECONDS)
        os._exit(HANG)
