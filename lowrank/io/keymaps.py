"""How our weights and a Hugging Face checkpoint's are called, in both directions.

One table per family pairs a path of ours with a tensor of theirs. Kernels are stored
there as (out, in) and here as (in, out), hence transposed; layers are numbered tensors
there and, when scanned, one stacked leaf here. Nothing is dropped in silence: each
tensor of a checkpoint is used or ignored for a reason that is given, each leaf of the
model is filled, and each field of config.json is handled, known to be irrelevant, or
equal to the only value that this code is right for.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.core.spec import check_fields
from lowrank.core.trees import flatten, leaf_digest
from lowrank.io.safetensors import aligned
from lowrank.models.encoder import EncoderSpec

#: What `BertForSequenceClassification` and PEFT put before the encoder's names.
PREFIX = "bert."
_LAYER = "encoder.layer.{layer}."
_MOST_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      path: Our path, layers stacked.
      tensor: Their name without prefix, with ``{layer}`` where layers are numbered.
      transpose: Whether theirs is (out, in) where ours is (in, out).
    """

    path: str
    tensor: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor per layer."""
        return "{layer}" in self.tensor


def _dense(path: str, module: str) -> tuple[Row, Row]:
    return (
        Row(f"{path}/kernel", f"{module}.weight", transpose=True),
        Row(f"{path}/bias", f"{module}.bias"),
    )


def _norm(path: str, module: str) -> tuple[Row, Row]:
    return (
        Row(f"{path}/scale", f"{module}.weight"),
        Row(f"{path}/bias", f"{module}.bias"),
    )


def _embedding(name: str) -> Row:
    return Row(
        f"encoder/embeddings/{name}/embedding", f"embeddings.{name}_embeddings.weight"
    )


_POOLER = _dense("pooler", "pooler.dense")
_HEAD = _dense("head", "classifier")
#: The BERT family (BERT, MiniLM).
BERT = (
    _embedding("word"),
    _embedding("position"),
    _embedding("token_type"),
    *_norm("encoder/embeddings/norm", "embeddings.LayerNorm"),
    *_dense("encoder/layer/attention/query", f"{_LAYER}attention.self.query"),
    *_dense("encoder/layer/attention/key", f"{_LAYER}attention.self.key"),
    *_dense("encoder/layer/attention/value", f"{_LAYER}attention.self.value"),
    *_dense("encoder/layer/attention/output", f"{_LAYER}attention.output.dense"),
    *_norm("encoder/layer/attention/norm", f"{_LAYER}attention.output.LayerNorm"),
    *_dense("encoder/layer/mlp/up", f"{_LAYER}intermediate.dense"),
    *_dense("encoder/layer/mlp/down", f"{_LAYER}output.dense"),
    *_norm("encoder/layer/mlp/norm", f"{_LAYER}output.LayerNorm"),
    *_POOLER,
    *_HEAD,
)
_BY_PATH = {row.path: row for row in BERT}
_BY_TENSOR = {row.tensor: row for row in BERT}

#: Tensors a checkpoint may hold without our using them, and why.
_UNUSED = {
    r"embeddings\.(position_ids|token_type_ids)": "a constant, not a weight",
    r"pooler\..*": "this pooling has no pooler",
    r"cls\..*": "the head of pretraining",
    r"(classifier|qa_outputs)\..*": "another task's head; ours starts from zero",
}
# TensorFlow's names, still found in the oldest conversions, google's own among them.
_OLD_NAMES = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


def hf_tensor(path: str, layer: int | None = None, prefix: str = PREFIX) -> str:
    """Their full tensor name for one of our weights.

    Args:
      path: Our path, of a scanned model ("encoder/layer/...") or of an unrolled one
        ("encoder/layer_3/...").
      layer: Which layer of a stacked leaf; None for every other path.
      prefix: What stands before the names of encoder and pooler.

    Raises:
      UnknownName: No such path in the table.
      BadInput: A stacked leaf without `layer`, or a layer where there is none.
    """
    stacked, own_layer = stacked_path(path)
    if stacked not in _BY_PATH:
        raise UnknownName(
            f"no Hugging Face name is known for {path!r}. Nearest: "
            f"{nearest(stacked, _BY_PATH)}."
        )
    row = _BY_PATH[stacked]
    if own_layer is not None and layer is not None:
        raise BadInput(f"{path!r} names its layer itself; leave layer={layer} out")
    layer = own_layer if layer is None else layer
    if row.stacked != (layer is not None):
        needs = "one tensor per layer: say which" if row.stacked else "no layers"
        raise BadInput(f"{path!r} has {needs} (layer={layer})")
    name = row.tensor.format(layer=layer)
    return name if row in _HEAD else prefix + name


def hf_module(path: str, layer: int | None = None, prefix: str = PREFIX) -> str:
    """Their module that owns the weight at `path`; PEFT names its targets so."""
    return hf_tensor(path, layer, prefix).rpartition(".")[0]


def our_path(tensor: str, *, scan: bool = True) -> tuple[str, int | None]:
    """Our path for their tensor name, with or without prefix, and the layer in it.

    Args:
      tensor: For example "bert.encoder.layer.3.attention.self.query.weight".
      scan: Whether the model has stacked layers. If not, the path names the layer
        and the second result is None.

    Raises:
      UnknownName: No weight of ours corresponds to it.
    """
    name = _modern(tensor)
    numbered = re.fullmatch(r"encoder\.layer\.(0|[1-9]\d*)\.(.+)", name)
    layer = int(numbered[1]) if numbered else None
    pattern = _LAYER + numbered[2] if numbered else name
    if pattern not in _BY_TENSOR:
        raise UnknownName(
            f"no weight of ours corresponds to tensor {tensor!r}. Nearest: "
            f"{nearest(pattern, _BY_TENSOR)}."
        )
    path = _BY_TENSOR[pattern].path
    if layer is None or scan:
        return path, layer
    return unrolled_path(path, layer), None


def our_kernel(module: str, *, scan: bool = True) -> tuple[str, int | None]:
    """Our path of the weight matrix in their module: inverse of `hf_module`."""
    return our_path(f"{module}.weight", scan=scan)


def stacked_path(path: str) -> tuple[str, int | None]:
    """Takes the layer out of an unrolled path: its stacked form and the layer."""
    found = re.fullmatch(r"encoder/layer_(\d+)/(.+)", path)
    return (f"encoder/layer/{found[2]}", int(found[1])) if found else (path, None)


def unrolled_path(path: str, layer: int) -> str:
    """Puts a layer into a stacked path."""
    return path.replace("encoder/layer/", f"encoder/layer_{layer}/", 1)


def from_hf(
    names: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    model: PyTree,
    *,
    num_layers: int,
    where: str,
) -> tuple[dict[str, jax.Array], str, dict[str, str]]:
    """Fills every leaf of `model` but the head from a checkpoint, leaf by leaf.

    Args:
      names: Their tensor names and shapes, with or without prefix.
      read: Gives the values of one tensor.
      model: Our params as shapes; with or without pooler, scanned or unrolled.
      num_layers: Layers of a stacked leaf.
      where: The checkpoint, for messages.

    Returns:
      Path -> array in the leaf's dtype; a fingerprint of the tensors used, which
      does not depend on scan, dtype or head; and the tensors that were ignored, each
      with its reason.

    Raises:
      BadInput: A tensor of unknown purpose, a leaf without tensor, a wrong shape, or
        one tensor under two names.
    """
    leaves, _ = flatten(model)
    leaves = {path: leaf for path, leaf in leaves.items() if not _is_head(path)}
    given: dict[str, str] = {}
    for name in names:
        plain = _modern(name)
        if plain in given:
            raise BadInput(f"{where} holds {plain!r} twice: {given[plain]!r}, {name!r}")
        given[plain] = name
    plan = {path: _sources(path, num_layers) for path in leaves}
    used = {tensor for tensors in plan.values() for tensor in tensors}
    ignored, unknown = {}, []
    for plain in sorted(set(given) - used):
        reason = _reason(plain)
        if reason is None:
            unknown.append(given[plain])
        else:
            ignored[given[plain]] = reason
    if unknown or used - set(given):
        raise BadInput(
            f"{where} does not fit the model. Tensors that no weight takes: "
            f"{_listed(unknown)}. Tensors that are missing: "
            f"{_listed(used - set(given))}. Check that config.json and weights belong "
            "together and that the model is of the BERT family."
        )
    params, digests = {}, {}
    for path, tensors in plan.items():
        transpose = _BY_PATH[stacked_path(path)[0]].transpose
        shape = leaves[path].shape
        piece = shape[len(shape) - _ndim(path) :]
        for tensor in tensors:
            theirs = tuple(names[given[tensor]])
            if theirs != (piece[::-1] if transpose else piece):
                raise BadInput(
                    f"{where}: tensor {given[tensor]!r} has shape {theirs}, but "
                    f"config.json makes it {piece[::-1] if transpose else piece}"
                )
        host = aligned(shape, leaves[path].dtype)
        for layer, tensor in enumerate(tensors):
            value = read(given[tensor])
            digests[tensor] = leaf_digest(tensor, value)
            host.reshape((len(tensors), *piece))[layer] = (
                value.T if transpose else value
            )
        # The array takes the buffer over: the base is held once, not twice.
        params[path] = jax.device_put(host, may_alias=True)
    text = "".join(digests[tensor] for tensor in sorted(digests))
    return params, hashlib.sha256(text.encode()).hexdigest(), ignored


def to_hf(params: PyTree, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """Our params as their tensors: inverse of `from_hf`, head included."""
    tensors = {}
    for path, leaf in flatten(params)[0].items():
        value = np.asarray(jax.device_get(leaf))
        stacked, own_layer = stacked_path(path)
        row = _BY_PATH.get(stacked)
        is_stack = row is not None and row.stacked and own_layer is None
        layers: list[int | None] = [*range(len(value))] if is_stack else [None]
        for layer in layers:
            name = hf_tensor(path, layer, prefix)
            piece = value if layer is None else value[layer]
            transpose = _BY_PATH[stacked].transpose
            tensors[name] = np.ascontiguousarray(piece.T if transpose else piece)
    return tensors


def _modern(tensor: str) -> str:
    name = tensor.removeprefix(PREFIX)
    for pattern, text in _OLD_NAMES:
        name = pattern.sub(text, name)
    return name


def _sources(path: str, num_layers: int) -> list[str]:
    """Their tensors, without prefix, that fill the leaf at `path`, in order."""
    stacked, layer = stacked_path(path)
    if _BY_PATH[stacked].stacked and layer is None:
        return [hf_tensor(path, index, prefix="") for index in range(num_layers)]
    return [hf_tensor(path, prefix="")]


def _ndim(path: str) -> int:
    return 2 if path.endswith(("/kernel", "/embedding")) else 1


def _is_head(path: str) -> bool:
    return path.startswith("head/")


def _reason(tensor: str) -> str | None:
    for pattern, reason in _UNUSED.items():
        if re.fullmatch(pattern, tensor):
            return reason
    return None


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (", ".join(names[:_MOST_LISTED]) or "none") + more


#: config.json field -> field of `EncoderSpec`.
_HANDLED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "pad_token_id": "pad_id",
    "initializer_range": "init_stddev",
}
# The others have the same default there and in `EncoderSpec`.
_REQUIRED = {name for name, ours in _HANDLED.items() if not hasattr(EncoderSpec, ours)}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
#: Fields that this code is right for at one value only.
_FIXED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
# Provenance, the dropout of the base's own training, heads that are not read, what a
# forward pass of transformers returns, and text generation. The `pooler_*` and
# `directionality` fields come from Google's multilingual release; nothing reads them.
_IRRELEVANT = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version"),
        *("torch_dtype", "dtype", "gradient_checkpointing"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
        *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"),
        *("tie_word_embeddings", "directionality", "pooler_type", "pooler_fc_size"),
        *("pooler_num_attention_heads", "pooler_num_fc_layers"),
        "pooler_size_per_head",
    )
)


def spec_from_config(config: Mapping[str, Any], where: str) -> EncoderSpec:
    """The encoder's shape from a config.json.

    Raises:
      BadInput: A field is missing, has an unknown value, or is one whose meaning this
        code does not know: it might change what the model computes.
    """
    known = {*_HANDLED, *_FIXED, *_IRRELEVANT}
    if unknown := sorted(set(config) - known):
        raise BadInput(
            f"{where} has fields of unknown meaning: {_listed(unknown)}. They may "
            "change what the model computes, so they are refused; remove them if you "
            "know that they do not."
        )
    for name, only in _FIXED.items():
        if (value := config.get(name, only)) != only:
            raise BadInput(
                f"{where}: {name} must be {only!r}, not {value!r}; this loader reads "
                "BERT-family encoders only. Use base=python:package.module:load."
            )
    if "model_type" not in config:
        raise BadInput(f"{where} has no model_type; this loader needs 'bert'")
    if missing := sorted(_REQUIRED - set(config)):
        raise BadInput(f"{where} lacks {', '.join(missing)}")
    fields = {ours: config[name] for name, ours in _HANDLED.items() if name in config}
    if (named := fields.get("activation", "gelu")) not in _ACTIVATIONS:
        raise BadInput(
            f"{where}: hidden_act must be one of {', '.join(_ACTIVATIONS)}, not "
            f"{named!r}"
        )
    fields["activation"] = _ACTIVATIONS[named]
    try:
        check_fields(EncoderSpec, fields)
        return EncoderSpec(**fields)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
