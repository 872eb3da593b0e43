"""A causal decoder as a base: its weights, its tokenizer, and how it is spoken to."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.io.decoder_configs import KINDS, spec_from_config
from lowrank.io.hub import read_tokenizer
from lowrank.io.keymaps import Family
from lowrank.io.safetensors import Tensors, read_json
from lowrank.io.sources import locate
from lowrank.models.decoder import PARTITION, Cache, LanguageModel, empty_cache
from lowrank.models.decoder_spec import DecoderSpec
from lowrank.models.head import MOST_LOGITS
from lowrank.models.options import compute_dtype
from lowrank.sharding.partition import Place, Rule


@dataclasses.dataclass(frozen=True)
class Language:
    """A pretrained language model as pure functions of its weights.

    Attributes:
      name: What the user asked for.
      apply: (params, batch) -> logits, (batch, seq, vocab).
      scores: (params, batch) -> what losses need of every token; see `models.head`.
      read: (params, batch, cache) -> logits, and the cache with what was read.
      params: The weights.
      tokenizer: A `tokenizers.Tokenizer` that neither pads nor truncates.
      fingerprint: sha256 over the weights, whatever layout or dtype.
      spec: Its shape.
      family: Names of its weights.
      max_length: Longest sequence it was made for, in tokens.
      end: Tokens that end an answer.
      begin: The token that every text begins with; None: none does.
      chat_template: How messages become text, a Jinja template; None: not at all.
      dtype: Compute dtype.
      provenance: Where the weights came from: versions, hashes, license.
      hf_config: Its config.json.
    """

    name: str
    apply: Callable[[Any, Mapping[str, Any]], Array]
    scores: Callable[[Any, Mapping[str, Any]], Mapping[str, Array]]
    read: Callable[[Any, Mapping[str, Any], Cache], tuple[Array, Cache]]
    params: Any
    tokenizer: Any
    fingerprint: str
    spec: DecoderSpec
    family: Family
    max_length: int
    end: tuple[int, ...]
    begin: int | None
    chat_template: str | None
    dtype: str
    provenance: Mapping[str, Any]
    hf_config: Mapping[str, Any]

    @property
    def partition(self) -> Sequence[Rule]:
        """How its weights are split over devices; see `sharding.partition`."""
        return PARTITION

    @property
    def head(self) -> None:
        """No weight of it is new."""

    @property
    def outputs(self) -> Callable[[Any, Mapping[str, Any]], Mapping[str, Array]]:
        """What a loss reads: the scores."""
        return self.scores

    def cache(self, batch: int, places: int) -> Cache:
        """An empty cache of keys with room for `places` tokens in every row."""
        return empty_cache(self.spec, batch, places, self.dtype)


def load(
    base: str,
    *,
    scan: bool = True,
    remat: str = "none",
    dtype: str = "float32",
    precision: str | None = None,
    cache: str | Path | None = None,
    parts: int = 1,
    place: Place | None = None,
) -> Language:
    """Loads a causal decoder.

    Args:
      base: Where it comes from; see `sources`.
      scan: Whether layers are one stacked leaf per weight.
      remat: "none", "full" or "dots"; see `encoder.Encoder`.
      dtype: Compute dtype; weights are float32 in any case.
      precision: Of every product; "highest" for comparisons, None for speed.
      cache: Folder for downloads; by default $LOWRANK_CACHE or ~/.cache/lowrank.
      parts: Devices between which logits are split: so many times as many may exist.
      place: Says where weights lie; see `sharding.partition.placing`.

    Raises:
      BadInput: The name, the files, their hashes or an option are wrong, or it is not
        a decoder that this package knows.
      CannotWrite: The cache cannot be written.
    """
    compute_dtype(dtype)
    folder, provenance = locate(base, cache)
    config = read_json(folder / "config.json")
    if (kind := config.get("model_type")) not in KINDS:
        raise BadInput(
            f"{folder / 'config.json'} is of type {kind!r}; decoders are "
            f"{', '.join(KINDS)}"
        )
    shape, family = spec_from_config(config, str(folder / "config.json"))
    tokenizer = read_tokenizer(folder / "tokenizer.json", shape.vocab_size)
    options = (scan, remat, dtype, precision, parts * MOST_LOGITS)
    model = LanguageModel(shape, *options)
    one = {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    places = place(flatten(shapes)[0], PARTITION) if place else None
    with Tensors(folder) as tensors:
        filled, fingerprint, ignored = family.from_hf(
            tensors.shapes, tensors.read, shapes, where=str(folder), places=places
        )
    if shape.tied and "lm_head.weight" in ignored:
        _check_tied(folder, family)

    def apply(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, batch)

    def scores(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, batch, method="scores")

    def read(params: Any, batch: Mapping[str, Any], cache: Cache) -> Any:
        return model.apply({"params": params}, batch, cache, method="read")

    settings = _settings(folder)
    begin = settings.get("bos_token") if settings.get("add_bos_token") else None
    return Language(
        name=base,
        apply=apply,
        scores=scores,
        read=read,
        params=flatten(shapes)[1].unflatten(filled),
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        spec=shape,
        family=family,
        max_length=shape.max_positions,
        end=_ends(folder, config),
        begin=None if begin is None else tokenizer.token_to_id(begin),
        chat_template=_template(folder, settings),
        dtype=dtype,
        provenance={**provenance, "ignored_tensors": ignored},
        hf_config=config,
    )


def _check_tied(folder: Path, family: Family) -> None:
    """A head that is stored though it is the embedding must be the embedding."""
    (table,) = [
        row.tensor
        for row in family.rows
        if row.path == "decoder/embeddings/token/embedding"
    ]
    with Tensors(folder) as tensors:
        names = {name.removeprefix(family.prefix): name for name in tensors.shapes}
        head, rows = (tensors.read(names[name]) for name in ("lm_head.weight", table))
    if not np.array_equal(head, rows):
        raise BadInput(
            f"{folder}: config.json ties the head to the embedding, but lm_head.weight "
            "differs from it. Say tie_word_embeddings = false."
        )


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with tokens as text; empty if there is none."""
    file = folder / "tokenizer_config.json"
    found = read_json(file) if file.is_file() else {}
    text = lambda value: value.get("content") if isinstance(value, dict) else value
    return {name: text(value) for name, value in found.items()}


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template}
        template = named.get("default")
    return template


def _ends(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer, as the folder says, its generation settings first."""
    file = folder / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    given = found.get("eos_token_id", config.get("eos_token_id"))
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list) else (int(given),)
