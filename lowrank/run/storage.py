"""What of a pack is on disk, and how a pack continues from there or from other packs.

A pack begins afresh, at its own last checkpoint, or where several others have come to:
then the state of each of its trials is taken out of the pack that it was in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import Corrupt
from lowrank.core.trees import flatten
from lowrank.io.checkpoints import Checkpoints
from lowrank.sharding.mesh import put
from lowrank.sharding.processes import on_host
from lowrank.track.jsonl import JsonlTracker
from lowrank.train.state import TrainState

#: What a trial has only because a neighbor has it, and then says "none of it": the
#: weights of penalties, the dials of options, an allocator that moves no rank of it.
_NEIGHBORS = ("constants/", "dials/", "ranks/")
#: What all trials of a pack have in common.
_SHARED = "step"
#: Lists of the loop's memory with one entry per trial.
_EACH = ("bad_steps", "stale", "window", "ended")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a trial comes from.

    Attributes:
      checkpoints: Of the pack that it was in.
      step: Which of them.
      row: The trial's place in that pack.
    """

    checkpoints: Checkpoints
    step: int
    row: int


@dataclasses.dataclass
class Storage:
    """Checkpoints of a pack, and how far the metrics files had come with each.

    Attributes:
      checkpoints: Where states go.
      metrics: One file per trial; None of a trial whose record is closed already.
      sources: One per trial of a pack that was gathered from others, which is where it
        begins; empty: at its own start.
    """

    checkpoints: Checkpoints
    metrics: Sequence[JsonlTracker | None] = ()
    sources: Sequence[Source] = ()

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self.checkpoints.stored_steps() or self.sources)

    def resume(
        self, like: TrainState, memory: Mapping[str, Any]
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """Where the pack goes on: at its own last checkpoint, else at its sources."""
        if self.checkpoints.stored_steps():
            return self.restore(like)
        return self.gather(like, memory)

    def save(self, position: int, state: TrainState, memory: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint."""
        leaves, _ = flatten(state)
        marks = [
            file and {"offset": file.offset(), "sha256": file.sha256()}
            for file in self.metrics
        ]
        extra = {"memory": dict(memory), "metrics": marks}
        self.checkpoints.save(position, leaves, extra)

    def restore(self, like: TrainState) -> tuple[TrainState, Mapping[str, Any]]:
        """The last good checkpoint; what the files hold beyond it is dropped."""
        leaves, structure = flatten(like)
        _, stored, extra = self.checkpoints.restore(leaves)
        self._cut_back(extra["metrics"])
        return structure.unflatten(stored), extra["memory"]

    def gather(
        self, like: TrainState, memory: Mapping[str, Any]
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """The state that this pack would have had, had it trained from its own start.

        Along the trials axis every leaf is `x[rows]` of the packs that the trials come
        from. Where those had room for more components, what a trial held for its
        neighbors only is left off; where they had less, the rest is as at the start:
        closed components stand still, so that is how they would be by now.

        Args:
          like: This pack's state at its start.
          memory: What the loop remembers at its start.

        Raises:
          Corrupt: A checkpoint is damaged or gone, or they do not belong together.
        """
        assert len(self.sources) == len(like.live)
        read: dict[tuple[str, int], tuple[dict[str, np.ndarray], Mapping]] = {}
        parts = []
        for one in self.sources:
            key = (str(one.checkpoints.directory), one.step)
            if key not in read:
                leaves, extra = one.checkpoints.read(one.step)
                read[key] = {n: on_host(x) for n, x in leaves.items()}, extra
            parts.append((*read[key], one.row))
        leaves, structure = flatten(like)
        stored = [(leaves, row) for leaves, _, row in parts]
        gathered = {
            name: _gathered(name, leaf, stored) for name, leaf in leaves.items()
        }
        self._cut_back([extra["metrics"][row] for _, extra, row in parts])
        memories = [(extra["memory"], row) for _, extra, row in parts]
        return structure.unflatten(gathered), {**memory, **_remembered(memories)}

    def start_over(self) -> None:
        """Empties the metrics files: what stands in them belongs to no checkpoint."""
        for file in self.metrics:
            if file:
                file.truncate(0)

    def _cut_back(self, marks: Sequence[Mapping[str, Any] | None]) -> None:
        for file, mark in zip(self.metrics, marks, strict=True):
            if file and mark:
                file.truncate(mark["offset"], mark["sha256"])


def _gathered(
    name: str, leaf: jax.Array, parts: Sequence[tuple[Mapping[str, np.ndarray], int]]
) -> jax.Array:
    """One leaf of all trials, each from (the leaves of its pack, its row)."""
    # NumPy, and no program for each of some fifty shapes.
    start = on_host(leaf)
    if name == _SHARED:
        steps = {int(stored[name]) for stored, _ in parts}
        if len(steps) > 1:
            raise Corrupt(
                f"the trials come from packs that had taken {sorted(steps)} steps; "
                "packs that share a rung are at one step"
            )
        found = np.asarray(steps.pop(), start.dtype)
    else:
        found = start.copy()
        for at, (stored, row) in enumerate(parts):
            if name in stored:
                own = slice(at, at + 1)
                value = stored[name][row : row + 1]
                found[own] = _fitted(name, value, start[own])
            elif not name.startswith(_NEIGHBORS):
                raise Corrupt(f"the pack that a trial comes from has no leaf {name!r}")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(
            jnp.asarray(found), impl=jax.random.key_impl(leaf)
        )
        return put(keys, leaf.sharding)
    return put(found, leaf.sharding)


def _fitted(name: str, value: np.ndarray, start: np.ndarray) -> np.ndarray:
    """`value` with the components that `start` has room for, see `Storage.gather`."""
    if value.shape == start.shape:
        return value
    if value.ndim != start.ndim or value.dtype != start.dtype:
        raise Corrupt(
            f"leaf {name} of the pack that a trial comes from is {value.dtype}"
            f"{list(value.shape)}, which cannot become {start.dtype}"
            f"{list(start.shape)}"
        )
    both = tuple(map(slice, map(min, value.shape, start.shape)))
    found = start.copy()
    found[both] = value[both]
    return found


def _remembered(memories: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """What the loop remembers of trials that come from several packs."""
    data = {**memories[0][0]["data"]}
    data["trial_seeds"] = [m["data"]["trial_seeds"][row] for m, row in memories]
    for memory, _ in memories:
        other = {**memory["data"], "trial_seeds": data["trial_seeds"]}
        if other != data or memory["position"] != memories[0][0]["position"]:
            raise Corrupt("the trials come from packs at different places in the data")
    each = {name: [m[name][row] for m, row in memories] for name in _EACH}
    return {"position": memories[0][0]["position"], **each, "data": data}
