"""The run directory, as read: what reports, notebooks and sweeps know of a run."""

import io
import json
import logging
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lowrank.core.errors import BadInput, Corrupt
from lowrank.io.files import local_path, read_json
from lowrank.io.record import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULT,
    read_result,
    read_status,
)
from lowrank.io.seals import check_sum, read_sealed
from lowrank.track.jsonl import decode_number

if TYPE_CHECKING:
    import pandas

_log = logging.getLogger(__name__)


class RecordView:
    """A run directory that is only read, while or after it is written.

    Files are read when they are asked for, once. Those of a finished run are compared
    with the hashes it was finished with.

    Attributes:
      directory: The absolute path.
      status: The content of status.json: schema, identity, status, reason, times.
    """

    def __init__(self, directory: Path):
        """See `load_record`."""
        self.directory = directory
        self.status = read_status(directory)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config, without secrets."""
        self.check(CONFIG)
        try:
            return yaml.safe_load((self.directory / CONFIG).read_bytes())
        except (OSError, yaml.YAMLError) as error:
            path = self.directory / CONFIG
            raise Corrupt(f"{path} cannot be read: {error}") from error

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and command line of the last attempt."""
        self.check(ENVIRONMENT)
        return read_json(self.directory / ENVIRONMENT)

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The result, or None of a run that has none yet."""
        return read_result(self.directory)

    @cached_property
    def costs(self) -> dict[str, Any] | None:
        """The content of costs.json, or None if it was not written."""
        path = self.directory / "costs.json"
        self.check("costs.json")
        return read_sealed(path) if path.exists() else None

    @cached_property
    def metrics(self) -> "pandas.DataFrame":
        """One row per logged line, with columns step, time and one per metric.

        A last line that is cut short, as a kill leaves it, is left out.

        Raises:
          Corrupt: Any other line is damaged.
        """
        import pandas

        path = self.directory / METRICS
        self.check(METRICS)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        if lines.pop():
            _log.warning("left out the last line of %s, which is cut short", path)
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if "step" in row:
                    rows.append({name: decode_number(row[name]) for name in row})
                elif "summary" not in row:
                    raise ValueError("it has no step")
            except (ValueError, TypeError) as error:
                raise Corrupt(
                    f"line {number} of {path} is damaged: {error}. Restore the file "
                    "from a copy, or remove that line by hand."
                ) from error
        return (
            pandas.DataFrame(rows)
            if rows
            else pandas.DataFrame(columns=["step", "time"])
        )

    def splits(self) -> tuple[str, ...]:
        """The splits that have predictions."""
        return tuple(sorted(p.stem for p in self.directory.glob("predictions/*.npz")))

    def predictions(self, split: str) -> dict[str, np.ndarray]:
        """The arrays that were saved for `split`.

        Raises:
          BadInput: There are none.
          Corrupt: The file is damaged, or holds pickled objects.
        """
        if split not in self.splits():
            raise BadInput(
                f"{self.directory} has no predictions for {split!r}; it has "
                f"{', '.join(self.splits()) or 'none'}"
            )
        return self.arrays(f"predictions/{split}")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of ``<name>.npz``.

        Raises:
          Corrupt: The file is missing or damaged, or holds pickled objects.
        """
        path = self.directory / f"{name}.npz"
        self.check(f"{name}.npz")
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise Corrupt(f"{path} cannot be read: {error}") from error

    def check(self, name: str) -> None:
        """Compares a file of a finished run with its hash; of another, does nothing.

        Raises:
          Corrupt: They differ.
        """
        if (self.directory / RESULT).exists():
            check_sum(self.directory, name)


def load_record(directory: str | os.PathLike[str]) -> RecordView:
    """Opens a run directory for reading.

    Raises:
      BadInput: It is no directory.
      Corrupt: It holds no readable status, or one of another schema.
    """
    path = local_path(directory)
    if not path.is_dir():
        raise BadInput(f"there is no run directory {path}")
    return RecordView(path)
