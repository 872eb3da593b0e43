"""Packs as jobs of SLURM, through submitit; its local executor rehearses them.

A job that SLURM preempts or that runs out of time is queued again by submitit; one
whose process died is submitted again here. Either way the pack goes on from its
checkpoints.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from lowrank.core.errors import BadInput, WorkerLost
from lowrank.run.packs import Outcome
from lowrank.sweeps.engine import Parcel, Reply, Task, work

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


class Work:
    """`work` as a job: what submitit sends, runs, and sends again."""

    def __call__(self, parcel: Parcel) -> Reply:
        return work(parcel)

    def checkpoint(self, parcel: Parcel) -> DelayedSubmission:
        """Called when the job's time is up: the same parcel finds its checkpoints."""
        return DelayedSubmission(self, parcel)


@dataclasses.dataclass(eq=False)
class _Sent:
    """A task's present job, and how many there were."""

    task: Task
    job: Any
    number: int = 1


class SubmititEngine:
    """Runs every task as a job; see `sweeps.engine.Engine`."""

    here = False

    def __init__(
        self,
        options: Mapping[str, Any],
        folder: Path,
        *,
        room: int | None,
        retries: int,
        grace_seconds: float,
    ):
        """Finds SLURM, or whatever `cluster` names.

        Args:
          options: `cluster`, or none for SLURM; the rest are parameters of
            `submitit.AutoExecutor`, as `timeout_min` and `slurm_partition`.
          folder: For submitit's files, for its user's eyes only: a job that waits has
            its configs in there.
          room: Jobs at a time; None: all.
          retries: Times a task is submitted again after its process died.
          grace_seconds: How long a stopped job may take to save.

        Raises:
          BadInput: There is no such cluster, no time limit, or an unknown parameter.
        """
        self.room = room
        self._retries, self._grace = retries, grace_seconds
        given = dict(options)
        if "timeout_min" not in given:
            raise BadInput(
                "sweep.submitit needs timeout_min, the minutes that one pack may take: "
                "submitit's own default is a few minutes"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
            cluster = given.pop("cluster", None) or "slurm"
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(**given)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise BadInput(f"sweep.submitit = {dict(options)}: {error}") from error

    def __enter__(self) -> "SubmititEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def submit(self, task: Task) -> _Sent:
        return _Sent(task, self._send(task))

    def _send(self, task: Task) -> Any:
        return self._executor.submit(Work(), task.parcel())

    def wait(self, handles: Collection[_Sent]) -> _Sent:
        while True:
            for sent in handles:
                if sent.job.done() and not self._again(sent):
                    sent.job.paths.submitted_pickle.unlink(missing_ok=True)
                    return sent
            time.sleep(_LOOK_SECONDS)

    def _again(self, sent: _Sent) -> bool:
        """Whether a job died and its task was submitted once more."""
        if sent.number > self._retries or not _died(sent.job):
            return False
        logger.warning(
            "job %s died (%s); its pack is submitted again and goes on",
            sent.job.job_id,
            sent.job.state,
        )
        sent.job.paths.submitted_pickle.unlink(missing_ok=True)
        sent.job, sent.number = self._send(sent.task), sent.number + 1
        return True

    def outcomes(self, handle: _Sent) -> list[Outcome]:
        if _died(handle.job):
            raise WorkerLost(
                f"job {handle.job.job_id} of a pack died ({handle.job.state}), as did "
                f"{handle.number - 1} before it; see {handle.job.paths.stderr}. What "
                "was saved is kept, and the same line continues."
            )
        return handle.job.result().outcomes()

    def stop(self, handles: Collection[_Sent]) -> None:
        for sent in handles:
            sent.job.cancel(check=False)
        end = time.monotonic() + self._grace
        while time.monotonic() < end and not all(s.job.done() for s in handles):
            time.sleep(_LOOK_SECONDS)
        for sent in handles:
            sent.job.paths.submitted_pickle.unlink(missing_ok=True)


def _died(job: Any) -> bool:
    """Whether a job that has ended left no reply."""
    error = job.exception()
    # Of a job that failed, as where this package cannot be imported, there is a reply.
    lost = isinstance(error, UncompletedJobError)
    return lost and not isinstance(error, FailedJobError)
