"""The record of a trial in a process that takes part in it and writes nothing."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lowrank.io.record import Record


class Onlooker(Record):
    """A `Record` that another process writes: what it is told, it forgets.

    Attributes:
      directory: Of the trial; all processes see it.
    """

    writes = False

    def __init__(self, directory: Path, finished: Mapping[str, Any] | None):
        """Begins where the writer's does.

        Args:
          directory: Of the trial.
          finished: The result that the writer has found there.
        """
        self.directory = directory
        self._finished = None if finished is None else dict(finished)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the status to the writer, which ends the same way."""

    @property
    def attempt(self) -> int:
        """Only the writer counts."""
        return 1

    @property
    def finished(self) -> dict[str, Any] | None:
        """As in `Record`."""
        return self._finished

    def write_json(self, name: str, value: Any) -> None:
        """Writes nothing."""

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Nothing: it may be being written."""

    def save_arrays(self, name: str, **arrays: Any) -> None:
        """Writes nothing."""

    def save_predictions(self, split: str, **arrays: Any) -> None:
        """Writes nothing."""

    def result(self, value: Mapping[str, Any]) -> None:
        """Keeps the result, and writes nothing."""
        self._finished = dict(value)

    def set_status(self, status: str, reason: str | None = None) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Holds no lock."""
