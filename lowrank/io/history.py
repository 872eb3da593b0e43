"""Ranks that moved, as read: rank per layer over time, budgets, what moved.

A run whose ranks moved leaves three files:

    ranks.npz    "steps" (rows,), and path -> (rows, *stack): the ranks that were kept
    moves.json   what ranks do not tell: budgets, their unit, exchanges within a layer
    ranks.yaml   layer -> final rank, for ranks.from

Row 0 is what the first step began with; each further row is an event, named by the step
that follows it, and stands until the next one. So a row's ranks are those of steps
[its own, the next row's).
"""

import dataclasses
import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from lowrank.core.errors import BadInput, Corrupt
from lowrank.io.files import local_path
from lowrank.io.record import STATUS
from lowrank.io.seals import read_sealed
from lowrank.io.view import RecordView, load_record

if TYPE_CHECKING:
    # Slow to load, and a run that is only trained has no use for it.
    import pandas

MOVES = "moves.json"
#: Version of what is in it; raised when a key changes its meaning.
MOVES_SCHEMA = 1


@dataclasses.dataclass(frozen=True, eq=False)
class RankHistory:
    """The ranks of one finished run over time.

    Attributes:
      record: The run.
      unit: What budgets count: "components" or "parameters" (those of open components).
      revivable: Whether losers kept their gates open until the last event, as AdaLoRA
        has it. Ranks count what was kept; the step computed with more.
      end: The step of the schedule's last event.
      num_steps: Steps that were trained.
      layers, sites: Of each layer, its name and the path of its weight.
      cost: Of each layer, parameters of one component: d_in + d_out.
      steps: Of each row, the first step with its ranks.
      grid: Ranks, row by row.
      target: Of each row, the budget of the schedule.
      gained: Components that each event added to each layer.
    """

    record: RecordView
    unit: str
    revivable: bool
    end: int
    num_steps: int
    layers: tuple[str, ...]
    sites: tuple[str, ...]
    cost: Int64[np.ndarray, " layers"]
    steps: Int64[np.ndarray, " rows"]
    grid: Int64[np.ndarray, "rows layers"]
    target: Int64[np.ndarray, " rows"]
    gained: Int64[np.ndarray, "events layers"]

    @property
    def num_events(self) -> int:
        return len(self.steps) - 1

    @property
    def lost(self) -> Int64[np.ndarray, "events layers"]:
        """Components that each event took from each layer."""
        return self.gained - np.diff(self.grid, axis=0)

    @property
    def durations(self) -> Int64[np.ndarray, " rows"]:
        """Of each row, the steps that were trained with its ranks; see `budget`."""
        return np.diff(np.append(self.steps, max(self.num_steps, self.steps[-1])))

    @cached_property
    def ranks(self) -> "pandas.DataFrame":
        """Rank per layer over time, one row per event and layer.

        Columns: "event" (0 is the start), "step" (the first with this rank), "layer",
        "site", "rank" (components kept).
        """
        import pandas

        rows, layers = self.grid.shape
        return pandas.DataFrame(
            {
                "event": np.repeat(np.arange(rows), layers),
                "step": np.repeat(self.steps, layers),
                "layer": [*self.layers] * rows,
                "site": [*self.sites] * rows,
                "rank": self.grid.ravel(),
            }
        )

    @cached_property
    def budget(self) -> "pandas.DataFrame":
        """The budget over time, one row per event, in `unit`.

        Columns: "event", "step", "duration" (steps until the next event, or the end),
        "target" (of the schedule), "used" (sum of what was kept: rank, or rank (d_in +
        d_out)), "forward" (what the step computed with, more than "used" where losers
        are revivable). Used is below target where layers are tied or the unit is
        parameters.
        """
        import pandas

        price = self.cost if self.unit == "parameters" else np.ones_like(self.cost)
        used = self.grid @ price
        forward = used.copy()
        if self.revivable:
            # Gates shut at the last event of the schedule only.
            forward[self.steps < self.end] = used[0]
        return pandas.DataFrame(
            {
                "event": np.arange(len(used)),
                "step": self.steps,
                "duration": self.durations,
                "target": self.target,
                "used": used,
                "forward": forward,
            }
        )

    @property
    def averages(self) -> dict[str, float]:
        """Time averages of "target", "used" and "forward": sum_i d_i x_i / sum_i d_i.

        What the adapters cost in training, where the last row is what they cost after.
        """
        weight = self.durations if self.durations.any() else None
        names = ("target", "used", "forward")
        found = {
            n: np.average(self.budget[n].to_numpy(), weights=weight) for n in names
        }
        return {name: float(value) for name, value in found.items()}

    @cached_property
    def moves(self) -> "pandas.DataFrame":
        """What moved, one row per event and layer where something did.

        Columns: "event", "step", "layer", "site", "births" (components that were shut
        and start from zero), "deaths" (kept before, not any more), "revivals" (kept
        again, having trained behind an open gate meanwhile). Rank after = rank before
        + births + revivals - deaths. Only where losers are revivable is there a
        revival; elsewhere one that returns is born like any other.
        """
        import pandas

        event, layer = np.nonzero(self.gained + self.lost)
        gained = self.gained[event, layer]
        none = np.zeros_like(gained)
        return pandas.DataFrame(
            {
                "event": event + 1,
                "step": self.steps[event + 1],
                "layer": [self.layers[i] for i in layer],
                "site": [self.sites[i] for i in layer],
                "births": none if self.revivable else gained,
                "deaths": self.lost[event, layer],
                "revivals": gained if self.revivable else none,
            }
        )

    @cached_property
    def summary(self) -> "pandas.DataFrame":
        """One row per layer, in the order of the model.

        Columns: "layer", "site", "start" and "final" (ranks), "moved" (events at which
        a component came or went), "births", "deaths", "revivals" (over all events).
        """
        import pandas

        gained, lost = self.gained.sum(axis=0), self.lost.sum(axis=0)
        none = np.zeros_like(gained)
        return pandas.DataFrame(
            {
                "layer": self.layers,
                "site": self.sites,
                "start": self.grid[0],
                "final": self.grid[-1],
                "moved": ((self.gained + self.lost) > 0).sum(axis=0),
                "births": none if self.revivable else gained,
                "deaths": lost,
                "revivals": gained if self.revivable else none,
            }
        )

    @property
    def final(self) -> dict[str, int]:
        """Layer -> final rank, as in ranks.yaml."""
        return dict(zip(self.layers, self.grid[-1].tolist(), strict=True))


def load_ranks(directory: str | os.PathLike[str]) -> RankHistory:
    """Reads how the ranks of a finished run moved; loads no base.

    Args:
      directory: Of the run.

    Raises:
      BadInput: It is no run, the run has not finished, or its ranks were fixed.
      Corrupt: A file is damaged, or the files do not fit together.
    """
    path = local_path(directory)
    if path.is_dir() and not (path / STATUS).exists():
        raise BadInput(
            f"{path} is not the directory of a run: it has no {STATUS}. Of a sweep, "
            "name the directory of one trial"
        )
    return read_history(load_record(path))


def read_history(record: RecordView) -> RankHistory:
    """`load_ranks` of a record that is open already."""
    where = record.directory
    if record.result is None:
        raise BadInput(
            f"{where} holds no finished run (status {record.status.get('status')}), "
            "and ranks are recorded at its end; give its command again to finish it"
        )
    record.check(MOVES)
    if not (where / MOVES).exists():
        group = record.config.get("ranks") or {"name": "uniform"}
        raise BadInput(
            f"the ranks of {where} stayed as they were (ranks={group.get('name')}), so "
            "there is no history of them; name a run whose ranks moved, as with "
            "ranks=fisher"
        )
    told, arrays = read_sealed(where / MOVES), record.arrays("ranks")
    if told.get("schema") != MOVES_SCHEMA:
        raise Corrupt(
            f"{where / MOVES} has schema {told.get('schema')!r}, and this version "
            f"reads {MOVES_SCHEMA}. Install the version of lowrank that wrote it."
        )
    try:
        return _history(record, told, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            f"{where / 'ranks.npz'} and {MOVES} do not fit together: {error}. Restore "
            "them from a copy, or run the trial again with force=true."
        ) from error


def _history(
    record: RecordView, told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> RankHistory:
    """Joins the files; raises ValueError and the like where they do not fit."""
    steps = np.asarray(arrays["steps"], np.int64)
    layers = tuple(told["gained"])
    columns, sites, cost = [], [], []
    for path, own in told["sites"].items():
        # Slashes would be folders of the archive.
        ranks = arrays[path.replace("/", ".")]
        if not np.issubdtype(ranks.dtype, np.integer):
            raise ValueError(f"the ranks of {path!r} are no whole numbers")
        columns.append(ranks.reshape(len(steps), own["layers"]))
        sites += [path] * own["layers"]
        cost += [own["cost"]] * own["layers"]
    grid = np.concatenate(columns, axis=1).astype(np.int64)
    gained = np.array([*told["gained"].values()], np.int64).T
    target = np.array(told["target"], np.int64)
    shape = (len(steps), len(layers))
    if grid.shape != shape or target.shape != shape[:1]:
        raise ValueError(f"{shape} rows and layers, and ranks of shape {grid.shape}")
    gained = gained.reshape(shape[0] - 1, shape[1])
    history = RankHistory(
        record=record,
        unit=told["unit"],
        revivable=told["revivable"],
        end=told["end"],
        num_steps=int((record.result or {})["steps"]),
        layers=layers,
        sites=tuple(sites),
        cost=np.array(cost, np.int64),
        steps=steps,
        grid=grid,
        target=target,
        gained=gained,
    )
    if (np.diff(steps) < 0).any() or (grid < 0).any() or (history.lost < 0).any():
        raise ValueError("steps fall, a rank is negative, or a layer gains and has not")
    return history
