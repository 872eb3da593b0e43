"""Freed memory goes back to the system; commands ask for large pages."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowrank.core import memory
from lowrank.core.memory import SWITCH

ROOT = Path(__file__).parents[2]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_freed_between_kept_blocks_is_given_back():
    # Small blocks: large ones are mapped one by one and leave with their owner.
    blocks = [np.ones(8_000) for _ in range(2_000)]
    kept = blocks[::20]
    del blocks
    before = resident()
    assert memory.give_back()
    assert before - resident() > 50 * 2**20
    assert all(block[0] == 1 for block in kept)


def test_without_such_an_allocator_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_trim", lambda: None)
    assert memory.give_back() is False


PROGRAM = """
import os, resource, sys
from lowrank.core.memory import huge_pages
huge_pages()
b"x" * 2**28
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], faults)
"""


def told(environment: dict[str, str]) -> tuple[str, int]:
    """What a program that asks for large pages says, and whether it is still itself."""
    plain = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", SWITCH)}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "two words", "x=1"],
        env={**plain, **environment},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    pid, tunables, rest = out.split(" ", 2)
    assert int(pid) == child.pid
    arguments, _, faults = rest.rpartition(" ")
    assert arguments == "['two words', 'x=1']"
    return tunables, int(faults)


@pytest.mark.skipif(not memory._offered(), reason="this system has no large pages")
def test_a_command_starts_over_with_large_pages_once():
    off, many = told({SWITCH: "0"})
    on, few = told({})
    assert (off, on) == ("None", "glibc.malloc.hugetlb=1")
    assert few < many - 50_000  # 256 MiB in pages of 4 KiB are 65 536 faults.


@pytest.mark.skipif(not memory._offered(), reason="this system has no large pages")
def test_settings_of_the_user_are_kept():
    own = "glibc.malloc.hugetlb=0"
    assert told({"GLIBC_TUNABLES": own})[0] == own
    other = "glibc.malloc.arena_max=3"
    assert told({"GLIBC_TUNABLES": other})[0] == f"{other}:glibc.malloc.hugetlb=1"


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "execv", lambda *a: pytest.fail("started over"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    memory.huge_pages()
