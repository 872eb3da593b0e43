"""Where a run's trees lie: the base by rule, factors and their moments after it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lowrank.adapt.attach import Adapted
from lowrank.core.arrays import Frozen
from lowrank.core.trees import flatten, leaf_digest
from lowrank.sharding.mesh import MeshSpec
from lowrank.sharding.partition import Rule, partition, spec_of
from lowrank.train import state as states
from lowrank.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where everything of a pack lies.

    Attributes:
      mesh: The devices.
      frozen: Path -> where a weight of the base lies.
      trained: Joined path in the trained tree -> what splits it, without the axis of
        trials.
    """

    mesh: Mesh
    frozen: Mapping[str, NamedSharding]
    trained: Mapping[str, PartitionSpec]

    def state(self, state: TrainState) -> TrainState:
        """A tree like a pack's state, or its shapes, of where each leaf lies."""
        return states.on_mesh(state, self.mesh, self.trained)

    def located(self, tree: Any, where: Any) -> Any:
        """Shapes, with where they lie, for a program that is compiled from shapes."""
        shaped = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
        return jax.tree.map(shaped, tree, where)


def marks(base: Frozen, where: Mapping[str, Sharding]) -> dict[str, str]:
    """Digests of a base, by which two trees are told apart that hold other numbers.

    Of several processes, each looks at what its own devices hold, or are to hold.

    Args:
      base: On its devices, or whole, before it comes there.
      where: Path -> where a weight lies in the end.
    """
    found = {}
    for path, leaf in base.items():
        place = where[path]
        if place.is_fully_addressable:
            found[path] = leaf_digest(path, leaf)
            continue
        parts = place.addressable_devices_indices_map(leaf.shape).values()
        for index in {str(part): part for part in parts}.values():
            found[f"{path}{index}"] = leaf_digest(path, _part(leaf, index))
    return found


def _part(leaf: Any, index: tuple[slice, ...] | None) -> Any:
    """What lies there of a weight that is here, or whose part is."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)[index]
    return next(one.data for one in leaf.addressable_shards if one.index == index)


def place(
    adapted: Adapted,
    asked: MeshSpec,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = (),
) -> Placement:
    """Places a model and its corrections.

    Args:
      adapted: The model, in the common shape of its pack.
      asked: The mesh as it was asked for.
      mesh: Its devices; those of this machine by default.
      rules: Of the model's family, as `models.decoder.PARTITION`.

    Raises:
      BadInput: There are fewer devices, or see `sharding.partition`.
    """
    mesh = asked.build() if mesh is None else mesh
    split = partition(adapted.leaves, asked, mesh, rules)
    roles, trained = adapted.roles(), {}
    for path, own in adapted.trained_shapes().items():
        if path not in adapted.sites:
            trained[path] = spec_of(split.weights[path])
            continue
        site = adapted.sites[path]
        axes = {"in": site.ins, "out": site.outs}
        for name, shape in flatten(own)[0].items():
            trained[f"{path}/{name}"] = split.factor(
                path, shape.shape, roles[path][name], axes
            )
    frozen = {path: split.sharding(path) for path in adapted.frozen()}
    return Placement(mesh, frozen, trained)
