"""What a kind of data asks of a run: a base, batches, a loss and numbers about it.

A run trains corrections of any model on any batches. What is different about labels and
answers stands behind `Problem`; `run.problems` lists the kinds.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from lowrank.core.errors import UnknownName
from lowrank.io.hub import Base
from lowrank.io.language import Language
from lowrank.run.forward import Batch
from lowrank.run.judges import Judge, Predict
from lowrank.run.settings import Settings
from lowrank.train.batches import TrainBatches
from lowrank.train.losses import Loss

_CARD = """# {name}

LoRA adapter of `{base}` for `{task}`{what}, trained with `lowrank`.

* License of the base: {license}
* Fingerprint of the base: `{fingerprint}`
{notes}* Trial: `{name}`; its folder holds config, metrics, costs and predictions.

With `lowrank`: `lowrank.load_run("<folder of the run>")`.{code}
"""
Rows = TypeVar("Rows")
#: What stands for the splits of data together, where none of it was trained on.
ALL = "all"


@runtime_checkable
class Scored(Protocol):
    """What a model made of a whole split, each row once."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is kept of it, row by row; plain arrays."""
        ...

    def report(self, *, resamples: int, level: float) -> dict[str, Any]:
        """ "num_rows", "clustered" (whether groups were resampled), "metrics" {name:
        fields of `stats.Interval`}, and what else the kind has to tell; JSON types."""
        ...


@dataclasses.dataclass(frozen=True)
class Shipping:
    """How an adapter leaves for PEFT.

    Attributes:
      module: (path of a weight, number of its layer) -> name of its module there.
      kernel: (module, whether layers are stacked) -> path of its weight, and the
        number of its layer.
      card: Text of its README.md.
      task_type: PEFT's; None for a model that PEFT does not know.
      notes: Our own facts about it.
      unnamed: Patterns of weights that no module of PEFT's corrects.
    """

    module: Callable[[str, int | None], str]
    kernel: Callable[[str, bool], tuple[str, int | None]]
    card: str
    task_type: str | None
    notes: Mapping[str, Any]
    unnamed: Sequence[str] = ()


@runtime_checkable
class Problem(Protocol):
    """Data and base of a trial, loaded and checked.

    Attributes:
      name: What reports call the data.
      fingerprint: sha256 over all of its rows.
      checks: What a look at the data found, as JSON types.
      provenance: Where the data come from and what was done to them, as JSON types.
      base: The pretrained model.
      rows: How many rows each split has.
      facts: What a result says of the data beyond that, as JSON types.
      loss: What is minimized.
      judge: What a validation's numbers are.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def checks(self) -> Mapping[str, Any]: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    @property
    def base(self) -> Base | Language: ...

    @property
    def rows(self) -> Mapping[str, int]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def judge(self) -> Judge: ...

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        """What the model reads of a batch."""
        ...

    def full(self, rows: int, width: int) -> Any:
        """Inputs in which nothing is padding, for timing."""
        ...

    def batches(self, seeds: Sequence[int]) -> TrainBatches:
        """Training data of a pack, one seed per trial."""
        ...

    def evaluation(self, split: str) -> Sequence[Batch]:
        """A split in order, every row once."""
        ...

    def ids(self, split: str) -> Sequence[str]:
        """Names of a split's rows."""
        ...

    def score(self, split: str, predict: Predict, progress: bool) -> Sequence[Scored]:
        """What every trial makes of a split."""
        ...

    def shipping(self, settings: Settings) -> Shipping | None:
        """How a trial's adapter leaves for PEFT; None if PEFT cannot name the base."""
        ...


def known_split(splits: Mapping[str, Rows], name: str) -> Rows:
    """The rows of a split, or of all splits, one after another.

    Raises:
      UnknownName: There is no such split.
    """
    if name == ALL:
        return functools.reduce(_joined, splits.values())
    if name not in splits:
        raise UnknownName(f"no split {name!r}; there are {', '.join(splits)}, or {ALL}")
    return splits[name]


def _joined(first: Rows, second: Rows) -> Rows:
    """The rows of both: columns are tuples or arrays, or None in either."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(first):  # pyright: ignore[reportArgumentType]
        one, two = (getattr(rows, field.name) for rows in (first, second))
        if one is None or two is None:
            columns[field.name] = None
        elif isinstance(one, tuple):
            columns[field.name] = one + two
        else:
            columns[field.name] = np.concatenate([one, two])
    return type(first)(**columns)


def card_of(
    problem: Problem,
    settings: Settings,
    *,
    what: str = "",
    notes: Sequence[str] = (),
    code: str | None = None,
) -> str:
    """The README.md of an adapter.

    Args:
      problem: What it was trained for.
      settings: Of its trial.
      what: What follows the name of the data.
      notes: Facts that whoever uses it must know.
      code: What opens it with PEFT; None if that takes code of the user's own.
    """
    fenced = f" With PEFT:\n\n```python\n{code}\n```"
    return _CARD.format(
        name=settings.trial_id,
        base=settings.base.source,
        task=problem.name,
        what=what,
        license=problem.base.provenance.get("license", "not stated"),
        fingerprint=problem.base.fingerprint,
        notes="".join(f"* {note}\n" for note in notes),
        code="" if code is None else fenced,
    )
