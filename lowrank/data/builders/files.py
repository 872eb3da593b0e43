"""The user's files, read into columns: CSV, JSON lines, Parquet and plain lines.

Everything that can be wrong with a file is said here, with its line and the remedy,
before anything is prepared or compiled.
"""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lowrank.core.errors import BadInput, UnknownName, nearest

MAX_PATTERN_LENGTH = 200
#: Longest label; also bounds what `label_pattern` is tried on.
MAX_LABEL_LENGTH = 500
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
      format: "csv", "jsonl", "parquet", "lines", or "auto" for the suffix's.
      text: Column of the text.
      label: Column of the label; None where rows have none.
      id: Column of the row's name, or None to number the rows.
      group: Column of the group, or None.
      pair: Column of a second text, or None.
      numbers: Whether labels are finite numbers and not names.
      encoding: "utf-8" or "latin-1".
      separator: Between the columns of csv and lines; the format's own if None.
      header: Names of the columns of a file that does not begin with them.
      label_pattern: Regular expression with one group, which becomes the label.
    """

    format: str = "auto"
    text: str = "text"
    label: str | None = "label"
    id: str | None = None
    group: str | None = None
    encoding: str = "utf-8"
    separator: str | None = None
    header: tuple[str, ...] | None = None
    label_pattern: str | None = None
    pair: str | None = None
    numbers: bool = False

    def __post_init__(self) -> None:
        given = (self.text, self.label, self.id, self.group, self.pair)
        names = [name for name in given if name]
        if len(set(names)) < len(names):
            raise BadInput(f"data: one column is given two parts, in {names}")
        if self.header is not None and len(set(self.header)) < len(self.header):
            raise BadInput(f"data.header names a column twice: {self.header}")
        if self.format == "lines" and not (self.separator and self.header):
            raise BadInput(
                "data.format=lines needs data.separator and data.header: each line is "
                "split at its first separators, as in header=[label,text]"
            )
        # The csv module has no name for this demand.
        if self.format in ("auto", "csv") and len(self.separator or ",") != 1:
            raise BadInput(
                f"data.separator = {self.separator!r}: csv takes one character; longer "
                "ones go with data.format=lines"
            )
        if self.label_pattern is not None:
            self.pattern()

    def pattern(self) -> re.Pattern[str]:
        """The compiled `label_pattern`.

        Raises:
          BadInput: It is too long, no regular expression, or has not one group.
        """
        source = self.label_pattern or "(.*)"
        if len(source) > MAX_PATTERN_LENGTH:
            raise BadInput(
                f"data.label_pattern has {len(source)} characters; at most "
                f"{MAX_PATTERN_LENGTH} are read"
            )
        try:
            compiled = re.compile(source, re.DOTALL)
        except re.error as error:
            raise BadInput(
                f"data.label_pattern {source!r} is no regular expression: {error}"
            ) from None
        if compiled.groups != 1:
            raise BadInput(
                f"data.label_pattern {source!r} has {compiled.groups} groups; one pair "
                "of parentheses marks the label, as in '^([A-Z]+):'"
            )
        return compiled


@dataclasses.dataclass
class Columns:
    """Rows of one split, as read.

    Attributes:
      ids: Given names, or None.
      texts: Texts, none empty.
      labels: Names of the labels, none empty; empty where rows have none.
      groups: Groups, or None.
      pairs: Second texts, none empty, or None.
      places: ``file:line`` of each row, for messages.
    """

    ids: list[str] | None
    texts: list[str]
    labels: list[str]
    groups: list[str] | None
    places: list[str]
    pairs: list[str] | None = None


def read_columns(files: Sequence[tuple[Path, bytes]], reading: Reading) -> Columns:
    """The rows of one split, from one file or several.

    Raises:
      BadInput: Anything is missing, empty or malformed; names file and lines.
    """
    wanted = [reading.text, reading.label, reading.id, reading.group, reading.pair]
    values: dict[str, list[Any]] = {name: [] for name in wanted if name}
    places: list[str] = []
    for path, content in files:
        if not content.strip():
            raise BadInput(f"{path} is empty; leave it out, or fill it")
        count = len(places)
        for line, row in _rows(path, content, reading, list(values)):
            for name in values:
                values[name].append(row[name])
            places.append(f"{path.name}:{line}")
        if len(places) == count:
            raise BadInput(f"{path} has column names but no rows")
    text = _named(values, places, reading.text, "text", _as_text)
    convert = _as_number if reading.numbers else _as_name
    label = _named(values, places, reading.label, "label", convert)
    assert text is not None
    if reading.label_pattern is not None and label is not None:
        label = _match(label, places, reading.pattern())
    return Columns(
        ids=_named(values, places, reading.id, "id"),
        texts=text,
        labels=label or [],
        groups=_named(values, places, reading.group, "group"),
        places=places,
        pairs=_named(values, places, reading.pair, "pair", _as_text),
    )


def format_of(path: Path, reading: Reading) -> str:
    """The format of a file: the one asked for, else its suffix's.

    Raises:
      BadInput: The suffix says nothing.
    """
    if reading.format != "auto":
        return reading.format
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(
            f"{path}: the suffix {path.suffix!r} names no format; known are "
            f"{', '.join(SUFFIXES)}. Say data.format=csv, jsonl, parquet or lines."
        )
    return SUFFIXES[path.suffix.lower()]


def _rows(
    path: Path, content: bytes, reading: Reading, names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of one file; a row has at least `names`."""
    kind = format_of(path, reading)
    if kind == "parquet":
        yield from _parquet_rows(path, content, names)
        return
    text = _decode(path, content, reading.encoding)
    if kind == "csv":
        yield from _csv_rows(path, text, reading, names)
    elif kind == "jsonl":
        yield from _json_rows(path, text, names)
    else:
        yield from _line_rows(path, text, reading, names)


def _decode(path: Path, content: bytes, encoding: str) -> str:
    try:
        # A byte order mark is no part of the first column's name.
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadInput(
            f"{path} is not {encoding}: byte {error.start} (line {line}) is "
            f"0x{content[error.start]:02x}. Save it as UTF-8, or say "
            "data.encoding=latin-1 if that is what it is."
        ) from None


def _need(names: Sequence[str], found: Sequence[str], path: Path) -> None:
    for name in names:
        if name not in found:
            raise UnknownName(
                f"{path} has no column {name!r}. Nearest: {nearest(name, found)}. "
                f"Columns: {', '.join(map(str, found))}. Say which with data.text=, "
                "data.label=, data.id= or data.group=."
            )


def _csv_rows(
    path: Path, text: str, reading: Reading, names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    separator = reading.separator or ("\t" if path.suffix.lower() == ".tsv" else ",")
    # Fields may hold line breaks, so the reader counts lines, not `splitlines`.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header = list(reading.header) if reading.header else None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                _need(names, header, path)
                continue
            if len(fields) != len(header):
                raise BadInput(
                    f"{path}:{reader.line_num} has {len(fields)} fields and there are "
                    f"{len(header)} columns; quote a field that holds {separator!r}, "
                    "or say data.separator="
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num} is no CSV: {error}") from None


def _json_rows(
    path: Path, text: str, names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not `splitlines`: JSON texts may hold U+2028, which it takes for a line break.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{line} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadInput(
                f"{path}:{line} is a {type(row).__name__}; every line is an object "
                'like {"text": "...", "label": "..."}'
            )
        _need(names, list(row), Path(f"{path}:{line}"))
        yield line, row


def _parquet_rows(
    path: Path, content: bytes, names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _need(names, file.schema_arrow.names, path)
        table = file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is no Parquet file: {error}") from None
    yield from enumerate(table.to_pylist(), start=1)


def _line_rows(
    path: Path, text: str, reading: Reading, names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    header, separator = reading.header or (), reading.separator or ""
    _need(names, header, path)
    for line, content in enumerate(text.split("\n"), start=1):
        content = content.removesuffix("\r")
        if not content.strip():
            continue
        fields = content.split(separator, len(header) - 1)
        if len(fields) != len(header):
            raise BadInput(
                f"{path}:{line} has {len(fields)} parts and there are {len(header)} "
                f"columns, {', '.join(header)}, separated by {separator!r}"
            )
        yield line, dict(zip(header, fields, strict=True))


def _as_text(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return None
    return value if _is_unicode(value) else None


def _as_name(value: Any) -> str | None:
    """A label, id or group as text; whole numbers and truth values are welcome."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str) or not value.strip():
        return None
    usable = len(value) <= MAX_LABEL_LENGTH and _is_unicode(value)
    return value.strip() if usable else None


def _as_number(value: Any) -> str | None:
    """A finite number, told so that no digit is lost."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return repr(number) if math.isfinite(number) else None


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is no character.
        return False
    return True


def _named(
    values: dict[str, list[Any]],
    places: list[str],
    column: str | None,
    what: str,
    convert: Callable[[Any], str | None] = _as_name,
) -> list[str] | None:
    if column is None:
        return None
    return _convert(values[column], places, f"{what} {column!r}", convert)


def _convert(
    values: list[Any],
    places: list[str],
    what: str,
    convert: Callable[[Any], str | None],
) -> list[str]:
    found = [convert(value) for value in values]
    bad = [number for number, value in enumerate(found) if value is None]
    if bad:
        shown = ", ".join(f"{places[n]} ({values[n]!r:.40})" for n in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise BadInput(
            f"{len(bad)} rows have no usable {what}: {shown}{more}. Texts are text "
            "that is not blank; labels, ids and groups are text of at most "
            f"{MAX_LABEL_LENGTH} characters, or whole numbers. Fill the rows or remove "
            "them."
        )
    return [value for value in found if value is not None]


def _match(labels: list[str], places: list[str], pattern: re.Pattern[str]) -> list[str]:
    matches = [pattern.search(label) for label in labels]
    names = [match[1] if match else None for match in matches]
    bad = [number for number, name in enumerate(names) if not name]
    if bad:
        shown = ", ".join(f"{places[n]} ({labels[n]!r:.40})" for n in bad[:_SHOWN])
        raise BadInput(
            f"data.label_pattern {pattern.pattern!r} finds no label in {len(bad)} "
            f"rows: {shown}"
        )
    return [name for name in names if name]
