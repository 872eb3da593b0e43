"""Several answers to a question: a language model takes the one it finds likeliest.

Training teaches the right answers. Judged is which of all choices has the largest
log-probability, as a whole and per token (the latter does not favour short ones).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int

from lowrank.core.errors import BadInput, NonFinite
from lowrank.data.answers import Answers
from lowrank.data.choices import Choices, ChoiceTask, every_choice
from lowrank.data.talk import Talk
from lowrank.evaluate import stats
from lowrank.evaluate.tokens import TokenSums, score_tokens
from lowrank.io.language import Language
from lowrank.run.answering import talk_of
from lowrank.run.forward import Batch, Forward
from lowrank.run.judges import Predict
from lowrank.run.language import (
    LanguageProblem,
    Windows,
    check_length,
    known_texts,
    load_language,
)
from lowrank.run.problem import known_split
from lowrank.run.settings import Settings

_NUMBERS = ("accuracy", "accuracy_per_token", "loss")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which choices belong to which question.

    Attributes:
      question: Number of the question of every choice.
      right: Whether it is the right one.
    """

    question: Int[np.ndarray, " choices"]
    right: Bool[np.ndarray, " choices"]

    @property
    def num_questions(self) -> int:
        return int(self.question[-1]) + 1

    def terms(self, sums: TokenSums) -> Float64[np.ndarray, "questions 5"]:
        """What every question adds: 1, whether the likeliest choice is right, as a
        whole and per token, and loss and tokens of the right one; NaN everywhere if a
        log-probability is not finite."""
        if not np.isfinite(sums.terms).all():
            return np.full((self.num_questions, 5), np.nan)
        loss, tokens = sums.terms[:, 0], sums.terms[:, 1]
        hit = [self._hit(loss), self._hit(loss / tokens)]
        ones = np.ones(self.num_questions)
        return np.stack([ones, *hit, loss[self.right], tokens[self.right]], axis=1)

    def _hit(self, loss: np.ndarray) -> np.ndarray:
        """1 where no other choice has as small a loss, a share of it where some do."""
        best = np.full(self.num_questions, np.inf)
        np.minimum.at(best, self.question, loss)
        among = loss == best[self.question]
        ties = np.bincount(self.question, among, self.num_questions)
        return among[self.right] / ties


def _values() -> Mapping[str, Any]:
    """Metric -> value of the sums of `Layout.terms`."""
    return {
        "accuracy": lambda sums, whole: sums[..., 1] / sums[..., 0],
        "accuracy_per_token": lambda sums, whole: sums[..., 2] / sums[..., 0],
        "loss": lambda sums, whole: sums[..., 3] / sums[..., 4],
    }


@dataclasses.dataclass(frozen=True)
class OfChoices:
    """How often the right choice is the likeliest; see `judges.Judge`.

    Attributes:
      layout: Of the validation split; None if there is none.
    """

    layout: Layout | None
    lower_is_better: frozenset[str] = frozenset(("loss",))

    def check(self, field: str, name: str, validation: Sequence[Batch]) -> None:
        """See `Judge`."""
        del validation
        if name not in _NUMBERS:
            raise BadInput(
                f"{field} = {name!r} is no number about choices; there are "
                f"{', '.join(_NUMBERS)}"
            )

    def numbers(
        self, forward: Forward, predict: Predict, validation: Sequence[Batch]
    ) -> list[dict[str, float]]:
        """See `Judge`."""
        del forward
        assert self.layout is not None
        found = []
        for one in score_tokens(predict, validation):
            sums = self.layout.terms(one).sum(axis=0)
            told = {n: float(v(sums, sums)) for n, v in _values().items()}
            found.append(told if np.isfinite(sums).all() else {})
        return found


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a model takes in a split; see `problem.Scored`."""

    terms: Float64[np.ndarray, "questions 5"]
    groups: tuple[str, ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """Whether each question was answered rightly, and the right answer's loss."""
        names = ("correct", "correct_per_token", "loss", "tokens")
        return {name: self.terms[:, 1 + n] for n, name in enumerate(names)}

    def report(self, *, resamples: int, level: float) -> dict[str, Any]:
        """See `problem.Scored`; whole groups are resampled."""
        if not np.isfinite(self.terms).all():
            raise NonFinite("the model gives log-probabilities that are not finite")
        names = np.asarray(self.groups)
        options = {"groups": names, "resamples": resamples, "level": level}
        metrics = {
            name: stats.bootstrap(self.terms, value, **options).json()
            for name, value in _values().items()
        }
        return {"num_rows": len(names), "clustered": True, "metrics": metrics}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choosing(LanguageProblem):
    """Questions with choices for a language model; see `problem.Problem`.

    Attributes:
      task: The data, checked.
      layouts: Of every split whose sequences are all choices.
    """

    task: ChoiceTask
    layouts: Mapping[str, Layout]

    @property
    def checks(self) -> Mapping[str, Any]:
        """As of `LanguageProblem`, with questions as rows, and their choices."""
        found = super().checks
        told = {
            name: {
                **found["splits"][name],
                "rows": len(rows),
                "choices": sum(map(len, rows.choices)),
            }
            for name, rows in self.task.splits.items()
        }
        return {**found, "splits": told}

    @property
    def rows(self) -> Mapping[str, int]:
        return {name: len(rows) for name, rows in self.task.splits.items()}

    def ids(self, split: str) -> Sequence[str]:
        return self.task.splits[split].ids

    def score(self, split: str, predict: Predict, progress: bool) -> list[Any]:
        found = score_tokens(predict, self.evaluation(split), progress)
        groups, layout = self.task.splits[split].groups, self.layouts[split]
        return [Chosen(layout.terms(one), groups) for one in found]


def load_choosing(settings: Settings) -> Choosing:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    task = settings.data.load()
    base = load_language(settings)
    return _choosing(settings, base, task)


def choosing_again(
    settings: Settings, base: Language, facts: Mapping[str, Any], split: str
) -> Choosing:
    """One split of the data that the settings name, for a finished run's model.

    Raises:
      BadInput: There is no such split.
    """
    del facts
    task = settings.data.load()
    rows = known_split(task.splits, split)
    own = dataclasses.replace(task, splits={split: rows})
    return _choosing(settings, base, own, all_choices=True)


def _choosing(
    settings: Settings, base: Language, task: ChoiceTask, all_choices: bool = False
) -> Choosing:
    length, talk = check_length(settings, base), talk_of(base)
    splits, layouts = {}, {}
    for name, rows in task.splits.items():
        if name == "train" and not all_choices:
            splits[name] = _windows(talk, _taught(rows), rows.groups, length)
            continue
        question, pairs = every_choice(rows)
        each = zip(rows.choices, rows.right, strict=True)
        right = np.concatenate([np.arange(len(own)) == n for own, n in each])
        layouts[name] = Layout(np.array(question), right)
        groups = tuple(rows.groups[row] for row in question)
        splits[name] = _windows(talk, pairs, groups, length)
    return Choosing(
        settings=settings,
        base=base,
        name=task.name,
        fingerprint=task.fingerprint,
        provenance=task.provenance,
        splits=splits,
        known=known_texts(settings, base),
        judge=OfChoices(layouts.get("validation")),
        task=task,
        layouts=layouts,
    )


def _taught(rows: Choices) -> Sequence[tuple[str, str]]:
    return [
        (question, choices[right])
        for question, choices, right in zip(
            rows.questions, rows.choices, rows.right, strict=True
        )
    ]


def _windows(
    talk: Talk,
    pairs: Sequence[tuple[str, str]],
    groups: tuple[str, ...],
    length: int,
) -> Windows:
    ids = tuple(f"choice {number}" for number in range(len(pairs)))
    answers = Answers(
        questions=tuple(question for question, _ in pairs),
        answers=tuple((choice,) for _, choice in pairs),
        groups=groups,
        ids=ids,
    )
    return Windows(talk.spoken(answers, length), ids, groups)
