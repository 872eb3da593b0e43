"""What must hold of a task before anything is compiled, and what is worth telling.

A label out of range does not crash a loss: it gives a finite gradient for the wrong
class. So labels, texts, ids and splits are checked here, in full, once.
"""

from collections import Counter
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.data.splits import MAX_OVERLAP, Split
from lowrank.data.tasks import Task

_SHOWN = 5


def check_task(
    task: Task, *, max_overlap: float = MAX_OVERLAP, what: str = "texts"
) -> dict[str, Any]:
    """Checks a task, and reports what a reader of its results should know.

    Args:
      task: The task.
      max_overlap: Largest share of an evaluation split's rows whose text occurs in
        train, or of the test split's in validation. Letter case and spaces at the
        ends do not tell texts apart.
      what: The rows' own name for what is compared.

    Returns:
      JSON types: for each split rows, classes, smallest and largest class and
      duplicates; for each pair of splits the rows that overlap; the classes that an
      evaluation split lacks.

    Raises:
      BadInput: No train split, fewer than two classes, an empty split, a label out of
        range, a blank text, an id used twice, a class without training rows that
        another split has, or more overlap than `max_overlap`.
    """
    if "train" not in task.splits:
        raise BadInput(f"task {task.name!r} has no train split")
    if len(task.classes) < 2:
        raise BadInput(
            f"task {task.name!r} has {len(task.classes)} classes; there is nothing to "
            "tell apart"
        )
    if len(set(task.classes)) < len(task.classes):
        double = next(c for c, n in Counter(task.classes).items() if n > 1)
        raise BadInput(f"task {task.name!r} has two classes called {double!r}")
    for name, split in task.splits.items():
        _check_rows(task, name, split)
    _check_ids(task)
    trained = set(task.splits["train"].labels.tolist())
    for name, split in task.splits.items():
        if missing := set(split.labels.tolist()) - trained:
            names = ", ".join(repr(task.classes[c]) for c in sorted(missing)[:_SHOWN])
            raise BadInput(
                f"the {name} split of {task.name!r} has {len(missing)} classes that "
                f"the train split lacks: {names}. Add rows to train, or remove "
                "these."
            )
    return {
        "task": task.name,
        "fingerprint": task.fingerprint,
        "num_classes": len(task.classes),
        "splits": {name: _describe(task, split) for name, split in task.splits.items()},
        "overlap": _overlap(task, max_overlap, what),
    }


def _check_rows(task: Task, name: str, split: Split) -> None:
    place = f"the {name} split of {task.name!r}"
    if len(split) == 0:
        raise BadInput(f"{place} has no rows; give rows or leave the split out")
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(task.classes)))
    if len(wrong):
        row = int(wrong[0])
        hint = " -1 often marks a hidden label." if split.labels[row] == -1 else ""
        raise BadInput(
            f"{place} has {len(wrong)} rows with a label outside 0 to "
            f"{len(task.classes) - 1}; the first is row {split.ids[row]!r} with "
            f"{int(split.labels[row])}.{hint} Leave these rows out, or choose another "
            "split."
        )
    either = zip(split.texts, split.pairs or split.texts, strict=True)
    blank = [n for n, both in enumerate(either) if not all(map(str.strip, both))]
    if blank:
        names = ", ".join(repr(split.ids[n]) for n in blank[:_SHOWN])
        raise BadInput(
            f"{place} has {len(blank)} rows without text: {names}; fill or remove them"
        )


def _check_ids(task: Task) -> None:
    seen: dict[str, str] = {}
    for name, split in task.splits.items():
        for row in split.ids:
            if row in seen:
                raise BadInput(
                    f"id {row!r} of {task.name!r} names a row of {seen[row]} and "
                    f"another of {name}; ids are unique over all splits"
                )
            seen[row] = name


def _describe(task: Task, split: Split) -> dict[str, Any]:
    counts = np.bincount(split.labels, minlength=len(task.classes))
    present = counts[counts > 0]
    absent = [task.classes[c] for c in np.flatnonzero(counts == 0)]
    texts = Counter(_contents(split))
    return {
        "rows": len(split),
        "classes": len(present),
        "smallest_class": int(present.min()),
        "largest_class": int(present.max()),
        "majority_share": float(counts.max() / len(split)),
        "groups": None if split.groups is None else len(set(split.groups)),
        "duplicate_rows": sum(n - 1 for n in texts.values()),
        "absent_classes": absent,
        "class_counts": {
            name: int(n) for name, n in zip(task.classes, counts, strict=True)
        },
    }


def _overlap(task: Task, max_overlap: float, what: str) -> dict[str, Any]:
    texts = {name: {*_contents(split)} for name, split in task.splits.items()}
    found: dict[str, Any] = {}
    for known, judged in (
        ("train", "validation"),
        ("train", "test"),
        ("validation", "test"),
    ):
        if known not in texts or judged not in texts:
            continue
        split = task.splits[judged]
        rows = [n for n, one in enumerate(_contents(split)) if one in texts[known]]
        share = len(rows) / len(split)
        examples = [split.ids[n] for n in rows[:_SHOWN]]
        found[f"{judged}_in_{known}"] = {
            "rows": len(rows),
            "share": share,
            "examples": examples,
        }
        if share > max_overlap:
            raise BadInput(
                f"{len(rows)} of {len(split)} {what} of the {judged} split of "
                f"{task.name!r} also stand in {known} ({share:.1%}; at most "
                f"{max_overlap:.1%} may): {', '.join(map(repr, examples))}. Remove "
                "them, or results would show what was learned by heart."
            )
    return found


def _contents(split: Split) -> list[tuple[str, ...]]:
    """What a row says: equal for rows that differ in letter case and outer spaces."""
    columns = [split.texts] if split.pairs is None else [split.texts, split.pairs]
    same = lambda text: text.strip().casefold()
    return [tuple(map(same, row)) for row in zip(*columns, strict=True)]
