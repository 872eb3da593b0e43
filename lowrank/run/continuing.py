"""Texts as they are: a language model that is to find them likely."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.data.splits import Task
from lowrank.io.language import Language
from lowrank.run.language import (
    LanguageProblem,
    check_length,
    known_texts,
    load_language,
    windows_of,
)
from lowrank.run.problem import known_split
from lowrank.run.settings import Settings


def load_continuing(settings: Settings) -> LanguageProblem:
    """Loads and checks data and base.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    task = settings.data.load()
    base = load_language(settings)
    return _continuing(settings, base, task)


def continuing_again(
    settings: Settings, base: Language, facts: Mapping[str, Any], split: str
) -> LanguageProblem:
    """One split of the data that the settings name, for a finished run's model.

    Raises:
      BadInput: There is no such split.
    """
    del facts
    task = settings.data.load()
    rows = known_split(task.splits, split)
    return _continuing(settings, base, dataclasses.replace(task, splits={split: rows}))


def _continuing(settings: Settings, base: Language, task: Task) -> LanguageProblem:
    length = check_length(settings, base)
    return LanguageProblem(
        settings=settings,
        base=base,
        name=task.name,
        fingerprint=task.fingerprint,
        provenance=task.provenance,
        splits={
            name: windows_of(base, rows, length) for name, rows in task.splits.items()
        },
        known=known_texts(settings, base),
    )
