"""Texts as they are, for language models: documents, and the windows they are read in.

``data=text`` reads the user's files. A document is on one side of every split; a long
one is cut into windows, and every token but its first is predicted exactly once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data.builders import files, table
from lowrank.data.splits import (
    MAX_OVERLAP,
    Split,
    Task,
    check_cut,
    cut_missing,
    make_task,
    tied,
)
from lowrank.data.talk import Spoken

#: Suffixes of files that are text and nothing else.
PLAIN = (".txt", ".md")


@spec
class TextData:
    """The user's own texts: plain files, JSON lines, CSV or Parquet.

    Attributes:
      path: A file, which is then cut into splits, or a folder with files called
        train, validation (valid, val, dev) and test.
      format: Read from the suffix if "auto"; .txt and .md are plain.
      text: Column of the text; not of plain files.
      separator: What stands between two documents of a plain file.
      validation_share: Part of train that is cut off where no validation is given.
      test_share: Part of train that is cut off, first, where no test is given.
      seed: Which documents are cut off.
    """

    kind: ClassVar[str] = "text"

    path: str
    format: Literal["auto", "plain", "csv", "jsonl", "parquet"] = "auto"
    text: str = "text"
    separator: str = "\n\n"
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut(self)
        if not self.separator:
            raise BadInput("data.separator must not be empty: it ends a document")

    def load(self, data_dir: Path | None = None) -> Task:
        """The documents, cut into splits; a task without classes.

        Args:
          data_dir: Not used: what is read is read again.

        Raises:
          BadInput: A file is missing or wrong, or there are too few documents.
        """
        del data_dir
        found = table.locate(self.path, {}, "text", (*files.SUFFIXES, *PLAIN))
        contents = table.contents(found)
        splits = {}
        for split, pairs in contents.items():
            texts = self._texts(pairs)
            ids = tuple(f"{split}/{number}" for number in range(len(texts)))
            none = np.zeros(len(texts), np.int32)
            splits[split] = Split(ids, tuple(texts), none)
        shares = self.validation_share, self.test_share, self.seed
        splits, notes = cut_missing(tied(splits, MAX_OVERLAP), *shares)
        notes = {"source": "files", "files": table.hashes(contents), **notes}
        return make_task(f"text/{Path(self.path).stem}", (), splits, notes)

    def _texts(self, contents: Sequence[tuple[Path, bytes]]) -> list[str]:
        plain = self.format == "plain" or (
            self.format == "auto" and contents[0][0].suffix.lower() in PLAIN
        )
        if plain:
            return [
                text
                for path, content in contents
                for text in documents(path, content, self.separator)
            ]
        reading = files.Reading(format=self.format, text=self.text, label=None)
        return files.read_columns(contents, reading).texts


def documents(path: Path, content: bytes, separator: str = "\n\n") -> list[str]:
    """The documents of a plain file.

    Raises:
      BadInput: It is empty, or not UTF-8.
    """
    try:
        whole = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8: byte {error.start} is "
            f"0x{content[error.start]:02x}; save it as UTF-8"
        ) from None
    found = [text.strip() for text in whole.split(separator) if text.strip()]
    if not found:
        raise BadInput(f"{path} holds no text; leave it out, or fill it")
    return found


def windows(
    tokenizer: Any,
    rows: Split,
    length: int,
    *,
    begin: int | None = None,
) -> tuple[Spoken, tuple[str, ...], tuple[str, ...]]:
    """Documents as tokens, in windows of at most `length` predicted tokens.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      rows: The documents.
      length: Most tokens that a window predicts.
      begin: The token that every text begins with; None: none does.

    Returns:
      The windows, their names, and the group of each: its document, and those that
      say the same.

    Raises:
      BadInput: No document has two tokens.
    """
    pieces: list[np.ndarray] = []
    ids: list[str] = []
    groups: list[str] = []
    first = [] if begin is None else [begin]
    # The windows of a document depend on each other.
    documents = zip(rows.ids, rows.texts, rows.groups or rows.ids, strict=True)
    for name, text, group in documents:
        own = tokenizer.encode(text, add_special_tokens=False).ids
        whole = np.array([*first, *own], np.int32)
        for number, start in enumerate(range(0, len(whole) - 1, length)):
            pieces.append(whole[start : start + length + 1])
            ids.append(f"{name}#{number}")
            groups.append(group)
    if not pieces:
        raise BadInput("no text has two tokens, so none can be predicted; give longer")
    return Spoken(tuple(pieces), (1,) * len(pieces)), tuple(ids), tuple(groups)


CATALOGUE: Mapping[str, type[TextData]] = {"text": TextData}
