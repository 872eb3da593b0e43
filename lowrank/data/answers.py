"""Questions and their answers: what a language model is taught to say.

A row is a question, one or more right answers, and the group that it belongs to; rows
of a group, as all that say one meaning, are on one side of every split. The first
answer is the one that is taught; metrics know all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank.core.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Answers:
    """The rows of a split.

    Attributes:
      questions: What is asked.
      answers: What may be said, at least one text per row.
      groups: What makes rows dependent.
      ids: Names of the rows, unique over all splits.
    """

    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if len(lengths) > 1:
            raise BadInput(f"columns of a split have different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: Sequence[int]) -> "Answers":
        """Some rows, in the order given."""
        columns = {
            field.name: tuple(getattr(self, field.name)[row] for row in rows)
            for field in dataclasses.fields(self)
        }
        return Answers(**columns)


@dataclasses.dataclass(frozen=True)
class AnswerTask:
    """Questions and answers in splits.

    Attributes:
      name: What it is called.
      splits: By name.
      provenance: Where it came from.
      fingerprint: sha256 of all rows.
      verify: (id of a row, what was said) -> what that is worth by the source's own
        rule, from 0 to 1; None where it has none. It runs nothing of what was said.
    """

    name: str
    splits: Mapping[str, Answers]
    provenance: Mapping[str, Any]
    fingerprint: str
    verify: Callable[[str, str], float] | None = None


def make_task(
    name: str, splits: Mapping[str, Answers], provenance: Mapping[str, Any]
) -> AnswerTask:
    """Checks splits and puts a task together.

    Raises:
      BadInput: A split is empty, a text is blank, an id comes twice, or a group is in
        two splits.
    """
    places: dict[str, str] = {}
    seen: set[str] = set()
    for split, rows in splits.items():
        if not len(rows):
            raise BadInput(f"the {split} split of {name} has no rows")
        for row, (question, answers) in enumerate(
            zip(rows.questions, rows.answers, strict=True)
        ):
            if not question.strip() or not answers or not all(map(str.strip, answers)):
                raise BadInput(
                    f"row {rows.ids[row]!r} of the {split} split has a blank question "
                    "or answer"
                )
        for one in rows.ids:
            if one in seen:
                raise BadInput(f"the id {one!r} is used twice")
            seen.add(one)
        for group in rows.groups:
            if places.setdefault(group, split) != split:
                raise BadInput(
                    f"{group!r} is in the {places[group]} and the {split} split: what "
                    "is learned there would be known here. Cut by groups."
                )
    content = {split: dataclasses.asdict(rows) for split, rows in splits.items()}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return AnswerTask(name, dict(splits), dict(provenance), digest)
