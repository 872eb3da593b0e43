"""What makes damage to a record visible: JSON with its own hash, and a list of hashes.

A flipped bit in a digit is still JSON. Files that a continuing run reads back are
sealed; all files of a finished run stand in `SHA256SUMS`, which `sha256sum -c` reads.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.core.errors import Corrupt
from lowrank.io.files import (
    jsonable,
    read_json,
    write_atomically,
    write_json_atomically,
)

SUMS = "SHA256SUMS"
#: The key under which a sealed JSON object holds the sha256 of the rest of it.
SEAL = "sha256"
#: What the sums are of. The status changes after them and is sealed; checkpoints have
#: hashes of their own; what services write is theirs.
_SUMMED = ("*.*", "predictions/*", "adapter/*", ".hydra/*")
_NOT_SUMMED = ("status.json", ".lock")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object with a hash of itself, for `read_sealed` to compare."""
    body = jsonable(value, path.name)
    write_json_atomically(path, {**body, SEAL: _seal(body)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote: one flipped digit does not go unseen.

    Raises:
      Corrupt: The file is not there, is not JSON, or its hash does not fit.
    """
    value = read_json(path)
    stored = value.pop(SEAL, None) if isinstance(value, dict) else None
    if stored is None or stored != _seal(value):
        raise Corrupt(
            f"{path} does not have the sha256 it was written with: it is damaged, or "
            "was edited. Restore it from a copy, or start over with force=true."
        )
    return value


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text.

    Raises:
      Corrupt: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error


def check_sum(path: Path, name: str) -> None:
    """Compares a file of a finished run with the hash it was finished with.

    Raises:
      Corrupt: It differs, is gone, or is there and not listed.
    """
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{path / SUMS} cannot be read: {error}. Restore it from a copy."
        ) from error
    expected = {line[66:]: line[:64] for line in lines}.get(name)
    if expected is None and not (path / name).exists():
        return
    found = sha256_of(path / name)
    if found != expected:
        raise Corrupt(
            f"{path / name} has sha256 {found} and {SUMS} says {expected}: it is "
            "damaged, or was edited. Restore it from a copy, or start over with "
            "force=true."
        )


def write_sums(path: Path, last: str, content: bytes) -> None:
    """Lists the hashes of a run's files, before its last one is written.

    Args:
      path: The run directory.
      last: Name of the file that will follow.
      content: What it will hold.

    Raises:
      CannotWrite: The file system refused.
    """
    names = {last: hashlib.sha256(content).hexdigest()}
    for pattern in _SUMMED:
        for file in path.glob(pattern):
            if file.is_file() and file.name not in (SUMS, *_NOT_SUMMED, last):
                names[file.relative_to(path).as_posix()] = sha256_of(file)
    text = "".join(f"{names[name]}  {name}\n" for name in sorted(names))
    write_atomically(path / SUMS, lambda file: file.write(text.encode()))
