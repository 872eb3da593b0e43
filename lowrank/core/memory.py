"""How a process holds memory: how much it may, in large pages, and given back."""

import contextlib
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
_CGROUPS = Path("/sys/fs/cgroup")
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


def limit(groups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process may hold: its control groups' limit or the machine's.

    Args:
      groups: Where control groups are mounted.
      own: The file that says which ones this process is in.

    Returns:
      The least of all limits; None where the system tells none.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):  # Not every system tells.
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, kinds, path = line.split(":", 2)
        # Version 2 has one tree; version 1 has one per kind, mounted under its name.
        one_tree = number == "0" and not kinds
        top = groups if one_tree else groups / "memory"
        name = "memory.max" if one_tree else "memory.limit_in_bytes"
        if not one_tree and "memory" not in kinds.split(","):
            continue
        inner = top / path.lstrip("/")
        # In a container the path may be the host's, and only the top is mounted.
        for folder in (inner, *inner.parents):
            if folder != top and top not in folder.parents:
                break
            with contextlib.suppress(OSError, ValueError):
                found.append(int((folder / name).read_text()))  # "max" is no number
    return min(found, default=None)


def give_back() -> bool:
    """Returns freed memory to the system; whether there was any to return.

    Compiling leaves a hundred megabytes of freed blocks behind, in arenas that a
    step's buffers do not reuse: without this they count as the run's memory for good.
    """
    trim = _trim()
    return bool(trim is not None and trim(0))
