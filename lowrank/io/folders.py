"""A whole model as a Hugging Face folder, which transformers opens without us."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.io.files import cannot_write, unfinished_folder, write_atomically
from lowrank.io.keymaps import Exported
from lowrank.io.safetensors import write_tensors

#: What a base's folder has beside its weights and its config.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE",
)
INDEX = "model.safetensors.index.json"
#: Bytes of a weights file, as the hub's tools cut them.
MAX_SHARD = 5 * 10**9


def check_free(directory: Path) -> None:
    """Refuses a folder with something in it, before the work whose result it is for.

    Raises:
      BadInput: A model is not written over what is there.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BadInput(
            f"{directory} is not empty, and a model is not written over what is there; "
            "choose another folder, or remove it"
        )


def write_model(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    source: Path,
    *,
    card: str,
    max_shard: int = MAX_SHARD,
) -> Path:
    """Writes weights, config, tokenizer and card, all or nothing.

    Args:
      directory: A new folder, or an empty one.
      tensors: By their names, as `Family.to_hf` gives them; written as float32, one
        at a time.
      config: Of the base, with what has changed.
      source: The base's folder, whose tokenizer and license are copied.
      card: The text of README.md.
      max_shard: Bytes of one file; of more, there are several and an index.

    Returns:
      The folder.

    Raises:
      BadInput: The folder has something in it, or a value is not finite.
      CannotWrite: The file system refused; nothing is there then.
    """
    directory = Path(directory).absolute()
    check_free(directory)
    shapes = _shapes(tensors)
    scratch = None
    try:
        scratch = unfinished_folder(directory)
        fresh = scratch / "new"
        shards = list(_shards(shapes, max_shard))
        names = {}
        for number, own in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write = lambda to, own=own: write_tensors(to, own, tensors.__getitem__)
            write_atomically(fresh / file, write)
            names |= dict.fromkeys(own, file)
        if len(shards) > 1:
            total = sum(map(_bytes, shapes.values()))
            index = {"metadata": {"total_size": total}, "weight_map": names}
            _write(fresh / INDEX, _text(index))
        stored = {**config, "torch_dtype": "float32"}
        if "dtype" in config:
            stored["dtype"] = "float32"
        _write(fresh / "config.json", _text(stored))
        _write(fresh / "README.md", card.encode())
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, fresh / name)
        if directory.exists():
            directory.rmdir()
        fresh.rename(directory)
    except OSError as error:
        raise cannot_write(directory, error) from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _shards(
    shapes: Mapping[str, tuple[int, ...]], most: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in order, cut where a file would be larger than `most`."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        if shard and size + _bytes(shape) > most:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += _bytes(shape)
    yield shard


def _shapes(tensors: Mapping[str, np.ndarray]) -> Mapping[str, tuple[int, ...]]:
    """Shapes alone, without making a tensor that is made when it is read."""
    if isinstance(tensors, Exported):
        return tensors.shapes
    return {name: value.shape for name, value in tensors.items()}


def _bytes(shape: tuple[int, ...]) -> int:
    """Of a tensor in float32."""
    return 4 * math.prod(shape)


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
