"""What a device has room for."""

import jax

from lowrank.core import memory

#: The part of the memory that a program may fill. The rest is for what no estimate
#: sees: the interpreter, compiling, batches in flight.
SHARE_OF_HOST, SHARE_OF_DEVICE = 0.8, 0.9
GIB = 2**30


def room(num_devices: int = 1) -> tuple[int | None, str]:
    """Bytes that may be filled of each of this process's devices, and who says so.

    Devices without memory of their own, as the cores of a CPU, share the machine's.

    Args:
      num_devices: How many of them take part.

    Returns:
      None in place of bytes where nothing tells.
    """
    device = jax.local_devices()[0]
    told = device.memory_stats() or {}
    if "bytes_limit" in told:
        return int(told["bytes_limit"] * SHARE_OF_DEVICE), f"{device.device_kind}"
    host = memory.limit()
    if host is None:
        return None, "nothing"
    return int(host * SHARE_OF_HOST / num_devices), "this machine or its control group"
