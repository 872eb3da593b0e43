"""RNNLG: meanings of a dialogue system's answers, and how a person says them.

A row of its files is [meaning, sentence, sentence of a rule-based system], as in
"inform(name=satellite eurus 65;type=laptop;memory=4 gb)". The published splits share
meanings, so that a model may have read the answers of the test split; here all rows are
put together and cut again, and no meaning is on two sides.

Source: Wen et al., 2016, https://arxiv.org/abs/1603.01232
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank.core.errors import BadInput

FILES = ("train.json", "valid.json", "test.json")
#: Parts of the meanings, in hundredths.
PARTS = {"train": 80, "validation": 10, "test": 10}
#: The question that every row answers.
QUESTION = "Say this to a customer, as one sentence or two: {meaning}"


def read(folder: Path) -> list[tuple[str, str]]:
    """(meaning, sentence) of all rows of all files, in their order.

    Raises:
      BadInput: A file is missing, or is not of this form.
    """
    rows = []
    for name in FILES:
        file = folder / name
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise BadInput(
                f"cannot read {file}: {error}. RNNLG's laptop set has the files "
                f"{', '.join(FILES)}: give their folder as data.path"
            ) from error
        try:
            # The files begin with lines of a license.
            found = json.loads(text[text.index("[") :])
        except ValueError as error:
            raise BadInput(f"{file} is not readable JSON: {error}") from error
        for number, row in enumerate(found):
            if not (
                isinstance(row, list)
                and len(row) >= 2
                and all(isinstance(text, str) and text.strip() for text in row[:2])
            ):
                raise BadInput(f"{file}: row {number} is no [meaning, sentence, ...]")
            rows.append((row[0].strip(), row[1].strip()))
    return rows


def normal(meaning: str) -> str:
    """A meaning whatever the order of its slots.

    Raises:
      BadInput: It is not of the form act(slot=value;slot=value).
    """
    act, bracket, rest = meaning.partition("(")
    if not bracket or not rest.endswith(")"):
        raise BadInput(f"{meaning!r} is no meaning of the form act(slot=value;...)")
    return f"{act}({';'.join(sorted(rest[:-1].split(';')))})"


def cut(
    rows: Sequence[tuple[str, str]], seed: int
) -> Mapping[str, list[tuple[str, str, str]]]:
    """Rows by split as (normal meaning, meaning, sentence).

    Where a meaning goes depends on itself and the seed alone, so that a row more or
    less moves no other.
    """
    found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in PARTS}
    for meaning, sentence in rows:
        key = normal(meaning)
        drawn = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        place = int.from_bytes(drawn[:8], "big") % 100
        for name, share in PARTS.items():
            if place < share:
                found[name].append((key, meaning, sentence))
                break
            place -= share
    return found
