"""A base is read leaf by leaf, and not at all where its devices have no room."""

import functools
import math
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.io import capacity
from lowrank.io.decoders import LLAMA
from lowrank.io.folders import write_model
from lowrank.io.safetensors import Tensors
from lowrank.models.decoder import LanguageModel
from lowrank.models.decoder_spec import DecoderSpec
from lowrank.sharding.mesh import MeshSpec

SPEC = DecoderSpec(
    vocab_size=64, d_model=128, num_layers=8, num_heads=4, num_kv_heads=4,
    d_head=32, d_ff=256, max_positions=32,
)  # fmt: skip
ONE_LAYER = 4 * (4 * 128 * 128 + 3 * 128 * 256)


@functools.cache
def shapes():
    one = {"ids": np.zeros((1, 2), np.int32), "mask": np.ones((1, 2), bool)}
    model = LanguageModel(SPEC)
    return jax.eval_shape(model.init, jax.random.key(0), one)["params"]


WHOLE = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of several shards."""
    root = tmp_path_factory.mktemp("capacity")
    (root / "tokenizer.json").write_text("{}")
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes())
    config = {"model_type": "llama"}
    return write_model(
        root / "model", LLAMA.to_hf(params), config, root, card="", max_shard=WHOLE // 3
    )


def read(folder, given=None, **more):
    with Tensors(folder) as tensors:
        source = given or tensors.read
        return LLAMA.from_hf(tensors.shapes, source, shapes(), where="it", **more)[0]


def test_the_host_holds_the_model_and_less_than_two_layers(folder):
    tracemalloc.start()
    params = read(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < WHOLE + 2 * ONE_LAYER < 1.5 * WHOLE
    assert len(params) == len(flatten(shapes())[0])


def none(name):
    raise AssertionError(f"{name} was read")


def test_weights_without_room_are_refused_before_any_is_read(folder, monkeypatch):
    monkeypatch.setattr(capacity, "room", lambda count: (WHOLE // 3, "a card"))
    with pytest.raises(BadInput, match=r"it has .* \(a card\).* with 4 times as many"):
        read(folder, none)
    monkeypatch.setattr(capacity, "room", lambda count: (WHOLE, "a card"))
    assert read(folder)


def test_what_counts_is_the_part_of_each_device(folder, monkeypatch):
    asked = []

    def room(count):
        asked.append(count)
        return WHOLE // 2, "a card"

    monkeypatch.setattr(capacity, "room", room)
    mesh = MeshSpec(fsdp=4).build()
    split = PartitionSpec(None, "fsdp")
    places = {
        path: NamedSharding(mesh, split if leaf.ndim > 1 else PartitionSpec())
        for path, leaf in flatten(shapes())[0].items()
    }
    assert read(folder, places=places)
    assert asked == [4]
    whole = dict.fromkeys(places, NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(BadInput, match="with 2 times as many"):
        read(folder, none, places=whole)


def test_where_nothing_tells_nothing_is_refused(folder, monkeypatch):
    monkeypatch.setattr(capacity, "room", lambda count: (None, "nothing"))
    assert read(folder)
