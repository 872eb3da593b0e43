"""Questions and answers: a language model that is taught to say them.

The loss is that of the answers' tokens. What a model says by itself is another matter:
`evaluate.answers` lets it speak, see `run.saying`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.data.answers import AnswerTask
from lowrank.data.talk import Talk
from lowrank.evaluate import texts
from lowrank.io.language import Language
from lowrank.run.language import (
    LanguageProblem,
    Windows,
    check_length,
    known_texts,
    load_language,
)
from lowrank.run.problem import known_split
from lowrank.run.saying import Said, Speaker
from lowrank.run.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering(LanguageProblem):
    """Questions and answers for a language model; see `problem.Problem`.

    Attributes:
      task: The data, checked.
      talk: How the base is spoken to.
    """

    task: AnswerTask
    talk: Talk

    def speaker(
        self, split: str, tokens: int, together: int, **options: Any
    ) -> Speaker:
        """Puts the questions of a split; see `run.saying` for options."""
        questions = self.task.splits[split].questions
        return Speaker(
            self.base, self.talk, questions, tokens=tokens, together=together, **options
        )

    def compared(self, split: str, said: Said, **options: Any) -> dict[str, Any]:
        """Metrics of answers that were said; see `evaluate.texts.report`.

        "verified" is the mean of what the data's own rule makes of them, in percent.
        """
        rows = self.task.splits[split]
        found = texts.report(said.texts, rows.answers, rows.groups, **options)
        if (scores := self.verified(split, said)) is not None:
            found["verified"] = texts.mean_score(scores, rows.groups, **options)
        return found

    def verified(self, split: str, said: Said) -> list[float] | None:
        """What every answer is worth by the data's own rule, from 0 to 1.

        Returns:
          None if the data have no such rule.
        """
        if (verify := self.task.verify) is None:
            return None
        rows = self.task.splits[split].ids
        return [verify(row, text) for row, text in zip(rows, said.texts, strict=True)]


def load_answering(settings: Settings) -> Answering:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    task = _task(settings)
    base = load_language(settings)
    return _answering(settings, base, task)


def answering_again(
    settings: Settings, base: Language, facts: Mapping[str, Any], split: str
) -> Answering:
    """One split of the data that the settings name, for a finished run's model.

    Raises:
      BadInput: There is no such split.
    """
    del facts
    task = _task(settings)
    rows = known_split(task.splits, split)
    own = dataclasses.replace(task, splits={split: rows})
    return _answering(settings, base, own)


def talk_of(base: Language) -> Talk:
    """How a base is spoken to, as its files say."""
    return Talk(base.tokenizer, base.chat_template, end=base.end, begin=base.begin)


def _task(settings: Settings) -> AnswerTask:
    cache = settings.run.cache
    return settings.data.load(Path(cache) / "data" if cache else None)


def _answering(settings: Settings, base: Language, task: AnswerTask) -> Answering:
    talk = talk_of(base)
    length = check_length(settings, base)
    found = Answering(
        settings=settings,
        base=base,
        name=task.name,
        fingerprint=task.fingerprint,
        provenance=task.provenance,
        splits={
            name: Windows(talk.spoken(rows, length), rows.ids, rows.groups)
            for name, rows in task.splits.items()
        },
        known=known_texts(settings, base),
        task=task,
        talk=talk,
    )
    if (tokens := settings.evaluate.answers) is not None:
        # What would be found missing after training.
        texts.text_metrics()
        for split in {*task.splits} - {"train"}:
            found.speaker(split, tokens, 1)
    return found
