"""Layouts that the tests of this folder share, and reference rules in plain NumPy."""

import numpy as np

from lowrank.allocate.slots import Competitor, Slots

MAX_RANK = 4


def layout(**changes) -> Slots:
    """A stack of three, a single layer, one that holds nothing, a pair of axes."""
    sites = [
        Competitor(path="enc/q", max_rank=4, cost=10, ranks=2, stack=(3,), **changes),
        Competitor(path="head", max_rank=3, cost=7, ranks=1, **changes),
        Competitor(path="off", max_rank=0, cost=5, ranks=0, stack=(2,)),
        Competitor(path="moe", max_rank=2, cost=4, ranks=1, stack=(2, 2), **changes),
    ]
    return Slots(sites)


def equal(num_layers: int, max_rank: int = MAX_RANK, ranks: int = 2, **more) -> Slots:
    """Layers alike, each a site of its own."""
    return Slots(
        [
            Competitor(path=f"l{i}", max_rank=max_rank, cost=8, ranks=ranks, **more)
            for i in range(num_layers)
        ]
    )


def ranks_of(slots: Slots, gates) -> np.ndarray:
    """Open components of each layer, counted one by one."""
    found = np.zeros(slots.num_layers, int)
    for component, gate in enumerate(np.asarray(gates)):
        found[slots.layer[component]] += gate != 0
    return found


def best(values, eligible, count) -> np.ndarray:
    """Gates of the `count` largest eligible values, ties to the lower index."""
    order = sorted(np.flatnonzero(eligible), key=lambda j: (-values[j], j))
    gates = np.zeros(len(values))
    gates[order[:count]] = 1
    return gates
