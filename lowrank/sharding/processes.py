"""Several processes that run one program together: how they begin, agree and end.

All of them are given the same command; the mesh has the devices of all. What is sent
between devices is the compiled program's; what is sent between processes beside it is
text, and little of it: which run this is, and what the first process has found on
disk. Every function here that says so is called by all processes or by none, in the
same order.

JAX tolerates no fault: when one process dies, the others follow within some
`heartbeat_seconds`, and the same commands continue from the last checkpoint.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BAD_INPUT, PREEMPTED, BadInput
from lowrank.core.spec import spec

#: Seconds that a process which failed by itself waits for others that did the same.
_FAILED_SECONDS = 5.0
#: Seconds that one which has ended well waits for the first to finish its records.
_ENDED_SECONDS = 600.0
#: Seconds that JAX would wait longer for others than asked for.
_LONGER_SECONDS = 30
#: Seconds that processes may be apart: one compiles or reads what others found ready.
_APART_SECONDS = 3600.0
#: Of the next barrier; all processes count alike.
_BARRIERS = itertools.count()
#: From here on two widths of a gathered text differ by a factor of two.
_LEAST_WIDTH = 256
#: By name: its type stubs do not know the option.
_CPU_DEVICES = "jax_num_cpu_devices"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[^\s:/\[\]]+):[0-9]{1,5}")


@spec
class Processes:
    """The group `processes`: who takes part in a command.

    Attributes:
      count: Processes; None: as the cluster says (Cloud TPU, GKE, SLURM, Open MPI).
      index: Which of them this is, from 0; None: as the cluster says.
      coordinator: Host and port of the first one, "10.0.0.1:1234", which all others
        reach; None: as the cluster says.
      wait_seconds: How long they wait for each other at the start.
      heartbeat_seconds: After so long without a sign of life a process is dead, and
        the others end.
    """

    count: int | None = 1
    index: int | None = None
    coordinator: str | None = None
    wait_seconds: int = 300
    heartbeat_seconds: int = 10

    def __post_init__(self) -> None:
        for name in ("wait_seconds", "heartbeat_seconds"):
            if getattr(self, name) < 1:
                raise BadInput(
                    f"processes.{name} is a time of at least 1 s, not "
                    f"{getattr(self, name)}"
                )
        if self.count == 1:
            return
        given = {"index": self.index, "coordinator": self.coordinator}
        if self.count is None:
            for name, value in given.items():
                if value is not None:
                    raise BadInput(
                        f"processes.{name} = {value!r}, and processes.count is left to "
                        "the cluster: give all three (processes=manual), or none "
                        "(processes=auto)"
                    )
            return
        if self.count < 1:
            raise BadInput(f"processes.count is at least 1, not {self.count}")
        if missing := [name for name, value in given.items() if value is None]:
            raise BadInput(
                f"processes.count = {self.count} needs processes.{missing[0]}, too: "
                "which process this is, and where the first one is reached "
                "(host:port); or processes=auto, where the cluster knows"
            )
        assert self.index is not None
        assert self.coordinator is not None
        if not 0 <= self.index < self.count:
            raise BadInput(
                f"processes.index = {self.index} is none of 0 to {self.count - 1}, of "
                f"processes.count = {self.count}"
            )
        if not _ADDRESS.fullmatch(self.coordinator):
            raise BadInput(
                f"processes.coordinator is host:port, as 10.0.0.1:1234, not "
                f"{self.coordinator!r}"
            )


def begin(asked: Processes) -> None:
    """Finds the other processes; before anything asks for a device.

    Raises:
      BadInput: The cluster says nothing, or the coordinator is not reached. Where
        others do not come, the process says so and ends with that code.
    """
    if asked.count == 1 or jax.distributed.is_initialized():
        return
    if asked.index and asked.coordinator:
        _reach(asked)
    # Exchanges of XLA:CPU (jaxlib 0.10.2) hold a thread each while they wait: with
    # fewer threads than devices, all of them may wait for good.
    if (devices := getattr(jax.config, _CPU_DEVICES)) > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * devices)))
    # JAX would abort this process, with a stack trace in place of a remedy.
    patience = threading.Timer(asked.wait_seconds, _give_up, (asked,))
    patience.daemon = True
    patience.start()
    known = {
        "coordinator_address": asked.coordinator,
        "num_processes": asked.count,
        "process_id": asked.index,
    }
    try:
        jax.distributed.initialize(
            **known,
            cluster_detection_method=None if asked.count is None else "deactivate",
            initialization_timeout=asked.wait_seconds + _LONGER_SECONDS,
            heartbeat_timeout_seconds=asked.heartbeat_seconds,
            shutdown_timeout_seconds=round(_ENDED_SECONDS),
        )
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"processes.count = null: nothing here tells how many processes there are "
            f"({error}); start them by srun, mpirun or on Cloud TPU, give "
            "processes=manual with count, index and coordinator, or processes=one"
        ) from None
    finally:
        patience.cancel()
    logging.getLogger("lowrank").info(
        "process %d of %d, %d devices here, %d together",
        jax.process_index(), jax.process_count(),
        jax.local_device_count(), jax.device_count(),
    )  # fmt: skip


def _give_up(asked: Processes) -> NoReturn:
    """Ends this process, whose main thread waits inside JAX for others to come."""
    others = "all others" if asked.count is None else f"the other {asked.count - 1}"
    own = "" if asked.index is None else f" {asked.index}"
    sys.stderr.write(
        f"BadInput: process{own} has waited processes.wait_seconds = "
        f"{asked.wait_seconds} for {others}, and not all have come. Start every one of "
        "them, each with its own processes.index, and see that they reach the first "
        "one; or give them more time\n"
    )
    sys.stderr.flush()
    os._exit(BAD_INPUT)


def _reach(asked: Processes) -> None:
    """Waits until the first process listens: JAX would end this one without a word."""
    host, _, port = str(asked.coordinator).rpartition(":")
    end = time.monotonic() + asked.wait_seconds
    while True:
        left = max(end - time.monotonic(), 0.1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), left).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise BadInput(
                    f"process {asked.index} of {asked.count} does not reach "
                    f"processes.coordinator = {asked.coordinator} within "
                    f"processes.wait_seconds = {asked.wait_seconds}: {error}. Start "
                    "process 0 there, on a port that is free, and see that no firewall "
                    "is between"
                ) from None
        time.sleep(0.2)


def together() -> bool:
    """Whether JAX watches over the processes of this command, be it one of one.

    Then SIGTERM is its own: it agrees with the others on a step to stop after.
    """
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not together() or jax.process_index() == 0


def rejoin() -> None:
    """Waits until all processes are here, before they exchange anything. Called by all.

    Exchanges have patience of their own, and little (30 s on CPUs): not enough where
    one process finds a compiled program in its cache, and another compiles it.
    """
    if jax.process_count() > 1:
        # Who adapts a base alone needs no library of checkpoints.
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        key = f"lowrank {next(_BARRIERS)}"
        wait(key=key, timeout_ms=round(_APART_SECONDS * 1000))


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. Called by all."""
    if jax.process_count() == 1:
        return [text]
    rejoin()
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(own)))
    # Few widths, for each of them is a program.
    width = max(_LEAST_WIDTH, 1 << (int(lengths.max()) - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(own, (0, width - len(own))))
    return [
        bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)
    ]


def told(value: Any) -> Any:
    """What the first process says, as JSON has it. Called by all."""
    if jax.process_count() == 1:
        return value
    return json.loads(gather(json.dumps(value) if first() else "null")[0])


def agree(facts: Mapping[str, str], remedy: str) -> None:
    """Refuses to go on where processes differ. Called by all, and raised in all.

    Args:
      facts: What must be the same everywhere, by name.
      remedy: What to do about it.

    Raises:
      BadInput: Two processes have different facts.
    """
    every = [json.loads(text) for text in gather(json.dumps(dict(facts)))]
    for index, other in enumerate(every):
        for name in sorted(every[0].keys() | other.keys()):
            ours, theirs = every[0].get(name), other.get(name)
            if ours != theirs:
                raise BadInput(
                    f"processes 0 and {index} disagree on {name}: {ours!r} and "
                    f"{theirs!r}. {remedy}"
                )


def trouble(own: str | None) -> str | None:
    """What went wrong in the first process where something did. Called by all."""
    if jax.process_count() == 1:
        return own
    every = gather(own or "")
    index = next((n for n, text in enumerate(every) if text), None)
    return None if index is None else f"process {index}: {every[index]}"


def on_host(leaf: jax.Array) -> np.ndarray:
    """The whole of `leaf` as an own NumPy array. Called by all, if others hold parts.

    Of typed keys, their data.
    """
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_addressable:
        return np.array(leaf)
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    return np.array(multihost_utils.process_allgather(leaf, tiled=True))


def within_reach(tree: PyTree) -> PyTree:
    """`tree`, arrays of which other processes hold parts copied to the host.

    Called by all, if there are such arrays; others stay as they are.
    """
    return jax.tree.map(lambda x: x if _addressable(x) else on_host(x), tree)


def _addressable(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def leave(code: int) -> NoReturn:
    """Ends this process, with the others if they end as well, else without them.

    A process that failed by itself must not wait in JAX's own farewell: the others are
    in the middle of a step and would wait for it. They end by themselves once it is
    gone.
    """
    if together():
        goodbye = threading.Thread(target=_say_goodbye, daemon=True)
        goodbye.start()
        # Of those that ended well, the first one still closes its records.
        goodbye.join(_ENDED_SECONDS if code in (0, PREEMPTED) else _FAILED_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _say_goodbye() -> None:
    # Whatever it answers, this process is about to end.
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
