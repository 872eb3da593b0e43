"""Reads the weights of a Hugging Face folder, tensor by tensor, trusting nothing.

A folder holds either `model.safetensors`, or shards and `model.safetensors.index.json`
that says which shard holds which tensor. Files are opened by the official
`safetensors` package only: it checks that header, offsets, shapes and file size agree.
It does not check names, dtypes, values, or the index; that is done here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lowrank.core.errors import BadInput, UnknownName, nearest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_TENSORS = 100_000
MAX_INDEX_BYTES = 64 * 2**20
_ALIGNMENT = 64
#: How the file format spells the dtypes that are read as weights.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,300}")
_SHARD = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors")


class Tensors:
    """The tensors of a checkpoint by name; shapes at once, values when asked for.

    A context manager: its files are open until the end of the ``with`` block.

    Attributes:
      shapes: Tensor name -> shape, over all files.
      folder: Where the files lie.
    """

    def __init__(self, folder: str | Path):
        """Opens the checkpoint in `folder` and checks names and index.

        Raises:
          BadInput: No checkpoint or two of them, an unreadable or truncated file, a
            tensor that is in two files, or an index that disagrees with the files.
        """
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._homes: dict[str, Path] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[Path, Any] = {}
        try:
            wanted = _shards(self.folder)
            for file in sorted({*wanted.values()} or {self.folder / SINGLE}):
                self._add(file)
            if wanted:
                self._compare(wanted)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, in the dtype that the file stores.

        Raises:
          UnknownName: There is no such tensor.
          BadInput: It is not a float tensor, or holds NaN or infinity.
        """
        if name not in self._homes:
            raise UnknownName(
                f"{self.folder} holds no tensor {name!r}. Nearest: "
                f"{nearest(name, self._homes)}."
            )
        home = self._homes[name]
        if self._dtypes[name] not in FLOATS:
            raise BadInput(
                f"a weight must be one of {', '.join(FLOATS)}; {name!r} in {home} is "
                f"{self._dtypes[name]}. Quantized and integer checkpoints are not "
                "read: use the float release of this model."
            )
        try:
            value = self._files[home].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"cannot read {name!r} in {home}: {error}") from error
        if not np.isfinite(value).all():
            raise BadInput(
                f"{name!r} in {home} holds NaN or infinity; the checkpoint is damaged "
                "or its training diverged. Fetch it again, or use another one."
            )
        return value

    def close(self) -> None:
        """Closes the files. Idempotent."""
        for handle in self._files.values():
            handle.__exit__(None, None, None)
        self._files.clear()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _add(self, file: Path) -> None:
        try:
            handle = safe_open(str(file), framework="numpy").__enter__()
            self._files[file] = handle
            names = list(handle.keys())
        except FileNotFoundError:
            raise BadInput(
                f"{file} does not exist, though the checkpoint needs it. Fetch the "
                "folder again, completely."
            ) from None
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{file} is not a readable safetensors file: {error}. It is truncated "
                "or damaged: fetch it again."
            ) from error
        if len(self.shapes) + len(names) > MAX_TENSORS:
            raise BadInput(f"{file} names more than {MAX_TENSORS} tensors; refused")
        for name in names:
            if not _NAME.fullmatch(name):
                raise BadInput(f"{file} holds a tensor with the odd name {name[:80]!r}")
            if name in self._homes:
                raise BadInput(
                    f"tensor {name!r} is in two files, {self._homes[name].name} and "
                    f"{file.name}; a checkpoint holds every tensor once"
                )
            piece = handle.get_slice(name)
            self._homes[name] = file
            self._dtypes[name] = piece.get_dtype()
            self.shapes[name] = tuple(piece.get_shape())

    def _compare(self, wanted: Mapping[str, Path]) -> None:
        wrong = sorted(
            name
            for name in {*wanted, *self._homes}
            if wanted.get(name) != self._homes.get(name)
        )
        if wrong:
            raise BadInput(
                f"{self.folder / INDEX} and its shards disagree about {len(wrong)} "
                f"tensors: {', '.join(wrong[:20])}. Fetch index and shards again."
            )


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that begins where XLA wants one, so that it need not be copied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def in_order(content: bytes) -> bytes:
    """The same file with its metadata by name; the package puts them in by chance."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def write_tensors(
    file: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes tensors as float32, one after another; only one is held.

    Args:
      file: Open for writing, at its begin.
      shapes: Name -> shape, in the order of the file.
      read: Gives the values of one.

    Raises:
      BadInput: Values are not finite, or of another shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        offsets = [start, end]
        header[name] = {"dtype": "F32", "shape": [*shape], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Values begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        value = np.ascontiguousarray(read(name), "<f4")
        if value.shape != tuple(shape):
            raise BadInput(f"{name} is {value.shape}, and was to be {tuple(shape)}")
        if not np.isfinite(value).all():
            raise BadInput(
                f"{name} holds values that are not finite; nothing is written. Take an "
                "earlier state, or sound weights."
            )
        file.write(value.data)


def read_json(file: str | Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
      BadInput: There is no such file, it is very large, or it holds no JSON object.
    """
    file = Path(file)
    try:
        if file.stat().st_size > MAX_INDEX_BYTES:
            raise BadInput(f"{file} is larger than {MAX_INDEX_BYTES} bytes; refused")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{file.parent} has no {file.name}. A base is a folder with config.json, "
            f"tokenizer.json and {SINGLE} (or shards and an index)."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> file as the index has it; empty where there is a single file."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; a base is a folder with its files")
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise BadInput(
            f"{folder} holds both {SINGLE} and {INDEX}, which may differ; remove one"
        )
    if single.exists():
        return {}
    if not index.exists():
        raise BadInput(
            f"{folder} holds neither {SINGLE} nor {INDEX}. Pickled checkpoints (.bin, "
            ".pt) can run code and are not read: convert them with the safetensors "
            "package."
        )
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{index} must have a 'weight_map' from tensor to shard")
    for name, shard in table.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise BadInput(
                f"{index} puts tensor {name[:80]!r} into {shard!r}; a shard is a "
                "plain *.safetensors name in the same folder"
            )
    return {name: folder / shard for name, shard in table.items()}
