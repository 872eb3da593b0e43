"""Vision Transformers: names of weights, and what their configs say of shape and input.

Read are folders of ViT (`ViTModel`, `ViTForImageClassification`) and of DINOv2
(`Dinov2Model`, `Dinov2ForImageClassification`). Files have the names that the hub has;
transformers 5 and PEFT call the same modules by shorter ones, which the tables here
have. A convolution over patches is read as the matrix that it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.core.spec import check_fields
from lowrank.io.keymaps import Family, Row, dense, listed, norm
from lowrank.io.safetensors import read_json
from lowrank.models.pixels import ImageInput
from lowrank.models.vision import VisionSpec

#: Beside config.json: how images were prepared when the base was trained.
PREPARATION = "preprocessor_config.json"
#: Weights that no module of PEFT corrects: a convolution, and bare parameters.
UNNAMED = ("encoder/class_token", "encoder/patches/*", "encoder/position/*")
_CONVOLUTION = "embeddings.patch_embeddings.projection"
_POSITIONS = "embeddings.position_embeddings"
_FIRST = "embeddings.cls_token"
_SHARED = (
    Row("encoder/class_token", _FIRST),
    Row("encoder/position/embedding", _POSITIONS),
    *dense("encoder/patches", _CONVOLUTION),
    *norm("encoder/norm", "layernorm"),
    *dense("head", "classifier", bare=True),
)
_UNUSED = {
    r"embeddings\.mask_token": "for pretraining with hidden patches",
    r"classifier\..*": "another task's head; ours starts from zero",
}


def _layer(own: str, before: str, after: str) -> tuple[Row, ...]:
    """Rows of a layer, given its name and those of its two norms."""
    return (
        *norm("encoder/layer/attention_norm", f"{own}{before}"),
        *dense("encoder/layer/attention/query", f"{own}attention.q_proj"),
        *dense("encoder/layer/attention/key", f"{own}attention.k_proj"),
        *dense("encoder/layer/attention/value", f"{own}attention.v_proj"),
        *dense("encoder/layer/attention/output", f"{own}attention.o_proj"),
        *norm("encoder/layer/mlp_norm", f"{own}{after}"),
        *dense("encoder/layer/mlp/up", f"{own}mlp.fc1"),
        *dense("encoder/layer/mlp/down", f"{own}mlp.fc2"),
    )


_ATTENTION = (
    (r"attention\.attention\.query\b", "attention.q_proj"),
    (r"attention\.attention\.key\b", "attention.k_proj"),
    (r"attention\.attention\.value\b", "attention.v_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
)

#: google/vit-base-patch16-224 and its kin.
VIT = Family(
    name="ViT",
    prefix="vit.",
    new_head=True,
    rows=(*_SHARED, *_layer("layers.{layer}.", "layernorm_before", "layernorm_after")),
    unused={
        **_UNUSED,
        r"pooler\..*": "features are taken before it",
        r"decoder\..*": "the head of pretraining",
    },
    renamed=(
        *_ATTENTION,
        (r"^encoder\.layer\.(?=\d)", "layers."),
        (r"\.intermediate\.dense\b", ".mlp.fc1"),
        (r"\.output\.dense\b", ".mlp.fc2"),
    ),
)
#: facebook/dinov2-small and its kin.
DINOV2 = Family(
    name="DINOv2",
    prefix="dinov2.",
    new_head=True,
    rows=(
        *_SHARED,
        *_layer("encoder.layer.{layer}.", "norm1", "norm2"),
        Row(
            "encoder/layer/attention_scale",
            "encoder.layer.{layer}.layer_scale1.lambda1",
        ),
        Row("encoder/layer/mlp_scale", "encoder.layer.{layer}.layer_scale2.lambda1"),
    ),
    unused=_UNUSED,
    renamed=_ATTENTION,
)
#: model_type of a config.json -> whose names its weights have.
KINDS: Mapping[str, Family] = {"vit": VIT, "dinov2": DINOV2}

#: config.json field -> field of `VisionSpec`.
_HANDLED = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "qkv_bias": "qkv_bias",
    "initializer_range": "init_stddev",
}
_REQUIRED = (
    *("image_size", "patch_size", "hidden_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
#: The field that the width of the feed-forward part comes from, and its own default of
#: the epsilon, by model_type.
_OWN = {"vit": ("intermediate_size", 1e-12), "dinov2": ("mlp_ratio", 1e-6)}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
#: Fields that this code is right for at one value only.
_FIXED = {"use_swiglu_ffn": False, "chunk_size_feed_forward": 0, "pruned_heads": {}}
# Provenance, the dropout of the base's own training, the start of weights that are
# read, heads that are not, and what transformers returns of a backbone.
_IRRELEVANT = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version"),
        *("torch_dtype", "dtype", "gradient_checkpointing"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate"),
        *("layerscale_value", "use_mask_token", "encoder_stride"),
        *("pooler_act", "pooler_output_size"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("output_attentions", "output_hidden_states", "return_dict"),
        *("apply_layernorm", "reshape_hidden_states", "stage_names"),
        *("out_features", "out_indices"),
    )
)


def vision_spec(config: Mapping[str, Any], where: str) -> VisionSpec:
    """The shape of a Vision Transformer from a config.json.

    Raises:
      BadInput: A field is missing, has an unknown value, or is one whose meaning this
        code does not know: it might change what the model computes.
    """
    kind = str(config.get("model_type"))
    width, eps = _OWN[kind]
    known = {*_HANDLED, *_FIXED, *_IRRELEVANT, "model_type", width}
    if unknown := sorted(set(config) - known):
        raise BadInput(
            f"{where} has fields of unknown meaning: {listed(unknown)}. They may "
            "change what the model computes, so they are refused; remove them if you "
            "know that they do not."
        )
    for name, only in _FIXED.items():
        if (value := config.get(name, only)) != only:
            raise BadInput(
                f"{where}: {name} must be {only!r}, not {value!r}; no other is "
                "computed here. Use base=python:package.module:load."
            )
    if missing := sorted({*_REQUIRED, width} - set(config)):
        raise BadInput(f"{where} lacks {', '.join(missing)}")
    fields = {ours: config[name] for name, ours in _HANDLED.items() if name in config}
    for name in ("image_size", "patch_size"):
        fields[name] = _side(fields[name], f"{where}: {name}")
    if (named := fields.get("activation", "gelu")) not in _ACTIVATIONS:
        raise BadInput(
            f"{where}: hidden_act must be one of {', '.join(_ACTIVATIONS)}, not "
            f"{named!r}"
        )
    fields["activation"] = _ACTIVATIONS[named]
    fields.setdefault("norm_eps", eps)
    fields["layer_scale"] = kind == "dinov2"
    fields["d_ff"] = config[width]
    if kind == "dinov2":
        ratio, own = config[width], fields["d_model"]
        if not (type(ratio) in (int, float) and type(own) is int and ratio > 0):
            raise BadInput(f"{where}: mlp_ratio must be a number, not {ratio!r}")
        fields["d_ff"] = int(own * ratio)
    try:
        check_fields(VisionSpec, fields)
        return VisionSpec(**fields)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def image_input(folder: Path, shape: VisionSpec) -> ImageInput:
    """How a base's images are prepared, from the file that says so.

    What counts is the square that the model is to get (`crop_size` where images are
    cropped, else `size`, else the config's own), and mean and deviation of channels.

    Raises:
      BadInput: The file is missing or says something that is not done here: a guess
        would change every number without a word.
    """
    file = folder / PREPARATION
    if not file.is_file():
        raise BadInput(
            f"{file} is missing, so nobody knows how this base's images are scaled; "
            "write it with save_pretrained of its image processor, or by hand: "
            '{"size": 224, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
    config = read_json(file)
    factor = config.get("rescale_factor", 1 / 255)
    usual = isinstance(factor, int | float) and abs(factor * 255 - 1) < 1e-6
    if not config.get("do_rescale", True) or not usual:
        raise BadInput(
            f"{file}: pixels are scaled by 1/255 here, and rescale_factor is "
            f"{factor!r} (do_rescale {config.get('do_rescale', True)!r})"
        )
    named = "crop_size" if config.get("do_center_crop") else "size"
    size = config.get(named)
    size = shape.image_size if size is None else _side(size, f"{file}: {named}")
    one = {"mean": [0.0] * shape.num_channels, "std": [1.0] * shape.num_channels}
    if config.get("do_normalize", True):
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if theirs not in config:
                raise BadInput(f"{file} lacks {theirs}, which normalizes the channels")
            one[ours] = config[theirs]
    fields = {
        "size": size,
        "multiple": shape.patch_size,
        "channels": shape.num_channels,
        **one,
    }
    try:
        check_fields(ImageInput, fields)
        found = ImageInput(**fields)
        found.side(None, "its size")
        return found
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None


def matrices(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """A checkpoint's tensors as tables here have them: vectors and matrices.

    The convolution (out, channels, rows, columns) becomes (out, rows x columns x
    channels); positions and class token lose their axes of length one.

    Args:
      shapes: Their names and shapes, with or without prefix.
      read: Gives the values of one.
    """

    def flat(name: str, value: Any) -> Any:
        if name.endswith(f"{_CONVOLUTION}.weight") and value.ndim == 4:
            return value.transpose(0, 2, 3, 1).reshape(len(value), -1)
        if name.endswith(_POSITIONS) and value.ndim == 3 and len(value) == 1:
            return value[0]
        if name.endswith(_FIRST) and value.shape[:2] == (1, 1):
            return value[0, 0]
        return value

    # Zeros that take no memory: only their shape is asked for.
    empty = lambda shape: np.broadcast_to(np.zeros((), np.float32), shape)
    flattened = {
        name: tuple(flat(name, empty(shape)).shape) for name, shape in shapes.items()
    }
    return flattened, lambda name: np.ascontiguousarray(flat(name, read(name)))


def tensors_of(
    family: Family, params: Any, shape: VisionSpec, prefix: str | None = None
) -> dict[str, np.ndarray]:
    """Our params as their tensors: the inverse of `matrices` and `Family.from_hf`."""
    found = dict(family.to_hf(params, prefix))
    for name, value in found.items():
        if name.endswith(f"{_CONVOLUTION}.weight"):
            side, channels = shape.patch_size, shape.num_channels
            cut = value.reshape(len(value), side, side, channels)
            found[name] = np.ascontiguousarray(cut.transpose(0, 3, 1, 2))
        elif name.endswith(_POSITIONS):
            found[name] = value[None]
        elif name.endswith(_FIRST):
            found[name] = value[None, None]
    return found


def _side(value: Any, what: str) -> int:
    """One number from the forms in which configs give the side of a square."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or value < 1:
        raise BadInput(f"{what} must be the side of a square, not {value!r}")
    return value
