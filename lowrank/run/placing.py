"""Where a run's trees lie: the base by rule, factors and their moments after it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank.adapt.attach import Adapted
from lowrank.core.trees import flatten
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
