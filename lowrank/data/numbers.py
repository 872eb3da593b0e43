"""Texts, or pairs of texts, and a number that belongs to each: regression.

``data=values`` reads the user's files; a similarity or a grade is such a number.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float64

from lowrank.core.spec import spec
from lowrank.data.builders import files, table
from lowrank.data.splits import (
    MAX_OVERLAP,
    Task,
    check_cut,
    cut_missing,
    make_task,
    tied,
)


@dataclasses.dataclass(frozen=True)
class ValueTask:
    """Texts and their numbers in splits.

    Attributes:
      task: The texts; it has no classes.
      values: The number of every row, by split.
    """

    task: Task
    values: Mapping[str, Float64[np.ndarray, " _"]]

    @property
    def fingerprint(self) -> str:
        """sha256 over all texts and numbers."""
        digest = hashlib.sha256(self.task.fingerprint.encode())
        for split in sorted(self.values):
            digest.update(np.ascontiguousarray(self.values[split], "<f8").tobytes())
        return digest.hexdigest()


@spec
class ValueData:
    """The user's own texts and numbers: CSV, JSON lines or Parquet.

    Attributes:
      path: A file, which is then cut into splits, or a folder with files called
        train, validation (valid, val, dev) and test.
      format: Read from the suffix if "auto".
      text: Column of the text.
      pair: Column of a second text, where two are judged together.
      value: Column of the number.
      id: Column of the row's name, unique over all splits.
      group: Column of what makes rows dependent; no group is cut through.
      validation_share: Part of train that is cut off where no validation is given.
      test_share: Part of train that is cut off, first, where no test is given.
      seed: Which rows are cut off.
    """

    kind: ClassVar[str] = "values"

    path: str
    format: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    text: str = "text"
    pair: str | None = None
    value: str = "value"
    id: str | None = None
    group: str | None = None
    validation_share: float = 0.15
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut(self)
        self.reading()

    def reading(self) -> files.Reading:
        """How the files are read."""
        return files.Reading(
            format=self.format,
            text=self.text,
            pair=self.pair,
            label=self.value,
            id=self.id,
            group=self.group,
            numbers=True,
        )

    def load(self, data_dir: Path | None = None) -> ValueTask:
        """The rows, cut into splits.

        Args:
          data_dir: Not used: what is read is read again.

        Raises:
          BadInput: A file or a row is wrong, or there are too few rows.
        """
        del data_dir
        found = table.locate(self.path, {}, "values")
        contents = table.contents(found)
        read = {
            split: files.read_columns(pairs, self.reading())
            for split, pairs in contents.items()
        }
        splits, numbers = table.as_splits(read)
        shares = self.validation_share, self.test_share, self.seed
        splits, notes = cut_missing(tied(splits, MAX_OVERLAP), *shares)
        notes = {"source": "files", "files": table.hashes(contents), **notes}
        task = make_task(f"values/{Path(self.path).stem}", (), splits, notes)
        return ValueTask(
            task,
            {
                name: np.array([float(numbers[one]) for one in rows.ids])
                for name, rows in splits.items()
            },
        )


CATALOGUE: Mapping[str, type[Any]] = {"values": ValueData}
