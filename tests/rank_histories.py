"""Made-up histories of ranks, whose every move is known."""

from pathlib import Path

import numpy as np
import yaml

from lowrank.io.history import RankHistory
from lowrank.io.record import Record
from lowrank.io.view import RecordView


class Unwritten(RecordView):
    """A finished run of which there is no file."""

    def __init__(self, directory):
        self.directory = directory
        self.status = {"status": "done", "identity": {"config": "t1"}}
        self.__dict__ |= {"config": {"ranks": {"name": "norm"}}, "result": {}}


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
):
    """A history from ranks[row][layer]; without `gained`, what rose was gained."""
    grid = np.array(ranks, np.int64)
    layers = layers or tuple(f"layer[{n}]/kernel" for n in range(grid.shape[1]))
    cost = np.array(cost or [1] * len(layers), np.int64)
    rise = np.maximum(np.diff(grid, axis=0), 0)
    used = grid @ (cost if unit == "parameters" else np.ones_like(cost))
    return RankHistory(
        record=Unwritten(Path(directory)),
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


#: Layer -> ranks before step 0, at the event before step 4 and at the one before 8.
RANKS = {"a[0]/kernel": (2, 1, 1), "a[1]/kernel": (2, 2, 1), "b/kernel": (1, 2, 2)}
#: What the events added: the second exchanged a component of the first layer.
GAINED = {"a[0]/kernel": [0, 1], "a[1]/kernel": [0, 0], "b/kernel": [1, 0]}
ARRAYS = {
    "steps": np.array([0, 4, 8], np.int32),
    "a.kernel": np.array([[2, 2], [1, 2], [1, 1]], np.int32),
    "b.kernel": np.array([1, 2, 2], np.int32),
}
TOLD = {
    "schema": 1,
    "unit": "components",
    "revivable": False,
    "end": 8,
    "target": [5, 5, 4],
    "sites": {
        "a/kernel": {"layers": 2, "cost": 10},
        "b/kernel": {"layers": 1, "cost": 7},
    },
    "gained": GAINED,
}
OVERRIDES = (
    "delta.rank=2", "ranks=norm", "ranks.every=4", "+ranks.max_rank=3",
    "run.directory=first", "data.batching.buckets=[8,16]",
)  # fmt: skip


def recorded(directory, *, told=None, arrays=None, finish=True, name="norm"):
    """A run directory with this history; None of `told` is a run of fixed ranks."""
    config = {"ranks": {"name": name}}
    with Record.open(directory, config=config, identity={"config": "t1"}) as record:
        record.save_arrays("ranks", **(ARRAYS if arrays is None else arrays))
        folder = directory / ".hydra"
        folder.mkdir()
        (folder / "overrides.yaml").write_text(yaml.safe_dump([*OVERRIDES]))
        if told is not None:
            record.write_json("moves.json", told)
        if finish:
            record.result({"steps": 10})
    return directory
