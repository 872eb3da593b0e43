"""What every source of rows with classes can be asked, and how it ends in a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data.splits import Split, Task, make_task, merge, subsample

MAX_SEED = 2**31


@spec
class TaskSpec:
    """What every source of data can be asked.

    Attributes:
      train_on_validation: Train on train and validation rows together, as a last fit
        after everything has been chosen; the task then has no validation split.
      rows_per_class: At most so many training rows of each class.
      max_rows: At most so many training rows, at least one of each class.
      sample_seed: Which training rows these are; a smaller sample is part of a larger.
    """

    kind: ClassVar[str] = "classes"

    train_on_validation: bool = False
    rows_per_class: int | None = None
    max_rows: int | None = None
    sample_seed: int = 0

    def load(self, data_dir: Path | None = None) -> Any:
        """The rows, checked and cut into splits; every source has its own way.

        Args:
          data_dir: Folder of prepared data; $LOWRANK_CACHE/data if None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no load")

    def check(self) -> None:
        """Raises `BadInput` if a number is out of range."""
        for name in ("rows_per_class", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"data.{name} must be at least 1, not {value}")
        for name in ("sample_seed", "seed"):
            value = getattr(self, name, 0)
            if not 0 <= value < MAX_SEED:
                raise BadInput(f"data.{name} must be from 0 to 2**31 - 1, not {value}")
        for name in ("validation_share", "test_share"):
            value = getattr(self, name, 0.5)
            if not 0.0 < value < 1.0:
                raise BadInput(f"data.{name} must lie between 0 and 1, not {value}")

    def finish(
        self,
        name: str,
        classes: Sequence[str],
        splits: Mapping[str, Split],
        provenance: Mapping[str, Any],
    ) -> Task:
        """Merges and thins out the train split as asked, and makes the task.

        Raises:
          BadInput: `max_rows` is too small, or there is no validation split to merge.
        """
        splits, notes = dict(splits), dict(provenance)
        if self.train_on_validation:
            if "validation" not in splits:
                raise BadInput("data.train_on_validation: there is no validation split")
            splits["train"] = merge(splits["train"], splits.pop("validation"))
            notes["train_on_validation"] = True
        if self.rows_per_class is not None or self.max_rows is not None:
            limits = {"rows_per_class": self.rows_per_class, "max_rows": self.max_rows}
            notes["sample"] = {
                **limits,
                "seed": self.sample_seed,
                "of_rows": len(splits["train"]),
            }
            train = subsample(splits["train"], **limits, seed=self.sample_seed)
            splits["train"] = train
        return make_task(name, classes, splits, notes)
