"""Prepared data sets on disk: each is whole or absent, and is verified when read.

A data set is prepared into a temporary folder, listed in a manifest with the sha256 of
every file, and renamed. A process that is killed in between leaves a temporary folder
that the next one removes; a file that was damaged later is named, never half read.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lowrank.core.errors import BadInput, CannotWrite, Corrupt
from lowrank.core.spec import digest

logger = logging.getLogger(__name__)

#: Version of the layout of prepared folders; a part of their names.
STORE_VERSION = 1
MANIFEST = "manifest.json"
FILE_FORMAT = "array_record"
_TEMPORARY = ".preparing-"


def cache_folder(kind: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder for `kind` ("data", "tokens"): `folder`, else the user's cache.

    The user's cache is $LOWRANK_CACHE, or ~/.cache/lowrank.
    """
    if folder is not None:
        return Path(folder).expanduser().absolute()
    home = os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank"
    return Path(home).expanduser().absolute() / kind


def package_version(package: str, pinned: str, remedy: str) -> str:
    """The version of an installed package that must be exactly `pinned`.

    Raises:
      BadInput: It is not installed, or in another version.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != pinned:
        state = "is not installed" if found is None else f"has version {found}"
        raise BadInput(
            f"{package} {state}, but this data set is made from version {pinned} and "
            f"would differ: {remedy}"
        )
    return pinned


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds an exclusive lock on `name` in `folder`, waiting for other processes.

    Raises:
      CannotWrite: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise CannotWrite(
            f"cannot write the data folder {folder}: {error.strerror or error}. Point "
            "LOWRANK_CACHE (or run.cache) to a folder that can be written."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(
    make: Callable[[Path], tfds.core.DatasetBuilder],
    folder: Path,
    name: str,
    key: Mapping[str, Any],
) -> Path:
    """Prepares a data set unless that was done before, and returns its folder.

    Args:
      make: Builds the TFDS builder for a data folder. Called only if needed.
      folder: Parent of all prepared data sets.
      name: What the folder's name begins with.
      key: All that the content depends on. Another key is another folder.

    Raises:
      CannotWrite: The folder cannot be written.
    """
    label = f"{name}-{digest({'store': STORE_VERSION, **key}, 16)}"
    final = folder / label
    # Unlike `Path.is_file`, this raises nothing where the folder cannot be.
    if os.path.isfile(final / MANIFEST):
        return final
    with locked(folder, label):
        # Another process may have finished while this one waited.
        if os.path.isfile(final / MANIFEST):
            return final
        temporary = folder / f"{_TEMPORARY}{label}"
        if temporary.exists():
            logger.warning("removing %s, left by a killed preparation", temporary)
            shutil.rmtree(temporary)
        try:
            if final.exists():
                logger.warning("removing %s, which has no manifest", final)
                shutil.rmtree(final)
            temporary.mkdir()
            builder = make(temporary)
            with quiet():
                builder.download_and_prepare(download_config=_no_statistics())
            _write_manifest(temporary, builder, key)
            os.replace(temporary, final)
        except OSError as error:
            raise CannotWrite(
                f"cannot prepare {label} in {folder}: {error.strerror or error}. Free "
                "space there, or point LOWRANK_CACHE to another folder."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def read(folder: Path) -> tuple[tuple[str, ...], dict[str, dict[str, list]]]:
    """Class names and columns of every split of a folder that `prepare` made.

    Returns:
      (classes, {split: {"id" | "text" | "label" | "group": values}}); "group" only
      where the data set has one.

    Raises:
      Corrupt: A file differs from the manifest, or a row cannot be read.
    """
    manifest = _read_manifest(folder)
    for path, expected in manifest["files"].items():
        found = _sha256(folder / path, folder)
        if found != expected:
            raise Corrupt(
                f"prepared data file {folder / path} is damaged: its sha256 is {found} "
                f"and the manifest says {expected}. {_remedy(folder)}"
            )
    builder = tfds.builder_from_directory(folder / manifest["builder"])
    features: Any = builder.info.features
    names = {column: column for column in features}
    splits = {split: read_split(builder, split, names) for split in builder.info.splits}
    return tuple(features["label"].names), splits


def read_split(
    builder: tfds.core.DatasetBuilder, split: str, columns: Mapping[str, str]
) -> dict[str, list]:
    """Columns of one split, as text and whole numbers.

    Args:
      builder: A prepared builder.
      split: One of its splits.
      columns: Our name -> name of the feature.

    Raises:
      Corrupt: The number of rows is not the one prepared, a row cannot be decoded, or
        reads as None, as the rows of a file cut at a block border do.
    """
    place = f"split {split!r} in {builder.data_path}"
    expected = builder.info.splits[split].num_examples
    # TFDS decorates the method in a way that hides its parameters.
    opened: Any = builder
    try:
        source = opened.as_data_source(split)
        count = len(source)
        rows = list(source.__getitems__(range(count))) if count else []
    except Exception as error:
        # Every layer below raises its own kinds for damaged bytes.
        raise Corrupt(
            f"{place} cannot be read: {type(error).__name__}: {error}. "
            f"{_remedy(Path(builder.data_path))}"
        ) from error
    if count != expected or len(rows) != expected:
        raise Corrupt(
            f"{place} holds {count} rows of the {expected} that were prepared. "
            f"{_remedy(Path(builder.data_path))}"
        )
    table: dict[str, list] = {ours: [] for ours in columns}
    for number, row in enumerate(rows):
        for ours, theirs in columns.items():
            value = None if row is None else row[theirs]
            if value is None:
                raise Corrupt(
                    f"row {number} of {place} has no {theirs!r}: the file is cut. "
                    f"{_remedy(Path(builder.data_path))}"
                )
            if isinstance(value, bytes):
                value = value.decode("utf-8")
            table[ours].append(value)
    return table


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars and notices of TFDS off the terminal."""
    tfds.disable_progress_bar()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _no_statistics() -> tfds.download.DownloadConfig:
    return tfds.download.DownloadConfig(
        compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
    )


def _write_manifest(
    folder: Path, builder: tfds.core.DatasetBuilder, key: Mapping[str, Any]
) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "version": STORE_VERSION,
        "builder": str(Path(builder.data_path).relative_to(folder)),
        "key": dict(key),
        "files": {str(p.relative_to(folder)): _sha256(p, folder) for p in files},
    }
    with open(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=2, default=list)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return {"files": dict(manifest["files"]), "builder": str(manifest["builder"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"{folder / MANIFEST} cannot be read: {error!r}. {_remedy(folder)}"
        ) from error


def _sha256(path: Path, folder: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Corrupt(
            f"prepared data file {path} cannot be read: {error.strerror or error}. "
            f"{_remedy(folder)}"
        ) from error


def _remedy(folder: Path) -> str:
    return f"Delete {folder}; the next run prepares it again."
