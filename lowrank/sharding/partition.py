"""Which weight lies where: its axes and the mesh's, by rule; and factors after weights.

A rule is a pattern and what splits each of the last axes of a weight: the name of a
mesh axis, several, or None. Axes in front, as that of stacked layers, are whole.
Families of models bring their rules as plain data (`PARTITION`), `mesh.rules` come
before those, and of a model without any each large weight is split along its longest
axis.

The factors of a correction follow the weight they correct, axis by axis, and their rank
axis is whole: then x A^T and u B are split as x W is, and what is summed over devices
in between has `max_rank` columns.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank.core.errors import BadInput
from lowrank.core.paths import matches, select
from lowrank.sharding.mesh import FSDP, OF_WEIGHTS, MeshSpec

#: (pattern, what splits each of a weight's last axes).
Rule = tuple[str, Sequence[str | Sequence[str] | None]]
#: (path -> weight or its shape, rules of the family) -> where each of them lies.
Place = Callable[[Mapping[str, Any], Sequence[Rule]], Mapping[str, NamedSharding]]
#: What splits an axis of an array: mesh axes, in their order.
Split = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Partition:
    """Where the weights of one model lie.

    Attributes:
      mesh: The devices.
      weights: Path -> what splits each axis of a weight; all of the model's.
      small: Factors of fewer numbers per layer are whole.
    """

    mesh: Mesh
    weights: Mapping[str, tuple[Split, ...]]
    small: int

    def sharding(self, path: str) -> NamedSharding:
        """Where a weight lies."""
        return NamedSharding(self.mesh, spec_of(self.weights[path]))

    def factor(
        self,
        path: str,
        shape: Sequence[int],
        roles: Sequence[str],
        axes: Mapping[str, Sequence[int]],
    ) -> PartitionSpec:
        """What splits a factor: along inputs and outputs, what splits its weight there.

        Args:
          path: Of the weight.
          shape: Of the factor, without an axis of trials.
          roles: "stack", "rank", "in" or "out" for each of its axes.
          axes: Role -> axes of the weight that have it, in order.
        """
        sizes = zip(shape, roles, strict=True)
        one = math.prod(size for size, role in sizes if role != "stack")
        if one < self.small:
            return PartitionSpec()
        left = {role: list(own) for role, own in axes.items()}
        found = []
        for size, role in zip(shape, roles, strict=True):
            own: Split = ()
            if role in ("in", "out"):
                own = self.weights[path][left[role].pop(0)]
            found.append(own if size % self._count(own) == 0 else ())
        return spec_of(found)

    def _count(self, split: Split) -> int:
        return math.prod(self.mesh.shape[name] for name in split)


def spec_of(splits: Sequence[Split]) -> PartitionSpec:
    """`splits` as JAX has it."""
    one = lambda own: None if not own else own[0] if len(own) == 1 else own
    return PartitionSpec(*map(one, splits))


def partition(
    leaves: Mapping[str, Any],
    asked: MeshSpec,
    mesh: Mesh,
    family: Sequence[Rule] = (),
) -> Partition:
    """Splits the weights of a model over a mesh.

    An axis that a rule of the family cannot split evenly stays whole, as the rows of
    a vocabulary of 30522 on four devices; a rule of the user's must come out even.

    Args:
      leaves: Path -> weight, or its shape; all of the model's.
      asked: What was asked for.
      mesh: What it became.
      family: Rules of the model's family; none: weights are split along their longest
        axis, by fsdp alone.

    Raises:
      BadInput: A rule of `mesh.rules` names no axis or one that splits no weights, has
        too many entries, or does not divide a weight; or no weight is split by an axis
        of the mesh that is there to split weights.
      UnknownName: A pattern of `mesh.rules` matches no weight.
    """
    there = tuple(name for name in OF_WEIGHTS if name in mesh.shape)
    own = _checked(asked, leaves)
    weights = {}
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        mine = [rule for rule in own if matches(rule[0], path)][:1]
        theirs = [rule for rule in family if matches(rule[0], path)][:1]
        if not there or math.prod(shape) < asked.small:
            weights[path] = ((),) * len(shape)
        elif mine:
            weights[path] = _strict(path, shape, mine[0], mesh)
        elif theirs:
            weights[path] = _even(shape, _aligned(shape, theirs[0][1]), mesh)
        else:
            weights[path] = _longest(shape, mesh, bool(family))
    used = {name for splits in weights.values() for own in splits for name in own}
    for name in there:
        if name not in used:
            raise BadInput(
                f"mesh.{name} = {mesh.shape[name]} splits weights, and splits none of "
                f"the {len(weights)} here: those of fewer than mesh.small = "
                f"{asked.small} numbers are whole, and so are axes that it does not "
                f"divide. Give mesh.rules, as {{'**/kernel': [fsdp, tensor]}}, or "
                f"mesh.{name}=1"
            )
    return Partition(mesh, weights, asked.small)


def placing(asked: MeshSpec) -> Place | None:
    """What brings every weight, as it is read, to where it will lie.

    Where no weight is split there is nothing to say, and None. Of several processes,
    each brings what its own devices are to hold.

    Raises:
      BadInput: There are fewer devices than asked for.
    """
    sizes = asked.sizes()
    if all(sizes[name] == 1 for name in OF_WEIGHTS):
        return None
    mesh = asked.build()

    def place(leaves: Mapping[str, Any], family: Sequence[Rule]):
        split = partition(leaves, asked, mesh, family)
        return {path: split.sharding(path) for path in leaves}

    return place


def _checked(asked: MeshSpec, leaves: Mapping[str, Any]) -> list[Rule]:
    """The user's rules, each with something to split, and by axes that split."""
    found: list[Rule] = []
    for pattern, entries in (asked.rules or {}).items():
        select(pattern, leaves)
        if isinstance(entries, str):
            raise BadInput(
                f"mesh.rules[{pattern!r}] is a list, one entry for each of a weight's "
                f"last axes, not {entries!r}: write [{entries}]"
            )
        named = [name for entry in entries for name in _names(entry)]
        for name in named:
            if name not in OF_WEIGHTS or named.count(name) > 1:
                raise BadInput(
                    f"mesh.rules[{pattern!r}] = {list(entries)} splits by {name!r}: "
                    f"weights are split by {' and '.join(OF_WEIGHTS)}, each once"
                )
        found.append((pattern, entries))
    return found


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _aligned(shape: tuple[int, ...], entries: Sequence[Any]) -> list[Split]:
    """One entry per axis: those of a rule are for the last ones."""
    own = [_names(entry) for entry in entries][-len(shape) :] if shape else []
    return [()] * (len(shape) - len(own)) + own


def _even(shape: tuple[int, ...], splits: Sequence[Split], mesh: Mesh):
    """What the mesh has of `splits` and divides its axis."""
    found = []
    for size, own in zip(shape, splits, strict=True):
        kept: Split = ()
        for name in own:
            count = math.prod(mesh.shape[one] for one in kept)
            if name in mesh.shape and size % (count * mesh.shape[name]) == 0:
                kept = (*kept, name)
        found.append(kept)
    return tuple(found)


def _strict(path: str, shape: tuple[int, ...], rule: Rule, mesh: Mesh):
    pattern, entries = rule
    if len(entries) > len(shape):
        raise BadInput(
            f"mesh.rules[{pattern!r}] has {len(entries)} entries, and {path!r} has "
            f"{len(shape)} axes, {list(shape)}: one entry for each of the last axes"
        )
    wanted = _aligned(shape, entries)
    found = _even(shape, wanted, mesh)
    for axis, (own, kept) in enumerate(zip(wanted, found, strict=True)):
        for name in own:
            if name in mesh.shape and name not in kept:
                raise BadInput(
                    f"mesh.{name} = {mesh.shape[name]} does not divide axis {axis} of "
                    f"{path!r}, {list(shape)}, which mesh.rules[{pattern!r}] splits "
                    f"by {' and '.join(own)}: make it a divisor of {shape[axis]}, or "
                    "write null there"
                )
    return found


def _longest(shape: tuple[int, ...], mesh: Mesh, has_family: bool):
    """Of a model without rules: the longest axis that comes out even, by fsdp."""
    splits: list[Split] = [()] * len(shape)
    if FSDP not in mesh.shape or has_family:
        return tuple(splits)
    even = [d for d, size in enumerate(shape) if size % mesh.shape[FSDP] == 0]
    if even:
        # The last of the longest ones: an axis in front may be that of layers.
        splits[max(even, key=lambda d: (shape[d], d))] = (FSDP,)
    return tuple(splits)
