"""Made-up histories of ranks, whose every move is known."""

import types

import numpy as np

from lowrank.io.history import RankHistory


def history(
    ranks,
    steps,
    *,
    layers=None,
    gained=None,
    target=None,
    cost=None,
    unit="components",
    revivable=False,
    num_steps=None,
    directory="runs/made-up",
    trial="made-up",
):
    """A history from ranks[row][layer]; without `gained`, what rose was gained."""
    grid = np.array(ranks, np.int64)
    layers = layers or tuple(f"layer[{n}]/kernel" for n in range(grid.shape[1]))
    cost = np.array(cost or [1] * len(layers), np.int64)
    rise = np.maximum(np.diff(grid, axis=0), 0)
    used = grid @ (cost if unit == "parameters" else np.ones_like(cost))
    record = types.SimpleNamespace(
        directory=directory,
        status={"status": "done", "identity": {"config": trial}},
        config={"ranks": {"name": "norm"}},
        result={"trial": trial},
    )
    return RankHistory(
        record=record,
        unit=unit,
        revivable=revivable,
        end=steps[-1],
        num_steps=num_steps or steps[-1] + 10,
        layers=tuple(layers),
        sites=tuple(name.replace(f"[{n}]", "") for n, name in enumerate(layers)),
        cost=cost,
        steps=np.array(steps, np.int64),
        grid=grid,
        target=np.array(used if target is None else target, np.int64),
        gained=np.array(rise if gained is None else gained, np.int64),
    )
