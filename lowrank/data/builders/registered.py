"""Data sets that others made for TFDS: opened by name, prepared if allowed, read."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lowrank.core.errors import BadInput, CannotWrite, UnknownName, nearest
from lowrank.data.store import FILE_FORMAT, locked, quiet, read_split

logger = logging.getLogger(__name__)

#: Folders that TFDS leaves behind when it is killed while preparing.
_INCOMPLETE = "**/incomplete.*"


def open_builder(
    dataset: str, config: str | None, version: str | None, root: Path, may_prepare: bool
) -> tfds.core.DatasetBuilder:
    """A prepared builder.

    Args:
      dataset: Name of the data set.
      config: Its config.
      version: Its version.
      root: TFDS's `data_dir`.
      may_prepare: Whether to download and prepare what is not there.

    Raises:
      BadInput: The data set is unknown, is prepared in another format, is not
        prepared and may not be, or its preparation failed.
      CannotWrite: `root` cannot be written.
    """
    name = "/".join(part for part in (dataset, config) if part)
    name = f"{name}:{version}" if version else name
    builder = _open(dataset, name, root)
    if not builder.is_prepared():
        if not may_prepare:
            raise BadInput(
                f"data set {name!r} is not prepared in {root}; prepare it there with "
                f"file_format={FILE_FORMAT!r}, or allow it with data.prepare=true"
            )
        builder.info.set_file_format(FILE_FORMAT, override=True)
        _prepare(builder, name, root, dataset)
        # Another process may have prepared it while this one waited.
        builder = _open(dataset, name, root)
    found = builder.info.file_format
    if found is None or found.value != FILE_FORMAT:
        raise BadInput(
            f"data set {name!r} in {root} is prepared as {found and found.value}; "
            f"prepare it again with file_format={FILE_FORMAT!r} in another data.path"
        )
    return builder


def _open(dataset: str, name: str, root: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UnknownName(
            f"TFDS knows no data set {name!r}. Nearest: {nearest(dataset, known)}. A "
            "data set of your own is imported first, with plugins=[module]."
        ) from None
    except Exception as error:
        # Builders of others may fail in any way.
        raise BadInput(
            f"TFDS cannot open {name!r}: {type(error).__name__}: {error}"
        ) from error


def _prepare(
    builder: tfds.core.DatasetBuilder, name: str, root: Path, dataset: str
) -> None:
    with locked(root, dataset):
        for left in (root / dataset).glob(_INCOMPLETE):
            logger.warning("removing %s, left by a killed preparation", left)
            shutil.rmtree(left)
        try:
            with quiet():
                builder.download_and_prepare()
        except OSError as error:
            raise CannotWrite(
                f"data set {name!r} cannot be prepared in {root}: {error}"
            ) from error
        except Exception as error:
            # As above.
            raise BadInput(
                f"TFDS cannot prepare {name!r}: {type(error).__name__}: {error}"
            ) from error


def read_builder(
    builder: tfds.core.DatasetBuilder,
    splits: Mapping[str, str | None],
    columns: Mapping[str, str],
) -> tuple[tuple[str, ...], dict[str, dict[str, list]]]:
    """Class names and columns of the splits wanted.

    Args:
      builder: Prepared.
      splits: Our name -> theirs; None for the one of our name, if there is one.
      columns: "text", "label", and perhaps "id", "group" and "pair" -> feature.

    Raises:
      UnknownName: No such split or feature.
      BadInput: The label is no ClassLabel, or a feature is no text.
      Corrupt: A file is damaged.
    """
    features: Any = builder.info.features
    for ours, theirs in columns.items():
        if theirs not in features:
            raise UnknownName(
                f"{builder.info.full_name} has no feature {theirs!r}. Nearest: "
                f"{nearest(theirs, features)}. Say which with data.{ours}=; it has "
                f"{', '.join(features)}."
            )
    label = features[columns["label"]]
    if not isinstance(label, tfds.features.ClassLabel):
        raise BadInput(
            f"feature {columns['label']!r} of {builder.info.full_name} is a "
            f"{type(label).__name__}, not a ClassLabel; write the rows to a file and "
            "use data=table"
        )
    found: dict[str, dict[str, list]] = {}
    for ours, given in splits.items():
        theirs = given or ours
        if theirs in builder.info.splits:
            found[ours] = read_split(builder, theirs, columns)
        elif given is not None:
            raise UnknownName(
                f"{builder.info.full_name} has no split {theirs!r}. Nearest: "
                f"{nearest(theirs, builder.info.splits)}. Say which with data.{ours}=."
            )
    for ours in set(columns) - {"label"}:
        for split, values in found.items():
            found[split][ours] = [_text(value, columns[ours]) for value in values[ours]]
    return tuple(label.names), found


def _text(value: object, feature: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    raise BadInput(f"feature {feature!r} holds a {type(value).__name__}, not text")
