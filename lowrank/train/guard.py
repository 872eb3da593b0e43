"""Watches for what may end a run early: signals and numbers that are not finite."""

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, Literal

from jax.experimental import multihost_utils

from lowrank.core.errors import PREEMPTED, BadInput, NonFinite, Preempted
from lowrank.core.spec import spec
from lowrank.sharding.processes import together

logger = logging.getLogger(__name__)

#: Seconds after which a stop that was lost comes again.
_AGAIN = 0.05


class StopSignal:
    """Turns SIGTERM and SIGINT into a request to stop after the present step.

    A second signal ends the process at once; the checkpoints on disk stay good. Of
    several processes any one may be asked: JAX, whose SIGTERM is then, tells the
    others, and all stop after the same step, one of the next.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._together = together()
        self._before: dict[int, Any] = {}

    def after(self, step: int) -> str | None:
        """Why to stop after this step; None: go on. Called after every one."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            return "SIGTERM"
        return None if self._together else self.received

    def __enter__(self) -> "StopSignal":
        for number in _ours():
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # Not the main thread: the caller's handlers stay.
                logger.debug("signals are left to the main thread")
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self.received:
            os._exit(PREEMPTED)
        self.received = signal.Signals(number).name
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        logger.warning("%s: saving after this step, then stopping", self.received)


def _ours() -> tuple[signal.Signals, ...]:
    """Signals that are ours to handle: of several processes, SIGTERM is JAX's."""
    return (signal.SIGINT,) if together() else (signal.SIGTERM, signal.SIGINT)


def end_at_next_signal() -> None:
    """Makes the next SIGTERM or SIGINT end the process at once with `PREEMPTED`.

    For a command that was stopped and only has to say so: with Python's own handlers
    back, a second signal would end it as a bug, which no scheduler starts again.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # Outside the main thread the caller's handlers stay.
        with contextlib.suppress(ValueError):
            signal.signal(number, lambda *_: os._exit(PREEMPTED))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM and SIGINT end the block with `Preempted`, wherever it is.

    Outside the training steps nothing needs to be saved first. Inside, `StopSignal`
    takes over. A second signal ends the process at once.

    Raises:
      Preempted: A signal came.
    """
    received: list[str] = []
    lost: list[BaseException] = []

    def handle(number: int, frame: object) -> None:
        del frame
        if received and not lost:
            os._exit(PREEMPTED)
        lost.clear()
        received.append(signal.Signals(number).name)
        # Not an `Exception`: nothing that shrugs off errors may swallow it.
        raise KeyboardInterrupt(f"stopped by {received[0]}")

    def insist(unraisable: Any) -> None:
        # Where the garbage collector calls back, as it does jax, or a finalizer runs,
        # Python lets no exception out. Once that is over, the signal comes again.
        if not received or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return hook(unraisable)
        lost.append(unraisable.exc_value)
        again = threading.Timer(_AGAIN, _thread.interrupt_main, [_ours()[0]])
        again.daemon = True
        again.start()

    hook = sys.unraisablehook
    before: dict[int, Any] = {}
    try:
        for number in _ours():
            # Outside the main thread the caller's handlers stay.
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, handle)
        if before:
            sys.unraisablehook = insist
        yield
    except KeyboardInterrupt as stop:
        raise Preempted(
            f"{stop or 'stopped by SIGINT'} outside the training steps; what was saved "
            "is kept, and the same command continues"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            sys.unraisablehook = hook


@spec
class NonFinitePolicy:
    """What to do about a step whose loss or gradient norm is not finite.

    The step itself never applies such an update. Then `halt` ends the run; `skip` goes
    on with the next batch, at most `limit` times; `rollback` restores the last
    checkpoint and jumps over the batches since, at most `limit` times.
    """

    action: Literal["halt", "skip", "rollback"] = "halt"
    limit: int = 10

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise BadInput(f"non_finite.limit must be at least 1, not {self.limit}")

    def decide(self, step: int, trial: int, seen: int) -> str:
        """The action for a trial's bad step, given how many it had before.

        Raises:
          NonFinite: The policy is to halt, or the limit is reached.
        """
        if self.action == "halt" or seen >= self.limit:
            spent = f" ({seen} before it)" if seen else ""
            raise NonFinite(
                f"loss or gradient norm is not finite at step {step}{spent}, in trial "
                f"{trial}; the update was not applied, the last checkpoint is good. "
                "Lower optim.lr, set optim.clip, or non_finite.action=skip|rollback."
            )
        logger.warning(
            "step %d is not finite in trial %d: %s", step, trial, self.action
        )
        return self.action
