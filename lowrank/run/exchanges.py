"""What the exchanges of a step move: the base, factors, gradients, or the rest."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank.adapt.attach import Adapted
from lowrank.core.trees import flatten
from lowrank.cost.hlo import Array, Exchange, Traffic


def exchanged(read: Traffic, adapted: Adapted) -> list[dict[str, Any]]:
    """One row per kind of exchange, of what, and between how many devices.

    Compilers put many arrays into one exchange: each counts for what it is.

    Returns:
      Rows of "moves", "kind", "group" (devices that take part), "bytes" that one device
      sends in a step, "times" that arrays are sent, and the "largest" of these.
    """
    rows: dict[Any, dict[str, Any]] = {}
    most: dict[Any, float] = {}
    for one in read.exchanges:
        total = sum(array.bytes for array in one.arrays)
        for array, origin in _parts(one):
            key = (moves(array, origin, adapted), one.kind, one.group)
            first = dict(zip(("moves", "kind", "group"), key, strict=True))
            row = rows.setdefault(
                key, {**first, "bytes": 0.0, "times": 0.0, "largest": ""}
            )
            row["bytes"] += one.bytes * array.bytes / total if total else 0.0
            row["times"] += one.times
            if array.bytes > most.get(key, -1):
                most[key], row["largest"] = array.bytes, str(array)
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def gathered(read: Traffic, adapted: Adapted) -> dict[str, Any]:
    """How much of the base is put together at once, and of how many layers."""
    largest, layers = 0.0, 0
    for array, origin in itertools.chain(*map(_parts, read.exchanges)):
        if origin is None or not origin.startswith("frozen"):
            continue
        largest = max(largest, array.bytes)
        path = origin.partition("['")[2].partition("']")[0]
        site = adapted.sites.get(path)
        if site is not None and site.stacks:
            one_layer = math.prod(site.shape) / site.num_layers
            layers = max(layers, math.ceil(math.prod(array.shape) / one_layer))
    return {"largest_bytes": largest, "layers_at_once": layers}


def moves(array: Array, origin: str | None, adapted: Adapted) -> str:
    """What an array is: of the base, of what is trained, of gradients; or the rest."""
    name = "" if origin is None else origin.split("[")[0].split(".")[-1]
    if name == "frozen":
        return "base"
    if name in ("trained", "best"):
        return "trained"
    if not [size for size in array.shape if size > 1]:
        return "sums"
    return "gradients" if _of_trained(array.shape, adapted) else "activations"


def _parts(one: Exchange) -> Iterator[tuple[Array, str | None]]:
    """The arrays of an exchange, each with the argument that it is."""
    origins = one.origins if len(one.origins) == len(one.arrays) else ()
    return itertools.zip_longest(one.arrays, origins)


def _of_trained(shape: Sequence[int], adapted: Adapted) -> bool:
    """Whether an array may be a part of what is trained: of all layers, or of one.

    The mesh may have cut its inputs and outputs, never its layers or its components;
    axes of layers and of trials may be gone.
    """
    given = [size for size in shape if size > 1]
    roles = adapted.roles()
    for path, own in adapted.trained_shapes().items():
        for name, leaf in flatten(own)[0].items():
            if path in roles:
                cut = [role in ("in", "out") for role in roles[path][name]]
            else:
                cut = [d >= len(leaf.shape) - 2 for d in range(len(leaf.shape))]
            axes = [
                (size, may)
                for size, may in zip(leaf.shape, cut, strict=True)
                if size > 1
            ]
            for start in range(max(len(axes) - 1, 1)):
                if _is_part(given, axes[start:]):
                    return True
    return False


def _is_part(given: Sequence[int], axes: Sequence[tuple[int, bool]]) -> bool:
    """Whether sizes are those of axes, of which some may be cut."""
    return len(given) == len(axes) and all(
        size % part == 0 if cut else size == part
        for part, (size, cut) in zip(given, axes, strict=True)
    )
