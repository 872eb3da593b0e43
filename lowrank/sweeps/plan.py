"""What a sweep will do, as data: packs to run, and what is known without running."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lowrank.run.packs import Origin, Outcome
from lowrank.run.settings import Settings
from lowrank.sweeps.group import Trial, pack_id
from lowrank.sweeps.width import Memory


@runtime_checkable
class RunPack(Protocol):
    """See `run.packs.run_pack`."""

    def __call__(
        self,
        trials: Sequence[Settings],
        overrides: Sequence[Sequence[str]],
        /,
        *,
        folder: Path,
        until: int | None = None,
        origins: Sequence[Origin] = (),
    ) -> list[Outcome]: ...


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a command runs many jobs together; `run.door.command` hands it on.

    Attributes:
      run: Trains trials of one static key as one pack.
      memory: Bytes that a pack needs, by width.
      value: What a job returns to the sweeper, from a trial's result.
    """

    run: RunPack
    memory: Memory
    value: Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A pack to run.

    Attributes:
      trials: Its composition, in order.
      todo: Those of them that are not finished, in the same order.
      continued: Whether it was begun earlier.
      since: The rung that its trials have passed, in other packs perhaps; 0: none.
      until: The rung to train to; None: the end.
    """

    trials: Sequence[Trial]
    todo: Sequence[Trial]
    continued: bool = False
    since: int = 0
    until: int | None = None

    @property
    def id(self) -> str:
        """Of the composition."""
        return pack_id(self.trials)
