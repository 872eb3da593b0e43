"""Whether weights have room on their devices, asked before any of them is read."""

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Sharding

from lowrank.core.errors import BadInput
from lowrank.cost.room import GIB, room


def check_room(
    leaves: Mapping[str, Any], places: Mapping[str, Sharding] | None, where: str
) -> None:
    """Refuses weights that alone are more than their devices may hold.

    On a CPU nothing but the kernel's killer would say so, minutes later.

    Args:
      leaves: Path -> shape and dtype.
      places: Path -> where a weight comes to lie; None: on the first device.
      where: The checkpoint, for the message.

    Raises:
      BadInput: They do not fit; the message says what would.
    """
    places = places or {}
    whole = here = 0
    devices: set[Any] = set()
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        whole += math.prod(shape) * leaf.dtype.itemsize
        if path in places:
            devices |= places[path].addressable_devices
            shape = places[path].shard_shape(shape)
        here += math.prod(shape) * leaf.dtype.itemsize
    limit, source = room(len(devices) or 1)
    if limit is None or here <= limit:
        return
    raise BadInput(
        f"{where} has {whole / GIB:.3g} GiB of weights, of which each device is to "
        f"hold {here / GIB:.3g} GiB and may hold {limit / GIB:.3g} GiB ({source}). "
        "What fits is a smaller base, or mesh.fsdp or mesh.tensor with "
        f"{math.ceil(here / limit)} times as many devices or more; those of a CPU "
        "share the memory of their machine"
    )
