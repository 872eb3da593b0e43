"""Questions and answers by name: where the rows come from and which are kept.

``data=rnnlg`` reads the meanings and sentences of RNNLG, ``data=answers`` the user's
own files. Both end in an `AnswerTask`, no group of which is on two sides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data.answers import Answers, AnswerTask, make_task
from lowrank.data.builders import files, rnnlg, table
from lowrank.data.splits import Split, check_cut, cut_missing, tied

_SPLITS = ("train", "validation", "test")


@spec
class AnswerSpec:
    """What every source of questions can be asked.

    Attributes:
      train_rows: At most so many rows of the train split, the first ones.
      validation_rows: The same for the validation split.
      test_rows: The same for the test split.
      seed: Which rows go to which split.
    """

    kind: ClassVar[str] = "answers"

    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises `BadInput` if a number is out of range."""
        for name in _SPLITS:
            if (rows := getattr(self, f"{name}_rows")) is not None and rows < 1:
                raise BadInput(f"data.{name}_rows must be at least 1, not {rows}")
        check_cut(self)

    def first(self, split: str, rows: Sequence[Any]) -> Sequence[Any]:
        """As many of a split as are wanted."""
        return rows[: getattr(self, f"{split}_rows")]


@spec
class RnnlgData(AnswerSpec):
    """Meanings of a dialogue system and how people say them, cut by meaning.

    Attributes:
      path: Folder of train.json, valid.json and test.json.
    """

    path: str

    def __post_init__(self) -> None:
        self.check()

    def load(self, data_dir: Path | None = None) -> AnswerTask:
        """The rows, checked and cut into splits.

        Args:
          data_dir: Not used: what is read is read again.

        Raises:
          BadInput: A file is missing or of another form.
        """
        del data_dir
        folder = Path(self.path).expanduser()
        splits = {}
        for name, rows in rnnlg.cut(rnnlg.read(folder), self.seed).items():
            right: dict[str, list[str]] = {}
            for key, _, sentence in rows:
                right.setdefault(key, []).append(sentence)
            taken = self.first(name, rows)
            splits[name] = Answers(
                questions=tuple(rnnlg.QUESTION.format(meaning=row[1]) for row in taken),
                answers=tuple(
                    (sentence, *(s for s in right[key] if s != sentence))
                    for key, _, sentence in taken
                ),
                groups=tuple(row[0] for row in taken),
                ids=tuple(f"{name}-{number}" for number in range(len(taken))),
            )
        notes = {"source": "RNNLG", "seed": self.seed}
        return make_task(folder.name, splits, notes)


@spec
class AnswerTable(AnswerSpec):
    """The user's own questions and answers: CSV, JSON lines or Parquet.

    Rows with the same question belong together: they are on one side of every split,
    and each knows the answers of all as right.

    Attributes:
      path: A file, which is then cut into splits, or a folder with files called
        train, validation (valid, val, dev) and test.
      format: Read from the suffix if "auto".
      question: Column of what is asked.
      answer: Column of what is to be said.
      id: Column of the row's name, unique over all splits.
      group: Column of what makes rows dependent; the question if None.
      validation_share: Part of train that is cut off where no validation is given.
      test_share: Part of train that is cut off, first, where no test is given.
    """

    path: str
    format: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    question: str = "question"
    answer: str = "answer"
    id: str | None = None
    group: str | None = None
    validation_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        self.check()
        self.reading()

    def reading(self) -> files.Reading:
        """How the files are read."""
        return files.Reading(
            format=self.format,
            text=self.question,
            label=self.answer,
            id=self.id,
            group=self.group,
        )

    def load(self, data_dir: Path | None = None) -> AnswerTask:
        """The rows, checked and cut into splits.

        Args:
          data_dir: Not used: what is read is read again.

        Raises:
          BadInput: A file or a row is wrong; see `builders.files`.
        """
        del data_dir
        found = table.locate(self.path, {}, "answers")
        contents = table.contents(found)
        read = {
            split: files.read_columns(pairs, self.reading())
            for split, pairs in contents.items()
        }
        splits, said = table.as_splits(read)
        shares = self.validation_share, self.test_share, self.seed
        splits, notes = cut_missing(tied(splits), *shares)
        return make_task(
            f"answers/{Path(self.path).stem}",
            {name: self._answers(name, rows, said) for name, rows in splits.items()},
            {"source": "files", "files": table.hashes(contents), **notes},
        )

    def _answers(self, name: str, rows: Split, said: Mapping[str, str]) -> Answers:
        right: dict[str, list[str]] = {}
        for one, question in zip(rows.ids, rows.texts, strict=True):
            right.setdefault(question, []).append(said[one])
        taken = rows.take(self.first(name, range(len(rows))))
        assert taken.groups is not None
        return Answers(
            questions=taken.texts,
            answers=tuple(
                (said[one], *(s for s in right[question] if s != said[one]))
                for one, question in zip(taken.ids, taken.texts, strict=True)
            ),
            groups=taken.groups,
            ids=taken.ids,
        )


CATALOGUE: dict[str, type[AnswerSpec]] = {"rnnlg": RnnlgData, "answers": AnswerTable}
