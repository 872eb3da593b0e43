"""Packs as tasks of Ray, on this machine or on a cluster that shares its file system.

Ray starts a task again whose worker died; the pack then goes on from its checkpoints.
Each task has a process to itself: a pack finds an empty device and leaves one.
"""

import contextlib
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from lowrank.core.errors import BadInput, OutOfMemory, WorkerLost
from lowrank.run.packs import Outcome
from lowrank.sweeps.engine import Task, work

#: Between two looks at the tasks: Python handles signals in between.
_LOOK_SECONDS = 0.5
#: Of a cluster that is started here: what travels is configs and results.
_OWN: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 2**27}


class RayEngine:
    """Runs every task as a task of Ray; see `sweeps.engine.Engine`."""

    here = False

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        room: int | None,
        retries: int,
        grace_seconds: float,
    ):
        """Connects to a cluster, or starts one on this machine.

        Args:
          options: `address` of a cluster, or none; the rest describes what every task
            needs, as `num_cpus`, `num_gpus` or `resources` of `ray.remote`.
          room: Tasks at a time; None leaves it to Ray.
          retries: Times a task is started again after its worker died.
          grace_seconds: How long a stopped task may take to save.

        Raises:
          BadInput: There is no such cluster, or Ray does not know an option.
        """
        self.room = room
        self._grace = grace_seconds
        given = dict(options)
        address = given.pop("address", None)
        self._ours = not ray.is_initialized()
        try:
            # First what costs nothing: a cluster takes seconds to start.
            self._work = ray.remote(max_retries=retries, max_calls=1, **given)(work)
            with _own_signals():
                if self._ours:
                    own = {} if address else _OWN
                    ray.init(
                        address, log_to_driver=False, logging_level="warning", **own
                    )
        except (ConnectionError, TypeError, ValueError) as error:
            raise BadInput(
                f"sweep.ray = {dict(options)}: Ray says: {error}. Give address=auto "
                "for the cluster this machine is part of, null to start one here, and "
                "options of ray.remote for every pack."
            ) from error

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ours:
            ray.shutdown()

    def submit(self, task: Task) -> Any:
        return self._work.remote(task.parcel())

    def wait(self, handles: Collection[Any]) -> Any:
        while True:
            done, _ = ray.wait([*handles], num_returns=1, timeout=_LOOK_SECONDS)
            if done:
                return done[0]

    def outcomes(self, handle: Any) -> list[Outcome]:
        try:
            reply = ray.get(handle)
        except OutOfMemoryError as error:
            raise OutOfMemory(
                f"Ray ended a worker for want of memory: {_first_line(error)}"
            ) from error
        except RayTaskError:
            # `work` returns its errors: this one is of a worker that cannot even begin.
            raise
        except RayError as error:
            raise WorkerLost(
                f"the worker of a pack died again and again: {_first_line(error)} What "
                "was saved is kept, and the same line continues; Ray's logs and the "
                "trials' status.json say more. Raise sweep.retries if its machines are "
                "taken away often."
            ) from error
        return reply.outcomes()

    def stop(self, handles: Collection[Any]) -> None:
        left = [*handles]
        for handle in left:
            ray.cancel(handle, force=False)
        end = time.monotonic() + self._grace
        while left and time.monotonic() < end:
            _, left = ray.wait(left, num_returns=len(left), timeout=_LOOK_SECONDS)
        for handle in left:
            ray.cancel(handle, force=True)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts back the handler of SIGTERM that `ray.init` replaces by its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Outside the main thread nothing was replaced.
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
