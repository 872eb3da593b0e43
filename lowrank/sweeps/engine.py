"""Where packs run: in this process, or as parcels that an existing engine carries.

    Task -> Parcel -> (another process, perhaps another machine) -> Reply -> Outcomes

A parcel holds plain configs and paths, a reply plain results and error texts. Both
sides see one file system: records, checkpoints and compiled programs go through it, so
a pack whose worker died is simply sent again, and continues from its checkpoints.
Every trial's directory is locked by whoever runs it, the sweep's by its launcher.
"""

import contextlib
import dataclasses
import logging
import socket
import traceback
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental.compilation_cache import compilation_cache

from lowrank.core.errors import LowrankError, renewed
from lowrank.core.secrets import redact, redact_text
from lowrank.run.door import log_to_stderr
from lowrank.run.packs import Origin, Outcome
from lowrank.run.settings import Settings, read
from lowrank.sweeps.plan import RunPack

logger = logging.getLogger(__name__)

#: The folder of compiled programs, beside those of the packs.
COMPILED = "compiled"
_CACHE = "jax_compilation_cache_dir"


class WorkerBug(Exception):
    """A bug in another process; the message has its stack trace."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A pack to run.

    Attributes:
      run: Trains it; for other processes, a function that can be imported there.
      settings, overrides: One per trial.
      folder: Of the pack's checkpoints.
      until: The rung to train to; None: the end.
      origins: Where its trials were before.
    """

    run: RunPack
    settings: Sequence[Settings]
    overrides: Sequence[Sequence[str]]
    folder: Path
    until: int | None = None
    origins: tuple[Origin, ...] = ()

    def do(self) -> list[Outcome]:
        """Runs the pack here; raises what ends it as a whole."""
        count = len(self.settings)
        ready = [_ready(one, count) for one in self.settings]
        return self.run(
            ready,
            self.overrides,
            folder=self.folder,
            until=self.until,
            origins=self.origins,
        )

    def parcel(self) -> "Parcel":
        """The task in plain values. Overrides are for the record only, so redacted."""
        configs = tuple(dict(one.config) for one in self.settings)
        overrides = tuple(tuple(redact(list(one))) for one in self.overrides)
        folder = str(self.folder)
        return Parcel(self.run, configs, overrides, folder, self.until, self.origins)


@dataclasses.dataclass(frozen=True)
class Parcel:
    """A task as it travels."""

    run: RunPack
    configs: tuple[Mapping[str, Any], ...]
    overrides: tuple[tuple[str, ...], ...]
    folder: str
    until: int | None
    origins: tuple[Origin, ...]

    def task(self) -> Task:
        """What was sent, checked again by the versions that run it."""
        settings = [read(config) for config in self.configs]
        folder = Path(self.folder)
        return Task(
            self.run, settings, self.overrides, folder, self.until, self.origins
        )


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error as it travels: the class by name, the message, of a bug the trace."""

    kind: str
    message: str
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Errors of ours keep their class; anything else is a bug."""
        ours = isinstance(error, LowrankError)
        trace = "" if ours else "".join(traceback.format_exception(error))
        return cls(type(error).__name__, str(error), redact_text(trace))

    def error(self) -> Exception:
        """The error again: of the same class and exit code, if it is one of ours."""
        bug = WorkerBug(f"{self.kind}: {self.message}\n{self.trace}")
        return renewed(self.kind, self.message) or bug


@dataclasses.dataclass(frozen=True)
class Word:
    """An outcome as it travels."""

    result: Mapping[str, Any] | None
    failure: Failure | None
    paused: int | None
    cut: str | None

    @classmethod
    def of(cls, one: Outcome) -> "Word":
        failure = one.error and Failure.of(one.error)
        return cls(one.result, failure, one.paused, one.cut)

    def outcome(self) -> Outcome:
        error = self.failure and self.failure.error()
        return Outcome(self.result, error, self.paused, self.cut)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a worker sends back: a word of every trial, or the pack's failure."""

    trials: tuple[Word, ...] = ()
    failure: Failure | None = None

    def outcomes(self) -> list[Outcome]:
        """As `run_pack` returns them.

        Raises:
          Exception: The one that ended the pack.
        """
        if self.failure is not None:
            raise self.failure.error()
        return [word.outcome() for word in self.trials]


def work(parcel: Parcel) -> Reply:
    """What every worker does with a parcel. Returns its errors; ends only by a kill."""
    log_to_stderr()
    task = None
    try:
        task = parcel.task()
        # By host: a program compiled for one processor may not run on another.
        compiled = task.folder.parent / COMPILED / socket.gethostname()
        with compiled_once(compiled):
            found = task.do()
    except Exception as error:
        return Reply(failure=Failure.of(error))
    return Reply(tuple(map(Word.of, found)))


@runtime_checkable
class Engine(Protocol):
    """Runs tasks; a context manager that leaves nothing running.

    Attributes:
      room: Tasks that may be submitted and not have ended; None: any number.
      here: Whether tasks run in this process: one that was stopped then stops all.
    """

    room: int | None
    here: bool

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *exc: object) -> None: ...

    def submit(self, task: Task) -> Hashable:
        """Takes a task on; returns a handle."""
        ...

    def wait(self, handles: Collection[Any]) -> Any:
        """The first of these handles whose task has ended."""
        ...

    def outcomes(self, handle: Any) -> list[Outcome]:
        """What became of the trials of a task that has ended.

        Raises:
          WorkerLost: Its worker died, and so did those that continued.
          Exception: What ended the pack.
        """
        ...

    def stop(self, handles: Collection[Any]) -> None:
        """Asks the tasks to save and stop, and returns when they have, or will not."""
        ...


class Local:
    """Runs one task at a time, here; its errors are the very ones that were raised."""

    room: int | None = 1
    here = True

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def submit(self, task: Task) -> int:
        self._task = task
        return id(task)

    def wait(self, handles: Collection[int]) -> int:
        (handle,) = handles
        return handle

    def outcomes(self, handle: int) -> list[Outcome]:
        assert id(self._task) == handle
        return self._task.do()

    def stop(self, handles: Collection[int]) -> None:
        """What runs here has stopped by the signal that reached this process."""


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keeps compiled programs on disk, where the user has not said so already.

    Packs of one kind, the estimate of their memory and a line that is given again then
    compile each step once.
    """
    # By name: its type stubs do not know the option.
    if getattr(jax.config, _CACHE):
        yield
        return
    try:
        jax.config.update(_CACHE, str(folder))
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update(_CACHE, None)
        compilation_cache.reset_cache()


def _ready(settings: Settings, num_trials: int) -> Settings:
    """For a pack of so many, and without a progress bar.

    A bar would draw over the lines of the trials. A pack that does not come out even on
    the trial axis gets fewer devices on it, not fewer trials.
    """
    run = dataclasses.replace(settings.run, progress=False)
    mesh = settings.mesh.for_trials(num_trials)
    return dataclasses.replace(settings, run=run, mesh=mesh)
