"""A Vision Transformer out of an ONNX graph, turned once into the folder of any base.

Read is what torch.onnx writes of a `Dinov2Model` called `backbone` inside a larger
model. Norms, biases, scales and the convolution keep their names there; kernels lose
theirs and are found through the node that uses each, named after its module; positions
are cut into the class token's and the patches'. What the larger model has beside the
backbone is left out. Weights are those of the graph, digit by digit.
"""

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lowrank.core.errors import BadInput
from lowrank.io.files import cached_folder
from lowrank.io.safetensors import SINGLE
from lowrank.io.vit import PREPARATION

#: Version of what is written; a part of the folder's name.
VERSION = 1
_OWN = "backbone."
_KERNEL = re.compile(r"/backbone/(encoder/layer\.\d+/.+)/MatMul")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
#: Width of a head of DINOv2, whatever its size; a graph does not say it.
D_HEAD = 64
#: Side of the images that the graphs of this kind are given, and how they are scaled:
#: by the statistics of ImageNet.
IMAGES = {
    "size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 1 / 255,
}


def converted(file: Path, sha256: str, cache: Path) -> Path:
    """The folder that stands for an ONNX file; made unless it is there.

    Args:
      file: The ONNX file.
      sha256: Of its bytes.
      cache: Parent of the folder.

    Raises:
      BadInput: It is no ONNX file, or holds no backbone of this kind; or the package
        `onnx` is missing.
      CannotWrite: The cache cannot be written.
    """
    folder = cache / f"onnx-{sha256[:16]}-{VERSION}"
    if folder.is_dir():
        return folder
    library = _library()
    try:
        graph = library.load(str(file)).graph
        values = {
            one.name: library.numpy_helper.to_array(one) for one in graph.initializer
        }
    # The package raises whatever its parsing meets.
    except Exception as error:
        raise BadInput(f"{file} is not a readable ONNX file: {error}") from error
    tensors = tensors_of(graph, values, file)
    config = config_of(tensors, file)

    def fill(partial: Path) -> None:
        save_file(tensors, partial / SINGLE, {"format": "pt"})
        _write(partial / "config.json", config)
        _write(partial / PREPARATION, IMAGES)

    return cached_folder(folder, fill)


def tensors_of(
    graph: Any, values: Mapping[str, np.ndarray], file: Path
) -> dict[str, np.ndarray]:
    """The backbone's tensors by the names of `Dinov2Model`.

    Args:
      graph: Whose nodes say what nameless weights are for.
      values: Name in the graph -> weight.
      file: For messages.

    Raises:
      BadInput: A part is missing, or there are two of it.
    """
    found: dict[str, np.ndarray] = {
        name.removeprefix(_OWN): value
        for name, value in values.items()
        if name.startswith(_OWN)
    }
    places: dict[str, np.ndarray] = {}
    for node in graph.node:
        own = [values[name] for name in node.input if name in values]
        if kernel := _KERNEL.fullmatch(node.name):
            # (in, out) in the graph; there are products of two activations as well.
            if own:
                _add(found, f"{kernel[1].replace('/', '.')}.weight", own[0].T, file)
        elif node.name.startswith("/backbone/embeddings/") and "/" not in (
            node.name.removeprefix("/backbone/embeddings/")
        ):
            # Constants of shapes are whole numbers; these are not.
            own = [one for one in own if one.ndim == 3 and one.dtype == np.float32]
            if own and node.op_type in ("Concat", "Reshape"):
                _add(places, node.op_type, own[0], file)
    if set(places) != {"Concat", "Reshape"}:
        raise BadInput(
            f"{file} has no positions of a class token and of patches where a DINOv2 "
            "backbone has them; another kind of graph is not read"
        )
    joined = np.concatenate([places["Concat"], places["Reshape"]], axis=1)
    found["embeddings.position_embeddings"] = joined
    return {
        name: np.ascontiguousarray(value, np.float32) for name, value in found.items()
    }


def config_of(tensors: Mapping[str, np.ndarray], file: Path) -> dict[str, Any]:
    """A config.json for what the tensors are.

    Raises:
      BadInput: They are no backbone of this kind.
    """
    try:
        width, channels, patch, _ = tensors[
            "embeddings.patch_embeddings.projection.weight"
        ].shape
        places = tensors["embeddings.position_embeddings"].shape[1] - 1
        inner = len(tensors["encoder.layer.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise BadInput(f"{file} holds no DINOv2 backbone: {error} is missing") from None
    side = round(places**0.5)
    if side * side != places or width % D_HEAD or inner % width:
        raise BadInput(
            f"{file} holds a backbone of width {width}, {places} positions and inner "
            f"width {inner}; DINOv2 has heads of {D_HEAD}, a square of positions and "
            "an inner width that is a multiple"
        )
    numbers = {int(layer[1]) for name in tensors if (layer := _LAYER.match(name))}
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(numbers),
        "num_attention_heads": width // D_HEAD,
        "mlp_ratio": inner // width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "torch_dtype": "float32",
    }


def _add(found: dict[str, np.ndarray], name: str, value: Any, file: Path) -> None:
    if name in found:
        raise BadInput(f"{file} holds {name} twice; another kind of graph is not read")
    found[name] = value


def _library() -> Any:
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnx.numpy_helper")
        return onnx
    except ImportError:
        raise BadInput(
            "base=vit is an ONNX file, which needs the extra: pip install "
            "'lowrank[vision]'"
        ) from None


def _write(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
