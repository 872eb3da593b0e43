"""Where arrays live: one mesh, even for one device, and a sharding for every tree.

The trial axis splits a pack's trials: their factors, moments, dials and batches. Trials
meet nowhere in a step, so on that axis nothing is ever communicated. The data axis
splits a batch's rows; what belongs to a trial is replicated along it, and `jax.jit`
adds the sum of gradients over the axis by itself. The base is replicated along both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

#: The mesh axis of trials. A mesh that has none holds every trial on all its devices.
TRIAL = "trial"
DATA = "data"


@spec
class MeshSpec:
    """Devices by axis; their product is what one pack occupies.

    Attributes:
      data: Devices that share a batch's rows; -1 takes all that the trials leave.
      trial: Devices that share a pack's trials; -1 takes all that the rows leave.
    """

    data: int = 1
    trial: int = 1

    def __post_init__(self) -> None:
        if self.data == self.trial == -1:
            raise BadInput(
                "mesh.data = -1 and mesh.trial = -1 both ask for all devices: give "
                "one of them a number"
            )

    def sizes(self) -> dict[str, int]:
        """Devices along each axis, of this process's devices.

        Raises:
          BadInput: There are fewer devices than asked for.
        """
        asked = {TRIAL: self.trial, DATA: self.data}
        devices = jax.devices()
        there = f"there are {len(devices)} {devices[0].platform} devices"
        for name, count in asked.items():
            if count != -1 and not 1 <= count <= len(devices):
                raise BadInput(
                    f"mesh.{name} = {count}, but {there}; give 1 to {len(devices)}, or "
                    "-1 for all of them"
                )
        given = math.prod(count for count in asked.values() if count != -1)
        if given > len(devices):
            raise BadInput(
                f"mesh.trial = {self.trial} times mesh.data = {self.data} is {given}, "
                f"but {there}; make one of them smaller"
            )
        rest = len(devices) // given
        return {name: rest if n == -1 else n for name, n in asked.items()}

    def build(self) -> Mesh:
        """The mesh of this process's devices; without a trial axis where it has size 1.

        Raises:
          BadInput: There are fewer devices than asked for.
        """
        sizes = self.sizes()
        if sizes[TRIAL] == 1:
            del sizes[TRIAL]
        devices = jax.devices()[: math.prod(sizes.values())]
        return Mesh(
            np.array(devices).reshape(*sizes.values()),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes),
        )

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
        sweep need not come out even; its last pack then leaves some devices idle.

        Raises:
          BadInput: There are fewer devices than asked for.
        """
        sizes, fits = self.sizes(), self.share(num_trials)
        if fits == sizes[TRIAL]:
            return self
        return dataclasses.replace(self, trial=fits, data=sizes[DATA])


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


def check_rows(mesh: Mesh, num_rows: int, what: str) -> None:
    """Refuses batches whose rows cannot be shared out evenly.

    Raises:
      BadInput: The data axis does not divide `num_rows`; `what` is the setting.
    """
    if num_rows % mesh.shape[DATA]:
        raise BadInput(
            f"{what} = {num_rows} cannot be shared out to the {mesh.shape['data']} "
            "devices of mesh.data; make it a multiple"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of the array."""
    return NamedSharding(mesh, PartitionSpec())


def by_trial(mesh: Mesh) -> NamedSharding:
    """A leading axis of trials split over the trial axis, if the mesh has one."""
    axis = trial_axis(mesh)
    return NamedSharding(mesh, PartitionSpec(axis) if axis else PartitionSpec())


def rows(mesh: Mesh, num_leading_axes: int) -> NamedSharding:
    """Rows of a batch split over the data axis, after some leading axes.

    The first of these is the trials' and is split over theirs. A batch without one is
    every trial's: all devices of the trial axis have the same rows of it.
    """
    leading = [trial_axis(mesh), *[None] * num_leading_axes][:num_leading_axes]
    return NamedSharding(mesh, PartitionSpec(*leading, DATA))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` on all devices of the mesh; arrays already there are not copied."""
    return jax.device_put(tree, replicated(mesh))


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, num_leading_axes: int
) -> dict[str, Array]:
    """A host batch on the mesh, its rows split over the data axis."""
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
