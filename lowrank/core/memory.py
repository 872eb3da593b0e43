"""How a process holds memory: in large pages, and freed blocks given back."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

#: Set to 0, commands leave the allocator as they find it.
SWITCH = "LOWRANK_HUGE_PAGES"
_TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages() -> None:
    """Starts a command over, once, so that glibc asks for large pages; or does nothing.

    XLA maps a step's temporaries afresh in every step, and the kernel clears them page
    by page: a hundred thousand faults in a step of 400 MiB, a few hundred with pages of
    2 MiB (`make bench` compares). glibc reads the setting only while a program starts,
    hence the `exec`: same process, same arguments. A setting of the user's own stays.
    """
    given = os.environ.get(_TUNABLES, "")
    if os.environ.get(SWITCH) == "0" or _HUGE in given or not _offered():
        return
    os.environ[_TUNABLES] = ":".join(part for part in (given, f"{_HUGE}=1") if part)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _offered() -> bool:
    """Whether the kernel gives large pages on request and glibc knows how to ask."""
    if sys.platform != "linux" or not sys.executable:
        return False
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        numbers = tuple(int(part) for part in version.split(".")[:2])
        able = name == "glibc" and numbers >= (2, 35)
        return able and "[never]" not in _THP.read_text()
    except (OSError, ValueError):
        return False


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None  # Not glibc: other allocators give memory back by themselves.


def give_back() -> bool:
    """Returns freed memory to the system; whether there was any to return.

    Compiling leaves a hundred megabytes of freed blocks behind, in arenas that a
    step's buffers do not reuse: without this they count as the run's memory for good.
    """
    trim = _trim()
    return bool(trim is not None and trim(0))
