"""What may go wrong, and the exit code by which a scheduler can tell it apart.

Every message names four things: the rule that was broken, the value that broke it,
the place it came from and what to do about it.
"""

import difflib
from collections.abc import Iterable

BUG = 1
BAD_INPUT = 2
CANNOT_WRITE = 73
PREEMPTED = 75
HANG = 76
NON_FINITE = 77
CORRUPT = 78


class LowrankError(Exception):
    """Base of every error that a user can cause or cure."""

    exit_code = BUG


class BadInput(LowrankError, ValueError):
    """A setting, a file or a data row is wrong. Raised before anything is compiled."""

    exit_code = BAD_INPUT


class UnknownName(BadInput, LookupError):
    """A name that is not in a catalogue, a tree or a config."""


class CannotWrite(LowrankError, OSError):
    """A run directory cannot be written, or belongs to another process."""

    exit_code = CANNOT_WRITE


class Preempted(LowrankError):
    """The run was asked to stop, has saved its state and can be continued."""

    exit_code = PREEMPTED


class NonFinite(LowrankError, FloatingPointError):
    """The loss or the gradient norm of a trial is not a finite number."""

    exit_code = NON_FINITE


class OutOfMemory(LowrankError, MemoryError):
    """The device has no room for what was asked of it."""


class WorkerLost(LowrankError):
    """A pack's process in another place died, and so did those that went on with it."""


class Corrupt(LowrankError):
    """A stored state is damaged, or belongs to another run."""

    exit_code = CORRUPT


def nearest(name: str, choices: Iterable[str], most: int = 3) -> str:
    """The closest of `choices` to `name`, as text for an error message."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(name, choices, n=most, cutoff=0.0)
    return ", ".join(repr(one) for one in close) if close else "none"


def gravest(codes: Iterable[int]) -> int:
    """The exit code that tells of many outcomes: the gravest of them, 0 of none.

    A bug comes first, for it may have touched anything; then stored state that cannot
    be trusted or written; then what a user asked for wrongly; then trials that had
    their chance; last those that only have to be continued. A code that is not ours
    counts as a bug.
    """
    order = (BUG, CORRUPT, CANNOT_WRITE, HANG, BAD_INPUT, NON_FINITE, PREEMPTED)
    place = {code: at for at, code in enumerate(order)}
    failed = [code for code in codes if code]
    return min(failed, key=lambda code: place.get(code, 0), default=0)


def renewed(kind: str, message: str) -> LowrankError | None:
    """The error of ours that another process named; None: it is none of ours."""
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, LowrankError):
        return found(message)
    return None


def exit_code(error: BaseException) -> int:
    """The process exit code for `error`; 1, a bug, for whatever is not ours."""
    return getattr(error, "exit_code", BUG) if isinstance(error, LowrankError) else BUG
