"""Files that are whole or absent, and directories that have one writer.

A run may be killed between any two instructions. A reader then finds the old file or
the new one, never half of one: what is written goes to a temporary name, is flushed
to the disk and is renamed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from lowrank.core.errors import BadInput, CannotWrite, Corrupt
from lowrank.track.jsonl import encode_number

LOCK_NAME = ".lock"
#: How often, and after how long, the name of a lock's holder is looked for.
_LOOKS, _LOOK_SECONDS = 20, 0.05
#: The names of files and folders that are not whole yet.
_UNFINISHED = re.compile(r"\.[a-z0-9_]{8}\..+\.tmp")


def now() -> str:
    """The time in UTC, as ISO 8601 text with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def local_path(directory: str | os.PathLike[str]) -> Path:
    """`directory` as an absolute path, since Orbax writes elsewhere without one.

    Raises:
      BadInput: It is a URL; renames and locks need a file system.
    """
    if "://" in os.fspath(directory):
        raise BadInput(
            "a run directory is a path on a file system, not "
            f"{os.fspath(directory)!r}. Write locally (or to a "
            "mounted bucket) and copy afterwards."
        )
    return Path(directory).expanduser().absolute()


def unused(base: str) -> Path:
    """The first of ``<base>-1``, ``<base>-2``, ... that does not exist."""
    number = 1
    while os.path.lexists(f"{base}-{number}"):
        number += 1
    return Path(f"{base}-{number}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls `write` on a temporary file beside `path`, then renames it to `path`.

    Raises:
      CannotWrite: The file system refused; what `path` held before is still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_suffix(path), ".", path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of a cache, filled by `fill` in a place beside it: whole, or not there.

    Raises:
      CannotWrite: The cache cannot be written.
    """
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
        try:
            fill(partial)
            try:
                os.rename(partial, folder)
            except OSError:
                # Another process was first.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CannotWrite(f"cannot write the cache {cache}: {error}") from error
    return folder


def unfinished_folder(path: Path) -> Path:
    """Makes a folder beside `path`, for what is to be renamed to `path` when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(_suffix(path), ".", path.parent))


def remove_unfinished(directory: Path) -> None:
    """Removes files and folders that killed writers left half-made, at any depth.

    For the holder of the directory's lock: nobody else is writing there.
    """
    for path in list(directory.rglob(".*.tmp")):
        # What cannot be removed harms nobody: no reader knows the name.
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()
        elif _UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _suffix(path: Path) -> str:
    return f".{path.name}.tmp"


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error for a file system that refused `path`, with what to do about it."""
    return CannotWrite(
        f"cannot write {path}: {error.strerror or error}. Free space or file "
        "permissions on that file system, or choose another run directory."
    )


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes `value` as strict JSON; see `jsonable` for what it may hold."""
    text = json.dumps(jsonable(value, path.name), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      Corrupt: The file is not there, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Corrupt(
            f"{path} cannot be read as JSON: {error}. Restore it from a copy, or "
            "start over with force=true."
        ) from error


def jsonable(value: Any, where: str) -> Any:
    """`value` as JSON types: NumPy scalars as numbers, NaN and infinities as text.

    Raises:
      BadInput: Something in it is not a mapping, a sequence, text or one number.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return encode_number(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise BadInput(
        f"{where} is {type(value).__name__}, which JSON cannot hold. Convert it to "
        "numbers first, or save it with the arrays."
    )


def probe(directory: Path) -> None:
    """Makes `directory` and writes to it once, so that trouble shows before training.

    Raises:
      CannotWrite: It cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"probe")
            file.flush()
    except OSError as error:
        raise cannot_write(directory, error) from error


def move_aside(path: Path, last: str) -> Path:
    """Moves the content of a run directory to ``<path>.old-<n>``.

    The lock and Hydra's own files stay. The file called `last` goes last: a process
    that is killed in between leaves a directory that says whose it is.

    Raises:
      CannotWrite: The file system refused.
    """
    aside = unused(f"{path}.old")
    try:
        aside.mkdir()
        entries = [
            entry
            for entry in path.iterdir()
            if entry.name not in (LOCK_NAME, ".hydra") and entry.suffix != ".log"
        ]
        for entry in sorted(entries, key=lambda entry: entry.name == last):
            entry.rename(aside / entry.name)
    except OSError as error:
        raise cannot_write(aside, error) from error
    return aside


class Lock:
    """The right to write one directory, held until `release` or the process's end.

    An advisory `flock`: the kernel drops it when the process dies in whatever way,
    so a lock is never stale. The file names its holder for the message only.
    """

    def __init__(self, directory: Path):
        """Takes the lock at once.

        Raises:
          CannotWrite: Another process (or another object of this one) holds it, or
            the file system has no locks.
        """
        self.path = directory / LOCK_NAME
        try:
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._file.close()
            raise CannotWrite(
                f"{directory} is being written by {holder}. Wait for it, stop it, or "
                "choose another run directory."
            ) from None
        except OSError as error:
            self._file.close()
            raise cannot_write(self.path, error) from error
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {now()}\n")
        self._file.flush()

    def _holder(self) -> str:
        """Who holds it, who says so a moment after it does."""
        for _ in range(_LOOKS):
            self._file.seek(0)
            if named := " ".join(self._file.read().split()):
                return named
            time.sleep(_LOOK_SECONDS)
        return "an unnamed process"

    def release(self) -> None:
        """Gives the directory up; safe to call twice."""
        self._file.close()
