"""Where arrays live: one mesh, even for one device, and what its axes are for.

  trial    splits a pack's trials: their factors, moments, dials and batches. Trials
           meet nowhere in a step, so on this axis nothing is ever communicated.
  data     splits a batch's rows. What belongs to a trial is whole along it, and
           `jax.jit` adds the sum of gradients over it by itself.
  fsdp     splits rows, too, and the base: a weight is gathered where it is used, layer
           by layer, and dropped again.
  tensor   splits the base and what it computes: heads, hidden units, the vocabulary.

Which weight is split how is said by `sharding.partition`.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

#: The axes, in their order: neighbors along the last ones are nearest. A mesh has those
#: of more than one device, and always `data`.
TRIAL, DATA, FSDP, TENSOR = AXES = ("trial", "data", "fsdp", "tensor")
#: Along these rows are split, along those the base. Of rows, fsdp comes first: the
#: other way round, XLA (jaxlib 0.10.2) splits some products of a mesh of 2 x 2 x 2 so
#: that they come out wrong; `tests/test_partition.py` tries all layouts that may occur.
OF_ROWS, OF_WEIGHTS = (FSDP, DATA), (FSDP, TENSOR)


@spec
class MeshSpec:
    """Devices by axis; their product is what one pack occupies.

    Attributes:
      data: Devices that share a batch's rows. Of any axis, -1 takes all devices that
        the others leave.
      trial: Devices that share a pack's trials.
      fsdp: Devices that share a batch's rows, and the base between them.
      tensor: Devices that share the base and every product with it.
      rules: Pattern of weights -> what splits each of their last axes: the name of a
        mesh axis, several, or null, as ``{"**/kernel": [fsdp, tensor]}``. The first
        that matches holds, before those of the model's family.
      small: Weights, and factors of one layer, of fewer numbers are whole everywhere.
      topology: What a rehearsal compiles for, such as "v5e:16x16" or "h100:8"; nothing
        else reads it.
    """

    data: int = 1
    trial: int = 1
    fsdp: int = 1
    tensor: int = 1
    rules: Mapping[str, Sequence[str | Sequence[str] | None]] | None = None
    small: int = 2**14
    topology: str | None = None

    def __post_init__(self) -> None:
        rest = [name for name, count in self.asked.items() if count == -1]
        if len(rest) > 1:
            both = " and ".join(f"mesh.{name} = -1" for name in reversed(rest))
            raise BadInput(
                f"{both} both ask for all devices: give all but one of them a number"
            )

    @property
    def asked(self) -> dict[str, int]:
        """Devices by axis as they were asked for, -1 included."""
        return {name: getattr(self, name) for name in AXES}

    def sizes(self, devices: Sequence[Any] | None = None) -> dict[str, int]:
        """Devices along each axis, of those given, or of all there are.

        Raises:
          BadInput: There are fewer devices than asked for.
        """
        asked = self.asked
        devices = jax.devices() if devices is None else devices
        there = f"there are {len(devices)} {devices[0].platform} devices"
        for name, count in asked.items():
            if count != -1 and not 1 <= count <= len(devices):
                raise BadInput(
                    f"mesh.{name} = {count}, but {there}; give 1 to {len(devices)}, or "
                    "-1 for all of them"
                )
        given = {name: count for name, count in asked.items() if count not in (-1, 1)}
        count = math.prod(given.values())
        if count > len(devices):
            product = " times ".join(f"mesh.{name} = {n}" for name, n in given.items())
            raise BadInput(
                f"{product} is {count}, but {there}; make one of them smaller"
            )
        rest = len(devices) // count
        return {name: rest if n == -1 else n for name, n in asked.items()}

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of the devices given, or of the first ones that there are.

        Raises:
          BadInput: There are fewer devices than asked for; or, where none are given,
            more, and not all that several processes have would take part.
        """
        given = jax.devices() if devices is None else devices
        sizes = {
            name: count
            for name, count in self.sizes(given).items()
            if count > 1 or name == DATA
        }
        taken = given[: math.prod(sizes.values())]
        if devices is None:
            _check_idle(taken, given)
        return Mesh(
            _arranged(taken, [*sizes.values()]),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes),
        )

    def parts(self) -> int:
        """Devices between which the rows and the vocabulary of a step are split.

        Raises:
          BadInput: -1 stands for fewer devices than none.
        """
        sizes = self.sizes() if -1 in self.asked.values() else self.asked
        return math.prod(sizes[name] for name in (DATA, FSDP, TENSOR))

    def share(self, num_trials: int) -> int:
        """The most devices along the trial axis that can share so many trials evenly.

        Raises:
          BadInput: The axis has no device, or -1 stands for fewer than none.
        """
        count = self.trial if self.trial > 0 else self.sizes()[TRIAL]
        return max(n for n in range(1, count + 1) if num_trials % n == 0)

    def for_trials(self, num_trials: int) -> "MeshSpec":
        """This mesh with as many devices along its trial axis as can share so many.

        Where the axis divides `num_trials` that is the mesh itself. What is left of a
        sweep need not come out even; its last pack then leaves some devices idle. Of
        several processes none may be left out: those devices share rows instead.

        Raises:
          BadInput: There are fewer devices than asked for.
        """
        sizes, fits = self.sizes(), self.share(num_trials)
        if fits == (count := sizes[TRIAL]):
            return self
        if jax.process_count() > 1:
            fits = math.gcd(num_trials, count)
            sizes[DATA] *= count // fits
        return dataclasses.replace(self, **{**sizes, TRIAL: fits})


def _check_idle(taken: Sequence[Any], devices: Sequence[Any]) -> None:
    """Refuses a mesh that has no device of some process, or not all that it has."""
    by_process = lambda some: collections.Counter(d.process_index for d in some)
    there, used = by_process(devices), by_process(taken)
    if len(there) > 1 and there != used:
        raise BadInput(
            f"the mesh takes {len(taken)} of the {len(devices)} devices of "
            f"{len(there)} processes, and all must take part: make the product of "
            f"mesh.trial, data, fsdp and tensor {len(devices)}, as mesh.data=-1 does"
        )


def _arranged(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices by axis, so that neighbors along an axis have wires between them.

    Of a TPU slice the order of devices is that of its hosts, which are blocks of chips.
    """
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    return np.array(devices, dtype=object).reshape(*sizes)


def trial_axis(mesh: Mesh) -> str | None:
    """The name for `vmap(spmd_axis_name=...)`; None where trials share all devices."""
    return TRIAL if TRIAL in mesh.shape else None


def check_trials(mesh: Mesh, num_trials: int) -> None:
    """Refuses packs whose trials cannot be shared out evenly.

    Raises:
      BadInput: The trial axis does not divide `num_trials`.
    """
    if num_trials % mesh.shape.get(TRIAL, 1):
        raise BadInput(
            f"a pack of {num_trials} cannot be shared out to the {mesh.shape[TRIAL]} "
            "devices of mesh.trial; make mesh.trial a divisor of it, or run a sweep "
            "with hydra/launcher=packed, which deals packs that come out even"
        )


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh that split rows."""
    return tuple(name for name in OF_ROWS if name in mesh.shape)


def check_rows(mesh: Mesh, num_rows: int, what: str) -> None:
    """Refuses batches whose rows cannot be shared out evenly.

    Raises:
      BadInput: The axes that split rows do not divide `num_rows`; `what` is the
        setting.
    """
    axes = row_axes(mesh)
    count = math.prod(mesh.shape[name] for name in axes)
    if num_rows % count:
        named = " times ".join(f"mesh.{name}" for name in axes)
        raise BadInput(
            f"{what} = {num_rows} cannot be shared out to the {count} devices of "
            f"{named}; make it a multiple"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of the array."""
    return NamedSharding(mesh, PartitionSpec())


def by_trial(mesh: Mesh) -> NamedSharding:
    """A leading axis of trials split over the trial axis, if the mesh has one."""
    axis = trial_axis(mesh)
    return NamedSharding(mesh, PartitionSpec(axis) if axis else PartitionSpec())


def rows(mesh: Mesh, num_leading_axes: int) -> NamedSharding:
    """Rows of a batch split over the axes for rows, after some leading axes.

    The first of these is the trials' and is split over theirs. A batch without one is
    every trial's: all devices of the trial axis have the same rows of it.
    """
    leading = [trial_axis(mesh), *[None] * num_leading_axes][:num_leading_axes]
    one, *more = row_axes(mesh)
    return NamedSharding(mesh, PartitionSpec(*leading, (one, *more) if more else one))


def lay_rows(mesh: Mesh, num_rows: int) -> Callable[[Array], Array] | None:
    """What says of an activation that its rows are split as the batch's are.

    Left to itself, the compiler may follow a weight instead: one lookup in a table that
    is split along d makes all activations be split along d, and every device computes
    all rows. Other axes stay the compiler's, so that heads and hidden units follow
    the weights. Arrays whose first axis is not the batch's are left alone.

    Args:
      mesh: The devices.
      num_rows: Of the batch that a model is given.

    Returns:
      None where no weight is split, and nothing has to be said.
    """
    axes = row_axes(mesh)
    count = math.prod(mesh.shape[name] for name in axes)
    split = any(name in mesh.shape for name in OF_WEIGHTS)
    if not split or count == 1 or num_rows % count:
        return None

    def lay(x: Array) -> Array:
        if x.ndim < 2 or x.shape[0] != num_rows:
            return x
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        spec = PartitionSpec(axes, *rest)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return lay


def for_host(mesh: Mesh) -> NamedSharding:
    """Where numbers lie that the host reads, trials first.

    Along the trial axis, if there is one; of several processes, each of which reads
    only what its own devices hold, all of them on every device.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    return replicated(mesh) if len(processes) > 1 else by_trial(mesh)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` on all devices of the mesh; arrays already there are not copied."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put(tree: PyTree, where: PyTree) -> PyTree:
    """`tree`, leaf by leaf, on the shardings of a tree alike.

    Arrays already there are not copied. Of several processes, each brings what its own
    devices are to hold, and all have the same arrays: nothing is sent between them.
    """
    return jax.tree.map(_put, tree, where)


def bring(host: np.ndarray, where: Sharding | None) -> Array:
    """An array of the host's on its devices, or, of None, where JAX puts it.

    It takes the host's buffer over where it can, so that it is held once; nothing may
    write to it any more.
    """
    if where is None or where.is_fully_addressable:
        return jax.device_put(host, where, may_alias=True)
    return _put(host, where)


def _put(x: Any, where: Sharding) -> Array:
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        there = x.sharding.is_equivalent_to(where, x.ndim)
        return x if there else jax.jit(lambda x: x, out_shardings=where)(x)
    # `device_put` would send all of it around, to see whether all have the same.
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, num_leading_axes: int
) -> dict[str, Array]:
    """A host batch on the mesh, its rows split over the axes for rows."""
    sharding = rows(mesh, num_leading_axes)
    return {
        name: jax.make_array_from_process_local_data(sharding, value, value.shape)
        for name, value in batch.items()
    }


def batch_shapes(
    batch: Mapping[str, np.ndarray], mesh: Mesh, num_leading_axes: int
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a batch, to compile for."""
    sharding = rows(mesh, num_leading_axes)
    return {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        for name, value in batch.items()
    }
