"""What a run tells its numbers to: the record always, services if they are wanted.

The file is the record: a failure to write it ends the run. A service is a convenience:
whatever it raises costs one warning and that service, never the run.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.core.secrets import redact_text
from lowrank.core.spec import spec
from lowrank.track.jsonl import JsonlTracker, Values
from lowrank.track.services import Mode, TensorboardTracker, WandbTracker

if TYPE_CHECKING:
    # Half a second, which a run that is only trained need not wait for.
    import pandas

_log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of one trial. All calls come from the main thread."""

    def log(self, step: int, values: Values) -> None:
        """Takes `values` as measured after `step`."""

    def summary(self, values: Values) -> None:
        """Takes the numbers that stand for the whole run."""

    def close(self, status: str) -> None:
        """Ends the run as done, failed or preempted."""


class Trackers:
    """Passes everything on to several trackers.

    An exception in one costs a warning and that tracker. The exceptions to this are
    `CannotWrite` and `BadInput`: they say that the record itself would be incomplete.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        """Takes trackers in the order in which they are to be called."""
        self._trackers = list(trackers)

    def log(self, step: int, values: Values) -> None:
        """Passes `values` to every tracker."""
        self._each("log", step, values)

    def summary(self, values: Values) -> None:
        """Passes `values` to every tracker."""
        self._each("summary", values)

    def close(self, status: str) -> None:
        """Closes every tracker."""
        self._each("close", status)

    def _each(self, method: str, *args: Any) -> None:
        for tracker in tuple(self._trackers):
            try:
                getattr(tracker, method)(*args)
            except (CannotWrite, BadInput):
                raise
            except Exception as error:
                self._trackers.remove(tracker)
                _log.warning(
                    "%s is left out from here on: %s",
                    type(tracker).__name__,
                    redact_text(f"{type(error).__name__}: {error}"),
                )


@spec
class Track:
    """The group `track` of a config.

    Attributes:
      wandb: Mode of Weights & Biases, see `WandbTracker`.
      project: Project there.
      group: Group there, such as the name of a sweep.
      tensorboard: Whether to write event files as well.
    """

    wandb: Mode = "auto"
    project: str = "lowrank"
    group: str | None = None
    tensorboard: bool = False


def build_trackers(
    track: Track,
    jsonl: JsonlTracker,
    *,
    name: str,
    run_id: str,
    config: Mapping[str, Any],
    directory: str | os.PathLike[str],
    first_step: int = 0,
) -> Trackers:
    """The trackers that `track` asks for, after `jsonl`.

    Args:
      track: What is wanted.
      jsonl: The record, already truncated to where the run resumes; replayed to W&B if
        that cannot resume by itself.
      name: What the run is called.
      run_id: Its identity, such as the trial id.
      config: The resolved config; redacted before it leaves.
      directory: The run directory. W&B writes to ``wandb/``, TensorBoard to
        ``tensorboard/`` inside it.
      first_step: The step from which a resumed run goes on.

    Raises:
      BadInput: TensorBoard is wanted, but tensorboardX is not installed.
    """
    directory = Path(directory).absolute()
    trackers: list[Tracker] = [jsonl]
    if track.tensorboard:
        trackers.append(TensorboardTracker(directory / "tensorboard", first_step))
    if track.wandb != "disabled":
        wandb_tracker = WandbTracker(
            track.wandb,
            project=track.project,
            group=track.group,
            name=name,
            run_id=run_id,
            config=config,
            directory=directory,
        )
        if wandb_tracker.mode == "offline" and wandb_tracker.alive:
            with open(jsonl.path, "rb") as file:
                wandb_tracker.replay(json.loads(line) for line in file)
        trackers.append(wandb_tracker)
    return Trackers(trackers)


def summarize(
    track: Track,
    tables: Mapping[str, "pandas.DataFrame"],
    *,
    name: str,
    directory: str | os.PathLike[str],
) -> None:
    """Sends the tables of a sweep to a W&B run of its own, beside those of its trials.

    The run has job type summary and is in the group `track.group`, or else `name`; told
    again, the same name continues it (offline: replaces it). Nothing is sent where W&B
    is disabled, and no error of W&B is one of the sweep.

    Args:
      track: What is wanted.
      tables: Title -> frame.
      name: Of the sweep.
      directory: Of the sweep; W&B writes to ``wandb/`` inside it.
    """
    if track.wandb == "disabled":
        return
    tracker = WandbTracker(
        track.wandb,
        project=track.project,
        group=track.group or name,
        job_type="summary",
        name=f"{name} summary",
        run_id=f"{name}-summary",
        config={},
        directory=directory,
    )
    for title, frame in tables.items():
        tracker.table(title, frame)
    tracker.close("done")
