"""Text classification tasks by name: where the rows come from and which are kept.

``data=intents`` is made by this package, ``data=table`` reads the user's files and
``data=tfds`` any data set that TFDS has prepared. All end in the same `Task`, whose
fingerprint says whether two runs saw the same rows in the same splits. The catalogue
has the other sources as well: of questions (`data.questions`, `data.gym`,
`data.choices`), of plain texts (`data.passages`), of texts with a number
(`data.numbers`) and of images (`data.images`).
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data.asked import TaskSpec
from lowrank.data.builders import files, intents, registered, table
from lowrank.data.choices import CATALOGUE as CHOICES
from lowrank.data.gym import CATALOGUE as GYM
from lowrank.data.images import CATALOGUE as IMAGES
from lowrank.data.numbers import CATALOGUE as NUMBERS
from lowrank.data.passages import CATALOGUE as PASSAGES
from lowrank.data.questions import CATALOGUE as QUESTIONS
from lowrank.data.splits import Split as Split
from lowrank.data.splits import Task as Task
from lowrank.data.splits import as_split, cut_missing
from lowrank.data.store import FILE_FORMAT, cache_folder, prepare, read


@spec
class IntentsData(TaskSpec):
    """Utterances to a home assistant with fine labels (the demonstration task).

    Attributes:
      language: A language of the package, as "en" or "pt-BR".
      seed: Which templates go to which split, and how they are expanded.
      utterances: Examples wanted of each template.
    """

    language: str = "en"
    seed: int = 0
    utterances: int = intents.DEFAULT_UTTERANCES

    def __post_init__(self) -> None:
        self.check()
        intents.config_for(self.language, self.seed, self.utterances)
        if not 1 <= self.utterances <= 1000:
            raise BadInput(
                f"data.utterances must be from 1 to 1000, not {self.utterances}"
            )

    def load(self, data_dir: Path | None = None) -> Task:
        """Prepares the data set unless that was done before, and reads it.

        Args:
          data_dir: Folder of prepared data; $LOWRANK_CACHE/data if None.

        Raises:
          BadInput: The packages of templates are missing, or of other versions.
          CannotWrite, Corrupt: See `lowrank.data.store`.
        """
        versions = intents.check_packages()
        made_from = {
            "language": self.language,
            "seed": self.seed,
            "utterances": self.utterances,
            "packages": versions,
        }
        config = intents.config_for(self.language, self.seed, self.utterances)
        folder = prepare(
            lambda folder: intents.Intents(
                config=config, data_dir=folder, file_format=FILE_FORMAT
            ),
            cache_folder("data", data_dir),
            f"intents-{self.language}",
            {**made_from, "generator": intents.generator_fingerprint()},
        )
        classes, raw = read(folder)
        return self.finish(
            f"intents/{self.language}",
            classes,
            {split: as_split(split, columns) for split, columns in raw.items()},
            {"source": "home-assistant-intents", "license": "Apache-2.0", **made_from},
        )


@spec
class TableData(TaskSpec):
    """The user's own files: CSV, JSON lines, Parquet, or plain lines.

    A file without a header line, such as ``DESC:manner How did it end ?``, is read by
    ``format=lines separator=" " header=[label,text] label_pattern="^([A-Z]+):"``.

    Attributes:
      path: A file, which is then cut into splits, or a folder with files called
        train, validation (valid, val, dev) and test.
      train: Files of the train split, looked up in `path`, if that is given.
      validation: Files of the validation split.
      test: Files of the test split.
      format: Read from the suffix if "auto". With "lines" each line is split at its
        first separators, without quotes.
      text: Column of the text.
      label: Column of the label: text or whole numbers.
      id: Column of the row's name, unique over all splits.
      group: Column of what makes rows dependent, as their document; no group is cut
        through.
      pair: Column of a second text, where two are judged together.
      encoding: Of the text files.
      separator: Between columns; a comma, or a tab in a .tsv file, if None.
      header: Column names of a file that does not begin with them.
      label_pattern: Regular expression whose one group becomes the label.
      validation_share: Part of train that is cut off where no validation is given.
      test_share: Part of train that is cut off, first, where no test is given.
      seed: Which rows are cut off.
    """

    path: str | None = None
    train: str | Sequence[str] | None = None
    validation: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    format: Literal["auto", "csv", "jsonl", "parquet", "lines"] = "auto"
    text: str = "text"
    label: str = "label"
    id: str | None = None
    group: str | None = None
    pair: str | None = None
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    separator: str | None = None
    header: Sequence[str] | None = None
    label_pattern: str | None = None
    validation_share: float = 0.15
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        self.check()
        self.reading()

    def reading(self) -> files.Reading:
        """How the files are read."""
        header = None if self.header is None else tuple(self.header)
        names = {field.name for field in dataclasses.fields(files.Reading)}
        own = names - {"header", "numbers"}
        return files.Reading(
            **{name: getattr(self, name) for name in own}, header=header
        )

    def load(self, data_dir: Path | None = None) -> Task:
        """Reads, checks and prepares the files, unless that was done before.

        What was prepared belongs to the content of the files: a changed file is
        another data set.

        Args:
          data_dir: Folder of prepared data; $LOWRANK_CACHE/data if None.

        Raises:
          BadInput: A file or a row is wrong; see `builders.files` and
            `builders.table`.
          CannotWrite, Corrupt: See `lowrank.data.store`.
        """
        given = {
            split: _as_list(getattr(self, split)) for split in ("train", *_OPTIONAL)
        }
        contents = table.contents(table.locate(self.path, given))
        sources = table.hashes(contents)
        reading = self.reading()

        def builder(folder: Path) -> table.Table:
            columns = {
                split: files.read_columns(pairs, reading)
                for split, pairs in contents.items()
            }
            classes = table.check_columns(columns)
            return table.Table(
                columns=columns,
                classes=classes,
                data_dir=folder,
                file_format=FILE_FORMAT,
            )

        folder = prepare(
            builder,
            cache_folder("data", data_dir),
            "table",
            {
                "version": str(table.Table.VERSION),
                # Suffixes choose the format.
                "files": sources,
                "reading": dataclasses.asdict(reading),
            },
        )
        classes, raw = read(folder)
        splits = {split: as_split(split, columns) for split, columns in raw.items()}
        splits, notes = cut_missing(
            splits, self.validation_share, self.test_share, self.seed
        )
        name = Path(self.path or sources["train"][0]["file"]).stem
        notes = {"source": "files", "files": sources, **notes}
        return self.finish(f"table/{name}", classes, splits, notes)


@spec
class TfdsData(TaskSpec):
    """A data set of TFDS, prepared as array_record.

    Attributes:
      dataset: Its name.
      config: Its config, if it has several.
      version: Its version; the newest if None.
      path: Folder of prepared data sets, as TFDS's `data_dir`; the cache if None.
      prepare: Whether TFDS may download and prepare it where that was not done.
      train: The split to train on.
      validation: The validation split; cut off train if None and there is none of
        that name.
      test: The test split; likewise.
      text: Feature with the text.
      label: Feature with the label, a ClassLabel.
      id: Feature with the row's name, or None.
      group: Feature with the group, or None.
      pair: Feature with a second text, or None.
      validation_share: Part of train that is cut off for a missing validation split.
      test_share: Part of train that is cut off, first, for a missing test split.
      seed: Which rows are cut off.
    """

    dataset: str
    config: str | None = None
    version: str | None = None
    path: str | None = None
    prepare: bool = True
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    label: str = "label"
    id: str | None = None
    group: str | None = None
    pair: str | None = None
    validation_share: float = 0.15
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        self.check()

    def load(self, data_dir: Path | None = None) -> Task:
        """Opens the data set, prepares it if it may, and reads it.

        Args:
          data_dir: Folder of prepared data; $LOWRANK_CACHE/data if None.

        Raises:
          BadInput: No such data set, split or feature; see `builders.registered`.
          CannotWrite, Corrupt: See `lowrank.data.store`.
        """
        root = Path(self.path) if self.path else cache_folder("data", data_dir) / "tfds"
        builder = registered.open_builder(
            self.dataset, self.config, self.version, root.expanduser(), self.prepare
        )
        columns = {
            ours: theirs
            for ours in ("text", "label", "id", "group", "pair")
            if (theirs := getattr(self, ours)) is not None
        }
        wanted = {split: getattr(self, split) for split in ("train", *_OPTIONAL)}
        classes, raw = registered.read_builder(builder, wanted, columns)
        splits = {split: as_split(split, values) for split, values in raw.items()}
        splits, notes = cut_missing(
            splits, self.validation_share, self.test_share, self.seed
        )
        source = {
            "source": "tfds",
            "dataset": builder.info.full_name,
            "tensorflow-datasets": importlib.metadata.version("tensorflow-datasets"),
        }
        return self.finish(f"tfds/{self.dataset}", classes, splits, {**source, **notes})


_OPTIONAL = ("validation", "test")

CATALOGUE: dict[str, type[Any]] = {
    "intents": IntentsData,
    "table": TableData,
    "tfds": TfdsData,
    **QUESTIONS,
    **GYM,
    **CHOICES,
    **PASSAGES,
    **NUMBERS,
    **IMAGES,
}


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
