"""The record of a run's numbers: lines appended to a file, one per call."""

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from lowrank.core.errors import BadInput, CannotWrite, Corrupt

_log = logging.getLogger(__name__)
#: Names of a line that are no metrics.
RESERVED = frozenset({"step", "time", "summary"})

#: Metric name -> number; NumPy's and JAX's scalars count as numbers.
Values = Mapping[str, SupportsFloat]


def encode_number(value: float) -> float | str:
    """`value`, or ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, which JSON lacks."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode_number(value: Any) -> Any:
    """The inverse of `encode_number`; whatever else comes in comes out unchanged."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


class JsonlTracker:
    """Appends one JSON object per call to a file: ``{"step":, "time":, **values}``.

    `time` is in seconds since 1970. A number that JSON lacks is text, see
    `encode_number`. Every line reaches the operating system before `log` returns, so
    that a killed process loses none.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens `path` for appending and drops a line that a kill cut short.

        Raises:
          CannotWrite: The file cannot be opened.
        """
        self.path = Path(path).absolute()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            self._drop_partial_line()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._sha256 = self._hash_file()

    def log(self, step: int, values: Values) -> None:
        """Appends one line.

        Raises:
          BadInput: A value is not a number, or is called step, time or summary.
          CannotWrite: The file system refused; the file holds no part of the line.
        """
        if taken := RESERVED & values.keys():
            raise BadInput(
                f"a metric cannot be called {', '.join(sorted(taken))}: lines of "
                f"{self.path.name} use that name themselves. Rename it."
            )
        numbers = {name: _number(name, value) for name, value in values.items()}
        self._append({"step": int(step), "time": time.time(), **numbers})

    def summary(self, values: Values) -> None:
        """Appends ``{"time":, "summary": values}``."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        self._append({"time": time.time(), "summary": numbers})

    def close(self, status: str) -> None:
        """Closes the file; the status stands in the record."""
        self._file.close()

    def offset(self) -> int:
        """The length of the file in bytes, after what was logged is on the disk.

        A checkpoint stores it, and a resumed run passes it to `truncate`.
        """
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def sha256(self) -> str:
        """Of the file up to `offset`; a checkpoint stores both."""
        return self._sha256.hexdigest()

    def truncate(self, offset: int, sha256: str | None = None) -> None:
        """Drops what was logged after `offset` was taken.

        Args:
          offset: What `offset` gave.
          sha256: What `sha256` gave then; None: not compared.

        Raises:
          Corrupt: The file is shorter, no line ends there, or it was changed since.
        """
        size = os.fstat(self._file.fileno()).st_size
        whole = offset == 0
        if 0 < offset <= size:
            whole = os.pread(self._file.fileno(), 1, offset - 1) == b"\n"
        if not whole:
            raise Corrupt(
                f"{self.path} has {size} bytes and no line ends at byte {offset}, "
                "where the checkpoint says that its metrics end. Restore the file "
                "from a copy, or start over with force=true."
            )
        found = self._hash_file(offset)
        if sha256 is not None and found.hexdigest() != sha256:
            raise Corrupt(
                f"{self.path} is not, up to byte {offset}, what it was when the "
                "checkpoint was written: it is damaged, or was edited. Restore the "
                "file from a copy, or start over with force=true."
            )
        self._file.truncate(offset)
        self._sha256 = found

    def _hash_file(self, size: int = -1):
        """sha256 of the first `size` bytes; of all if it is negative."""
        self._file.seek(0)
        return hashlib.sha256(self._file.read(size))

    def _append(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) != len(data):
                raise OSError("the file system took only a part of the line")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise self._cannot_write(error) from error
        self._sha256.update(data)

    def _drop_partial_line(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            _log.warning("dropped a line cut short at the end of %s", self.path)
            self._file.truncate(whole)

    def _cannot_write(self, error: OSError) -> CannotWrite:
        return CannotWrite(
            f"cannot write {self.path}: {error.strerror or error}. Free space or file "
            "permissions on that file system, or choose another run directory."
        )


def _number(name: str, value: Any) -> float | int | str:
    if not isinstance(value, bool | int):
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise BadInput(
                f"metric {name!r} is {value!r} ({type(value).__name__}), not a number"
            ) from None
        return encode_number(value)
    return int(value)
