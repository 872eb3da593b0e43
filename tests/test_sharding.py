"""Arrays lie where the mesh says, on one device and on several."""

import jax
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.sharding.mesh import (
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


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"trial": 8}, {"trial": 8, "data": 1}),
        ({"trial": 2, "data": 4}, {"trial": 2, "data": 4}),
        ({"trial": -1, "data": 2}, {"trial": 4, "data": 2}),
        ({"trial": 3, "data": -1}, {"trial": 3, "data": 2}),
        # One trial's devices know nothing of others.
        ({"trial": 1, "data": 2}, {"data": 2}),
    ],
)
def test_trials_and_rows_have_an_axis_each(asked, found):
    mesh = MeshSpec(**asked).build()
    assert dict(mesh.shape) == found
    assert len({device.id for device in mesh.devices.flat}) == mesh.size


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"trial": -1, "data": -1}, "both ask for all devices"),
        ({"trial": 4, "data": 4}, "is 16, but there are 8 cpu devices"),
        ({"trial": 0}, "mesh.trial = 0, but there are 8 cpu devices"),
        ({"trial": 16}, "mesh.trial = 16, but there are 8 cpu devices"),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_refused(asked, said):
    with pytest.raises(BadInput, match=said):
        MeshSpec(**asked).build()


@pytest.mark.parametrize(
    ("asked", "num_trials", "found"),
    [
        ({"trial": 4}, 8, {"trial": 4}),
        ({"trial": 4}, 6, {"trial": 3}),
        ({"trial": 4, "data": -1}, 5, {"trial": 1, "data": 2}),
        ({"trial": -1}, 7, {"trial": 7}),
        ({"trial": -1, "data": 2}, 2, {"trial": 2, "data": 2}),
        ({"data": 4}, 3, {"data": 4}),
    ],
)
def test_a_pack_that_is_left_over_gets_the_devices_it_can_share(
    asked, num_trials, found
):
    mesh = MeshSpec(**asked).for_trials(num_trials)
    assert mesh == MeshSpec(**found)
    assert num_trials % mesh.sizes()["trial"] == 0


@pytest.mark.parametrize(
    ("num_trials", "found"),
    [(8, (4, 2)), (6, (2, 4)), (5, (1, 8)), (4, (4, 2)), (3, (1, 8))],
)
def test_of_several_processes_no_device_is_left_out(monkeypatch, num_trials, found):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = MeshSpec(trial=4, data=2).for_trials(num_trials)
    assert (mesh.trial, mesh.data) == found
    assert num_trials % mesh.trial == 0


def test_a_packs_batch_is_cut_by_trials_and_rows_and_a_shared_one_by_rows():
    mesh = MeshSpec(trial=2, data=4).build()
    batch = {"ids": np.arange(96, dtype=np.int32).reshape(2, 8, 6)}
    own = place_batch(batch, mesh, 1)["ids"]
    assert {s.data.shape for s in own.addressable_shards} == {(1, 2, 6)}
    np.testing.assert_array_equal(own, batch["ids"])
    shared = place_batch({"ids": batch["ids"][0]}, mesh, 0)["ids"]
    assert len(shared.addressable_shards) == 8
    assert {s.data.shape for s in shared.addressable_shards} == {(2, 6)}


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
