"""Commands of several processes with four devices each, and what ends them."""

import collections
import functools
import itertools
import os
import signal
import socket
import sys
import time

import jax
import lives
import tiny_run
from quick_flags import FLAGS, known
from tiny_run import SMALL

#: All eight devices, every axis; the tiny weights are split, too.
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "mesh.small=0")
#: Of the processes that are left, after one that ended has told nobody.
ABORTED = -signal.SIGABRT
#: What the issue allows them.
LEFT_SECONDS = 30


@functools.cache
def _xla_flags():
    """Quick compilation: of several processes only the first one keeps programs."""
    return " ".join([os.environ.get("XLA_FLAGS", ""), *filter(known, FLAGS)]).strip()


def _raise(value):
    raise RuntimeError("struck")


def _weigh(value):
    """Says what each device of this process holds, in bytes."""
    held = collections.Counter()
    for array in jax.live_arrays():
        for part in array.addressable_shards:
            held[part.device.id] += part.data.nbytes
    print("devices hold", *held.values(), "bytes", file=sys.__stderr__, flush=True)


def _member(arguments, environment, output, faults, folder):
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lives.ACTS |= {"raise": _raise, "weigh": _weigh}
    for fault in faults:
        lives._plant(fault)
    lives._command("train", arguments, environment, output, output.parent)


class Crew:
    """Starts commands and waits for their ends.

    Attributes:
      children: Of the newest command, in their order.
      small: What makes runs small, and says which task they are of.
    """

    small = SMALL

    def __init__(self, world, folder):
        self._world, self._folder = world, folder
        self._numbers = itertools.count()
        self.children, self._outputs = [], []

    def start(self, count, directory, *overrides, each=(), faults=None, folders=()):
        """Starts one command in so many processes.

        Args:
          count: How many.
          directory: Of the run; None: as the overrides say.
          overrides: Of all of them.
          each: Further ones, a list per process.
          faults: Process -> what strikes it.
          folders: Where each is started.
        """
        where = [] if directory is None else [f"run.directory={directory}"]
        given = [*self._world.overrides(*where), *self.small]
        # The last one that names a field holds; Hydra takes each but once.
        ranked = [] if "delta=full" in overrides else ["delta.rank=4"]
        wanted = [*ranked, *MESH, *overrides]
        named = {one.split("=")[0]: one for one in (*given, *wanted)}
        given = sorted(named.values(), key=lambda one: one != "-m")
        environment = self._world.environment | {
            "JAX_NUM_CPU_DEVICES": str(8 // count),
            "XLA_FLAGS": _xla_flags(),
        }
        if count > 1:
            with socket.socket() as one:
                one.bind(("127.0.0.1", 0))
                port = one.getsockname()[1]
            given += [
                "processes=manual",
                f"processes.count={count}",
                f"processes.coordinator=127.0.0.1:{port}",
                "processes.heartbeat_seconds=5",
                "processes.wait_seconds=60",
            ]
        self.end()
        self.children, self._outputs = [], []
        context = tiny_run.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lives", "lowrank.run.trial"])
        for index in range(count):
            own = [*given, *(each[index] if each else ())]
            own += [f"processes.index={index}"] if count > 1 else []
            output = self._folder / f"said-{next(self._numbers)}"
            struck = (faults or {}).get(index, ())
            where = folders[index] if folders else tiny_run.ROOT
            given_to = (own, environment, output, struck, where)
            child = context.Process(target=_member, args=given_to, daemon=True)
            child.start()
            self.children.append(child)
            self._outputs.append(output)

    def codes(self, seconds=300):
        """Exit codes, once all have ended."""
        end = time.monotonic() + seconds
        for index, child in enumerate(self.children):
            child.join(max(end - time.monotonic(), 0.1))
            assert child.exitcode is not None, f"{index} hangs: {self.all_said()}"
        return [child.exitcode for child in self.children]

    def run(self, count, directory, *overrides, **more):
        """Exit codes of a command in so many processes."""
        self.start(count, directory, *overrides, **more)
        return self.codes()

    def alone(self, directory, *overrides):
        """Exit code of the command in one process with all devices."""
        return self.run(1, directory, *overrides)[0]

    def said(self, index):
        """What a process has printed."""
        output = self._outputs[index]
        # The terminal breaks lines anywhere.
        return " ".join(output.read_text().split()) if output.exists() else ""

    def all_said(self):
        """What all of them have printed."""
        return "\n".join(self.said(n) for n in range(len(self._outputs)))

    def end(self):
        """Kills what still runs."""
        for child in self.children:
            child.kill()
            child.join()
