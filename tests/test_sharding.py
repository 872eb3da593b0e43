"""Arrays lie where the mesh says, on one device and on several."""

import jax
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.sharding import (
    MeshSpec,
    batch_shapes,
    check_rows,
    place_batch,
    replicate,
    rows,
)

BATCH = {"ids": np.arange(48, dtype=np.int32).reshape(1, 8, 6)}


@pytest.mark.parametrize(("data", "count"), [(1, 1), (4, 4), (-1, 8)])
def test_a_mesh_has_the_devices_it_was_asked_for(data, count):
    mesh = MeshSpec(data=data).build()
    assert dict(mesh.shape) == {"data": count}
    assert len({device.id for device in mesh.devices.flat}) == count


@pytest.mark.parametrize("data", [0, -2, 9])
def test_a_mesh_without_devices_is_refused(data):
    with pytest.raises(BadInput, match=rf"mesh.data = {data}, but there are 8 cpu"):
        MeshSpec(data=data).build()


def test_rows_are_shared_out_in_order_and_none_is_lost():
    mesh = MeshSpec(data=4).build()
    placed = place_batch(BATCH, mesh, 1)["ids"]
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.index[1].start)
    assert [shard.data.shape for shard in shards] == [(1, 2, 6)] * 4
    joined = np.concatenate([np.asarray(shard.data) for shard in shards], axis=1)
    np.testing.assert_array_equal(joined, BATCH["ids"])


def test_shapes_say_what_a_placed_batch_is():
    mesh = MeshSpec(data=2).build()
    shape, placed = batch_shapes(BATCH, mesh, 1)["ids"], place_batch(BATCH, mesh, 1)
    assert (shape.shape, shape.dtype) == (placed["ids"].shape, placed["ids"].dtype)
    assert shape.sharding == placed["ids"].sharding == rows(mesh, 1)


def test_replicas_are_whole_and_what_lies_there_is_not_copied():
    mesh = MeshSpec(data=4).build()
    once = replicate({"w": np.ones((3, 2), np.float32)}, mesh)
    assert [s.data.shape for s in once["w"].addressable_shards] == [(3, 2)] * 4
    again = replicate(once, mesh)
    pointers = [
        [s.data.unsafe_buffer_pointer() for s in tree["w"].addressable_shards]
        for tree in (once, again)
    ]
    assert pointers[0] == pointers[1]


def test_a_sharded_sum_is_the_sum():
    mesh = MeshSpec(data=8).build()
    placed = place_batch({"x": np.arange(16, dtype=np.float32)}, mesh, 0)["x"]
    assert float(jax.jit(lambda x: x.sum())(placed)) == 120


def test_rows_that_cannot_be_shared_out_are_refused():
    mesh = MeshSpec(data=4).build()
    check_rows(mesh, 8, "data.batching.batch_size")
    with pytest.raises(
        BadInput, match=r"data\.batching\.batch_size = 6 cannot be shar"
    ):
        check_rows(mesh, 6, "data.batching.batch_size")
