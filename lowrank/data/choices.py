"""Questions with several answers to choose from, one of which is right.

``data=choices`` reads the user's JSON lines. All rows of a group are on one side of
every split.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32

from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.data.builders import table
from lowrank.data.splits import Split, check_cut, cut_missing, tied


@dataclasses.dataclass(frozen=True)
class Choices:
    """The rows of a split.

    Attributes:
      questions: What is asked.
      choices: What may be said, at least two texts per row.
      right: Position of the right one.
      groups: What makes rows dependent.
      ids: Names of the rows, unique over all splits.
    """

    questions: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    right: Int32[np.ndarray, " rows"]
    groups: tuple[str, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.questions)


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """Questions and choices in splits.

    Attributes:
      name: What it is called.
      splits: By name.
      provenance: Where it came from.
      fingerprint: sha256 of all rows.
    """

    name: str
    splits: Mapping[str, Choices]
    provenance: Mapping[str, Any]
    fingerprint: str


@spec
class ChoiceData:
    """The user's own questions: JSON lines.

    A line is ``{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}``; the answer
    is a position from 0 on, or the text of the right choice.

    Attributes:
      path: A file, which is then cut into splits, or a folder with files called
        train, validation (valid, val, dev) and test.
      question, choices, answer: Names of the fields.
      group: Field of what makes rows dependent; the question if None.
      validation_share: Part of train that is cut off where no validation is given.
      test_share: Part of train that is cut off, first, where no test is given.
      seed: Which rows are cut off.
    """

    kind: ClassVar[str] = "choices"

    path: str
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    group: str | None = None
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut(self)

    def load(self, data_dir: Path | None = None) -> ChoiceTask:
        """The rows, cut into splits.

        Args:
          data_dir: Not used: what is read is read again.

        Raises:
          BadInput: A file or a row is wrong, or there are too few rows.
        """
        del data_dir
        files = table.locate(self.path, {}, "choices", (".jsonl", ".ndjson"))
        rows: dict[str, tuple[str, tuple[str, ...], int]] = {}
        splits = {}
        for split, paths in files.items():
            ids, groups = [], []
            for path in paths:
                content = path.read_bytes()
                for place, row in self._rows(path, content):
                    group, question, choices, right = self._row(place, row)
                    ids.append(f"{split}/{len(ids)}")
                    groups.append(group)
                    rows[ids[-1]] = question, choices, right
            labels = np.zeros(len(ids), np.int32)
            texts = tuple(rows[one][0] for one in ids)
            splits[split] = Split(tuple(ids), texts, labels, tuple(groups))
        shares = self.validation_share, self.test_share, self.seed
        splits, notes = cut_missing(tied(splits), *shares)
        found = {name: _choices(own, rows) for name, own in splits.items()}
        return ChoiceTask(
            f"choices/{Path(self.path).stem}",
            found,
            {"source": "files", **notes},
            _fingerprint(found),
        )

    def _rows(self, path: Path, content: bytes) -> list[tuple[str, Mapping[str, Any]]]:
        try:
            lines = content.decode("utf-8").removeprefix("\ufeff").split("\n")
        except UnicodeDecodeError as error:
            raise BadInput(f"{path} is not UTF-8; save it as UTF-8") from error
        found = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}:{number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise BadInput(f"{path}:{number} is no object of question and choices")
            found.append((f"{path}:{number}", row))
        if not found:
            raise BadInput(f"{path} is empty; leave it out, or fill it")
        return found

    def _row(
        self, place: str, row: Mapping[str, Any]
    ) -> tuple[str, str, tuple[str, ...], int]:
        """(group, question, choices, position of the right one)."""
        wanted = (self.question, self.choices, self.answer, self.group)
        if missing := [name for name in wanted if name and name not in row]:
            raise BadInput(
                f"{place} has no field {missing[0]!r}; it has {', '.join(row)}. Say "
                "which with data.question=, data.choices=, data.answer= or data.group="
            )
        question, choices = row[self.question], row[self.choices]
        if not isinstance(question, str) or not question.strip():
            raise BadInput(f"{place}: the question is no text, but {question!r}")
        texts = isinstance(choices, list) and all(
            isinstance(one, str) and one.strip() for one in choices
        )
        if not texts or len({*choices}) < max(len(choices), 2):
            raise BadInput(
                f"{place}: choices are two or more different texts, not {choices!r}"
            )
        answer: Any = row[self.answer]
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise BadInput(
                f"{place}: the answer {answer!r} is none of the {len(choices)} "
                "choices, neither their text nor a position from 0 on"
            )
        group = question if self.group is None else str(row[self.group])
        return group, question, tuple(choices), answer


def _choices(
    split: Split, rows: Mapping[str, tuple[str, tuple[str, ...], int]]
) -> Choices:
    assert split.groups is not None
    own = [rows[one] for one in split.ids]
    return Choices(
        questions=split.texts,
        choices=tuple(choices for _, choices, _ in own),
        right=np.array([right for _, _, right in own], np.int32),
        groups=split.groups,
        ids=split.ids,
    )


def _fingerprint(splits: Mapping[str, Choices]) -> str:
    """sha256 of all rows, whatever file they stood in."""
    columns = {
        name: [rows.questions, rows.choices, rows.right.tolist(), rows.groups, rows.ids]
        for name, rows in splits.items()
    }
    text = json.dumps(columns, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def every_choice(rows: Choices) -> tuple[Sequence[int], Sequence[tuple[str, str]]]:
    """(row of each, (question, choice)) of all choices of all rows, in order."""
    pairs = [
        (row, (question, choice))
        for row, (question, choices) in enumerate(
            zip(rows.questions, rows.choices, strict=True)
        )
        for choice in choices
    ]
    return [row for row, _ in pairs], [pair for _, pair in pairs]


CATALOGUE: Mapping[str, type[Any]] = {"choices": ChoiceData}
