"""A base: a pretrained model as a pure function of its weights, with a head.

Its files come from one of `sources`, or the whole of it from
``python:package.module:load``, a function of the user's that returns a `Base`. Weights
are read from safetensors files only.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer

from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.io import vit
from lowrank.io.bert import family_of, spec_from_config
from lowrank.io.keymaps import Family
from lowrank.io.safetensors import Tensors, read_json
from lowrank.io.sources import locate
from lowrank.models import encoder, vision
from lowrank.models.encoder import Classifier, EncoderSpec
from lowrank.models.options import check_choice, compute_dtype
from lowrank.models.pixels import ImageInput
from lowrank.models.vision import VisionSpec
from lowrank.sharding.mesh import bring
from lowrank.sharding.partition import Place, Rule

Forward = Callable[[Any, Mapping[str, Any]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model as a pure function of its weights.

    Attributes:
      name: What the user asked for.
      apply: (params, batch) -> logits, float32, (batch, classes).
      features: (params, batch) -> pooled features, (batch, d_model).
      params: The weights, with a fresh head of zeros.
      tokenizer: A `tokenizers.Tokenizer` that neither pads nor truncates; None where
        no text is read.
      fingerprint: sha256 over the pretrained weights, whatever head, layout or dtype.
      head: Pattern of the weights that are new and hence trained whole.
      provenance: Where the weights came from: versions, hashes, license.
      spec: Its shape; None for a model that is not one of ours.
      max_length: Longest sequence it was made for, in tokens or patches.
      hf_config: Its config.json; None where there is none.
      example: Input of `apply`, arrays or shapes, if not a batch of "ids" and "mask".
      images: How images become its input, as "pixels"; None where none are read.
      partition: How its weights are split over devices; see `sharding.partition`.
    """

    name: str
    apply: Forward
    features: Forward
    params: Any
    tokenizer: Any
    fingerprint: str
    max_length: int
    head: str = "head/**"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spec: EncoderSpec | VisionSpec | None = None
    hf_config: Mapping[str, Any] | None = None
    example: Any = None
    images: ImageInput | None = None
    partition: Sequence[Rule] = ()

    @property
    def outputs(self) -> Forward:
        """What a loss reads: the logits."""
        return self.apply


def load(
    base: str,
    *,
    num_classes: int,
    pooling: str = "mean",
    scan: bool = True,
    remat: str = "none",
    dtype: str = "float32",
    cache: str | Path | None = None,
    place: Place | None = None,
) -> Base:
    """Loads a base and gives it a head of zeros for `num_classes`.

    Args:
      base: Where it comes from; see `sources`, and the module's docstring.
      num_classes: Width of the head.
      pooling: "mean", "cls" or "pooler" of texts, "mean", "cls" or "both" of images;
        see `encoder.Classifier` and `vision.Classifier`.
      scan: Whether layers are one stacked leaf per weight.
      remat: "none", "full" or "dots"; see `Encoder`.
      dtype: Compute dtype; weights are float32 in any case.
      cache: Folder for downloads; by default $LOWRANK_CACHE or ~/.cache/lowrank.
      place: Says where weights of files lie; see `sharding.partition.placing`.

    Raises:
      BadInput: The name, the files, their hashes or an option are wrong.
      CannotWrite: The cache cannot be written.
    """
    options = {"pooling": pooling, "scan": scan, "remat": remat, "dtype": dtype}
    kind, _, rest = base.partition(":")
    if kind == "python":
        return _from_python(base, rest, num_classes, options)
    folder, provenance = locate(base, cache)
    return _from_folder(base, folder, provenance, num_classes, options, place)


def read_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `file`, without the padding and truncation it may ship with.

    Raises:
      BadInput: Missing, unreadable, or with ids beyond the embedding.
    """
    if not file.is_file():
        raise BadInput(f"{file} is missing; write it with tokenizer.save_pretrained")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        # Shipped settings pad every text to one length: eight times the work, unasked.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        around = tokenizer.encode("").ids  # A template may add ids of its own.
    # The package raises bare `Exception` for whatever is wrong with the file.
    except Exception as error:
        raise BadInput(f"{file} is not a readable tokenizer: {error}") from error
    largest = max([*tokenizer.get_vocab(True).values(), *around], default=-1)
    if largest >= vocab_size:
        raise BadInput(
            f"{file} has token id {largest}, but the embedding has {vocab_size} rows; "
            "tokenizer and weights do not belong together"
        )
    return tokenizer


class _Opened(NamedTuple):
    """What a config.json and the files beside it say of a base, but its weights.

    Attributes:
      model: Batches to logits, or to features.
      one: A batch of one row.
      family: Whose names the weights have.
      told: Fields of `Base`.
    """

    model: nn.Module
    one: Mapping[str, np.ndarray]
    family: Family
    told: Mapping[str, Any]


def _of_texts(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    num_classes: int,
    options: Mapping[str, Any],
) -> _Opened:
    family = family_of(config, str(folder / "config.json"))
    pooled = any(row.path == "pooler/kernel" for row in family.rows)
    if options["pooling"] == "pooler" and not pooled:
        raise BadInput(
            f"base {name!r} is of the {family.name} kind, which has no pooler that was "
            "pretrained: set pooling to mean or cls"
        )
    shape = spec_from_config(config, str(folder / "config.json"))
    tokenizer = read_tokenizer(folder / "tokenizer.json", shape.vocab_size)
    compute_dtype(options["dtype"])
    return _Opened(
        Classifier(spec=shape, num_classes=num_classes, **options),
        {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)},
        family,
        {
            "spec": shape,
            "partition": encoder.PARTITION,
            "tokenizer": tokenizer,
            "max_length": _max_length(folder, shape),
        },
    )


def _of_images(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    num_classes: int,
    options: Mapping[str, Any],
) -> _Opened:
    shape = vit.vision_spec(config, str(folder / "config.json"))
    images = vit.image_input(folder, shape)
    compute_dtype(options["dtype"])
    check_choice(f"pooling of base {name!r}", options["pooling"], vision.Pooling)
    square = (1, images.size, images.size, images.channels)
    return _Opened(
        vision.Classifier(spec=shape, num_classes=num_classes, **options),
        {"pixels": np.zeros(square, np.float32)},
        vit.KINDS[config["model_type"]],
        {
            "spec": shape,
            "partition": vision.PARTITION,
            "tokenizer": None,
            "max_length": 1 + shape.grid**2,
            "images": images,
            "example": {"pixels": jax.ShapeDtypeStruct(square, jnp.float32)},
        },
    )


def _from_folder(
    name: str,
    folder: Path,
    provenance: Mapping[str, Any],
    num_classes: int,
    options: Mapping[str, Any],
    place: Place | None,
) -> Base:
    config = read_json(folder / "config.json")
    seeing = config.get("model_type") in vit.KINDS
    opened = _of_images if seeing else _of_texts
    model, one, family, told = opened(name, folder, config, num_classes, options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    leaves, structure = flatten(shapes)
    places = place(leaves, told["partition"]) if place else None
    with Tensors(folder) as tensors:
        given = tensors.shapes, tensors.read
        filled, fingerprint, ignored = family.from_hf(
            *(vit.matrices(*given) if seeing else given),
            shapes,
            where=str(folder),
            places=places,
        )
    head = {path: leaf for path, leaf in leaves.items() if path not in filled}
    for path, leaf in head.items():
        zeros = np.zeros(leaf.shape, leaf.dtype)
        filled[path] = bring(zeros, (places or {}).get(path))

    def apply(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, batch)

    def features(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, batch, method="features")

    return Base(
        name=name,
        apply=apply,
        features=features,
        params=structure.unflatten(filled),
        fingerprint=fingerprint,
        provenance={**provenance, "ignored_tensors": ignored},
        hf_config=config,
        **told,
    )


def _max_length(folder: Path, shape: EncoderSpec) -> int:
    file = folder / "sentence_bert_config.json"
    if not file.exists():
        return shape.max_positions
    length = read_json(file).get("max_seq_length", shape.max_positions)
    if type(length) is not int or not 0 < length <= shape.max_positions:
        raise BadInput(
            f"{file}: max_seq_length must be 1 to {shape.max_positions}, not {length!r}"
        )
    return length


def _from_python(
    name: str, target: str, num_classes: int, options: Mapping[str, Any]
) -> Base:
    module_name, _, function = target.partition(":")
    if not module_name or not function.isidentifier():
        raise BadInput(f"base {name!r} must read python:package.module:load")
    defaults = {"pooling": "mean", "scan": True, "remat": "none", "dtype": "float32"}
    if changed := [key for key in options if options[key] != defaults[key]]:
        raise BadInput(
            f"base {name!r} decides {', '.join(changed)} itself; set it inside the "
            "function and leave the option out"
        )
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"base {name!r} cannot be imported: {error}. Is its package installed in "
            f"{sys.prefix}, or its folder on PYTHONPATH?"
        ) from error
    if isinstance(result := found(num_classes=num_classes), Base):
        return result
    found = type(result).__name__
    raise BadInput(f"base {name!r} must return a lowrank.io.hub.Base, not {found}")
