"""Where arrays live: one mesh, even for one device, and a sharding for every tree.

The data axis splits a batch's rows; the base, the factors and their moments are
replicated along it. `jax.jit` adds the sum of gradients over the axis by itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec


@spec
class MeshSpec:
    """Devices by axis.

    Attributes:
      data: Devices that share a batch's rows; -1 takes all there are.
    """

    data: int = 1

    def build(self) -> Mesh:
        """The mesh of this process's devices.

        Raises:
          BadInput: There are fewer devices than asked for.
        """
        devices = jax.devices()
        count = len(devices) if self.data == -1 else self.data
        if not 1 <= count <= len(devices):
            raise BadInput(
                f"mesh.data = {self.data}, but there are {len(devices)} "
                f"{devices[0].platform} devices; give 1 to {len(devices)}, or -1 for "
                "all of them"
            )
        return Mesh(np.array(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def check_rows(mesh: Mesh, num_rows: int, what: str) -> None:
    """Refuses batches whose rows cannot be shared out evenly.

    Raises:
      BadInput: The data axis does not divide `num_rows`; `what` is the setting.
    """
    if num_rows % mesh.shape["data"]:
        raise BadInput(
            f"{what} = {num_rows} cannot be shared out to the {mesh.shape['data']} "
            "devices of mesh.data; make it a multiple"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of the array."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, num_leading_axes: int) -> NamedSharding:
    """Rows of a batch split over the data axis, after some leading axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * num_leading_axes, "data"))


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
