"""TFDS builder of the user's own files, checked across splits before it is prepared."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.data.builders.files import SUFFIXES, Columns
from lowrank.data.splits import Split

SPLITS = ("train", "validation", "test")
#: Stems of files in a folder, by split.
STEMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_SHOWN = 5


class Table(tfds.core.GeneratorBasedBuilder):
    """Rows of the user's files as a TFDS data set.

    Features: `id`, `text`, `label` and, where there are such, `group` and `pair`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    # Where TFDS looks for checksums of downloads; nothing is downloaded here.
    code_path = None

    def __init__(
        self,
        *,
        columns: Mapping[str, Columns] | None = None,
        classes: Sequence[str] = (),
        **kwargs: Any,
    ):
        self._columns = dict(columns or {})
        self._classes = list(classes)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            "id": tfds.features.Text(),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=self._classes),
        }
        if _grouped(self._columns):
            features["group"] = tfds.features.Text()
        if any(one.pairs is not None for one in self._columns.values()):
            features["pair"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Rows of the user's own files.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("text", "label"),
            # Keeps the order, which is part of the fingerprint of the data.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {s: self._generate_examples(s, c) for s, c in self._columns.items()}

    def _generate_examples(self, split: str, columns: Columns) -> Iterator[Any]:
        for number, text in enumerate(columns.texts):
            row = {
                "id": columns.ids[number] if columns.ids else f"{split}/{number}",
                "text": text,
                "label": columns.labels[number],
            }
            if _grouped(self._columns) and columns.groups is not None:
                row["group"] = columns.groups[number]
            if columns.pairs is not None:
                row["pair"] = columns.pairs[number]
            yield number, row

    def _post_download_and_prepare_hook(self) -> None:
        # TFDS keeps builders in a cache for good; the rows need not stay with them.
        self._columns = {}


def _grouped(columns: Mapping[str, Columns]) -> bool:
    return bool(columns) and all(one.groups is not None for one in columns.values())


def check_columns(columns: Mapping[str, Columns]) -> tuple[str, ...]:
    """Checks the splits against each other; returns the class names in order.

    Whole numbers are ordered as numbers, other names alphabetically.

    Raises:
      BadInput: An id occurs twice, a label of another split is unknown to train, or
        there is one class only.
    """
    unique_ids(columns)
    known = Counter(columns["train"].labels)
    for split, one in columns.items():
        unknown = [n for n, label in enumerate(one.labels) if label not in known]
        if unknown:
            shown = ", ".join(
                f"{one.labels[n]!r} at {one.places[n]}" for n in unknown[:_SHOWN]
            )
            raise UnknownName(
                f"{len(unknown)} rows of the {split} split have a label that the train "
                f"split lacks: {shown}. Nearest to the first: "
                f"{nearest(one.labels[unknown[0]], known)}. Correct it, or add rows to "
                "train."
            )
    if len(known) < 2:
        raise BadInput(
            f"the train split has one class only, {next(iter(known))!r}; there is "
            "nothing to tell apart. Is data.label the right column?"
        )
    if all(name.lstrip("-").isascii() and name.lstrip("-").isdigit() for name in known):
        return tuple(sorted(known, key=lambda name: (int(name), name)))
    return tuple(sorted(known))


def unique_ids(columns: Mapping[str, Columns]) -> None:
    """Refuses ids that come twice, in one split or in two."""
    seen: dict[str, str] = {}
    doubles: list[str] = []
    for one in columns.values():
        for name, place in zip(one.ids or (), one.places, strict=False):
            if name in seen:
                doubles.append(f"{name!r} at {seen[name]} and {place}")
            else:
                seen[name] = place
    if doubles:
        raise BadInput(
            f"{len(doubles)} ids occur twice: {'; '.join(doubles[:_SHOWN])}. Ids are "
            "unique over all splits; leave data.id out to have rows numbered."
        )


def as_splits(
    read: Mapping[str, Columns],
) -> tuple[dict[str, Split], dict[str, str]]:
    """Rows whose labels are no classes.

    Returns:
      The texts by split, with labels of zero; and the label of every row, by its id.

    Raises:
      BadInput: An id comes twice.
    """
    unique_ids(read)
    splits, labels = {}, {}
    for split, columns in read.items():
        ids = columns.ids or [f"{split}/{n}" for n in range(len(columns.texts))]
        splits[split] = Split(
            tuple(ids),
            tuple(columns.texts),
            np.zeros(len(ids), np.int32),
            tuple(columns.groups) if columns.groups else None,
            tuple(columns.pairs) if columns.pairs else None,
        )
        labels |= dict(zip(ids, columns.labels, strict=True))
    return splits, labels


def locate(
    path: str | None,
    given: Mapping[str, Sequence[str]],
    name: str = "table",
    suffixes: Sequence[str] = tuple(SUFFIXES),
) -> dict[str, list[Path]]:
    """The files of each split.

    Args:
      path: A file, which is then the train split, or a folder: files given are looked
        up in it, and without any given those called train, validation and test.
      given: split -> files; empty where only `path` says.
      name: Of the source of data, for messages.
      suffixes: Of the files that are looked for in a folder.

    Returns:
      {split: files}, with train, without splits that have no file.

    Raises:
      BadInput: Nothing is given, a file is missing, or a file is in two splits.
    """
    base = Path(path).expanduser() if path is not None else Path()
    if path is not None and not base.exists():
        raise BadInput(
            f"data.path = {path!r} does not exist (looked in {Path.cwd()}); give the "
            "path of a file, or of a folder with train.csv and test.csv"
        )
    found: dict[str, list[Path]] = {}
    if any(given.values()):
        if base.is_file():
            given = {**given, "train": [str(base.absolute()), *given["train"]]}
            base = Path()
        for split in SPLITS:
            files = [base / Path(name).expanduser() for name in given[split]]
            if files:
                found[split] = files
    elif path is None:
        remedy = " or data.train=" if given else ""
        raise BadInput(f"data={name} needs data.path={remedy}")
    elif base.is_file():
        found["train"] = [base]
    else:
        found = _in_folder(base, suffixes)
    if "train" not in found:
        remedy = "say data.train= or data.path=" if given else "name one of them so"
        raise BadInput(f"data={name} has no train file among its files: {remedy}")
    _check_files(found)
    return found


def contents(
    found: Mapping[str, Sequence[Path]],
) -> dict[str, list[tuple[Path, bytes]]]:
    """What the files of each split hold, read once."""
    return {
        split: [(path, path.read_bytes()) for path in paths]
        for split, paths in found.items()
    }


def hashes(
    read: Mapping[str, Sequence[tuple[Path, bytes]]],
) -> dict[str, list[dict[str, str]]]:
    """Name and sha256 of every file of each split: where rows came from."""
    return {
        split: [
            {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in pairs
        ]
        for split, pairs in read.items()
    }


def _in_folder(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for split, stems in STEMS.items():
        files = sorted(
            file
            for file in folder.iterdir()
            if file.stem.lower() in stems and file.suffix.lower() in suffixes
        )
        if len(files) > 1:
            raise BadInput(
                f"{folder} has {len(files)} files for the {split} split: "
                f"{', '.join(file.name for file in files)}. Say data.{split}= which."
            )
        if files:
            found[split] = files
    if "train" not in found:
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:_SHOWN])
        raise BadInput(
            f"{folder} holds no train file (train.csv, train.jsonl, train.parquet); it "
            f"holds {names or 'nothing'}. Say data.train="
        )
    return found


def _check_files(found: Mapping[str, Sequence[Path]]) -> None:
    seen: dict[Path, str] = {}
    for split, files in found.items():
        for file in files:
            if not file.is_file():
                raise BadInput(
                    f"data.{split}: {file} is not a file (looked in {Path.cwd()})"
                )
            if (real := file.resolve()) in seen:
                raise BadInput(
                    f"{file} is given for the {seen[real]} split and for the {split} "
                    "split; a file belongs to one"
                )
            seen[real] = split
