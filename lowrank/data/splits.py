"""A task and its splits, and how splits are cut, merged and thinned out.

Which rows are chosen depends on the seed and on each row's own id (or group): neither
the order of a file nor the number of other rows moves a row to the other side, and a
smaller sample is always part of a larger one.
"""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from lowrank.core.errors import BadInput

#: Share of a split's texts that may also stand, exactly, in one before it.
MAX_OVERLAP = 0.05
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Split:
    """Labeled texts in a fixed order.

    Attributes:
      ids: Names of the rows, unique in the task.
      texts: What is classified.
      labels: Positions in the task's `classes`.
      groups: Rows of one group are not independent (one template, one document);
        None where rows are.
      pairs: The second text of each row, where two are judged together; None where
        one is.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: Int32[np.ndarray, " rows"]
    groups: tuple[str, ...] | None = None
    pairs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes = {"ids": len(self.ids), "texts": len(self.texts)}
        sizes["labels"] = len(self.labels)
        for name in ("groups", "pairs"):
            if (column := getattr(self, name)) is not None:
                sizes[name] = len(column)
        if len(set(sizes.values())) > 1:
            raise BadInput(f"the columns of a split differ in length: {sizes}")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> "Split":
        """The split with only `rows`, in the order given."""
        own = lambda column: column and tuple(column[row] for row in rows)
        return Split(
            tuple(self.ids[row] for row in rows),
            tuple(self.texts[row] for row in rows),
            self.labels[np.asarray(rows, np.int64)],
            own(self.groups),
            own(self.pairs),
        )

    def fingerprint(self) -> str:
        """sha256 over all columns, in order."""
        digest = hashlib.sha256()
        for column in (self.ids, self.texts, self.groups or ()):
            digest.update(f"{len(column)}\0".encode())
            for value in column:
                data = value.encode()
                digest.update(f"{len(data)}\0".encode() + data)
        digest.update(np.ascontiguousarray(self.labels, "<i4").tobytes())
        # Nothing is added where there are none: data sets keep their names.
        for value in self.pairs or ():
            data = value.encode()
            digest.update(f"{len(data)}\0".encode() + data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task, ready to be checked and tokenized.

    Attributes:
      name: What reports call it.
      classes: Names of the classes; labels are positions in it.
      splits: "train" and, where there are such, "validation" and "test".
      fingerprint: sha256 over classes and all rows of all splits, in order.
      provenance: Where the rows come from and what was done to them, for the record.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    fingerprint: str
    provenance: Mapping[str, Any]


def make_task(
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, Split],
    provenance: Mapping[str, Any],
) -> Task:
    """A task with the fingerprint of its content."""
    digest = hashlib.sha256()
    for part in classes:
        digest.update(f"{len(part.encode())}\0{part}".encode())
    for split in sorted(splits):
        digest.update(f"\0{split}\0{splits[split].fingerprint()}".encode())
    rows = {split: len(splits[split]) for split in splits}
    return Task(
        name,
        tuple(classes),
        dict(splits),
        digest.hexdigest(),
        {**provenance, "rows": rows, "num_classes": len(classes)},
    )


def as_split(name: str, columns: Mapping[str, Sequence[Any]]) -> Split:
    """A split from columns; rows without an id are numbered."""
    column = lambda name: tuple(columns[name]) if columns.get(name) else None
    numbered = [f"{name}/{n}" for n in range(len(columns["text"]))]
    return Split(
        tuple(columns.get("id") or numbered),
        tuple(columns["text"]),
        np.asarray(columns["label"], np.int32),
        column("group"),
        column("pair"),
    )


def merge(first: Split, second: Split) -> Split:
    """The rows of both, `first` before `second`."""
    both = lambda one, other: one + other if one and other else None
    return Split(
        first.ids + second.ids,
        first.texts + second.texts,
        np.concatenate([first.labels, second.labels]),
        both(first.groups, second.groups),
        both(first.pairs, second.pairs),
    )


def cut(split: Split, share: float, seed: int, what: str) -> tuple[Split, Split]:
    """Cuts `share` off a split, class by class and never through a group.

    The number of rows of a class is rounded up or down by chance, in proportion; if
    that leaves nothing to cut off, one group goes that can. No class loses its last
    row. A group with rows of several classes counts for its most frequent one.

    Args:
      split: What is cut.
      share: The part to cut off, between 0 and 1.
      seed: Which rows go.
      what: Name of the new split, for the draw and for messages.

    Returns:
      (the rest, what was cut off), both in the order of `split`.

    Raises:
      BadInput: There are too few rows to cut any off.
    """
    keys = split.groups if split.groups is not None else split.ids
    members: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        members[key].append(row)
    labels = split.labels.tolist()
    owned: dict[int, list[str]] = defaultdict(list)
    for key, rows in members.items():
        counts = Counter(labels[row] for row in rows)
        owned[min(counts, key=lambda label: (-counts[label], label))].append(key)
    left = Counter(labels)
    moved: set[int] = set()
    for label, own in sorted(owned.items()):
        size = sum(len(members[key]) for key in own)
        wanted = int(size * share + _chance(seed, what, "round", str(label)))
        taken = 0
        for key in sorted(own, key=lambda key: _order(seed, what, key)):
            rows = members[key]
            loss = Counter(labels[row] for row in rows)
            last = any(left[other] <= number for other, number in loss.items())
            # A group goes if that brings the class nearer to what is wanted.
            if not last and taken + len(rows) / 2 <= wanted:
                moved.update(rows)
                left.subtract(loss)
                taken += len(rows)
    if not moved:
        spare = lambda rows: all(
            left[label] > number
            for label, number in Counter(labels[row] for row in rows).items()
        )
        ranked = sorted(members, key=lambda key: _order(seed, what, key))
        first = (members[key] for key in ranked if spare(members[key]))
        moved.update(next(first, ()))
    if not moved:
        raise BadInput(
            f"no {what} split can be cut from {len(split)} rows of {len(owned)} "
            f"classes with share {share}: every class would lose its only rows. Give a "
            f"{what} file, or more rows."
        )
    rest = [row for row in range(len(split)) if row not in moved]
    return split.take(rest), split.take(sorted(moved))


def subsample(
    split: Split, *, rows_per_class: int | None, max_rows: int | None, seed: int
) -> Split:
    """At most so many rows per class, and at most so many in all.

    With `max_rows` every class keeps a row before any class keeps a second one.

    Raises:
      BadInput: `max_rows` leaves classes without any row.
    """
    labels = split.labels.tolist()
    ranked: dict[int, list[int]] = defaultdict(list)
    order = [_order(seed, "subsample", name) for name in split.ids]
    for row in sorted(range(len(split)), key=lambda row: order[row]):
        ranked[labels[row]].append(row)
    if rows_per_class is not None:
        ranked = defaultdict(
            list, {label: rows[:rows_per_class] for label, rows in ranked.items()}
        )
    if max_rows is not None:
        if max_rows < len(ranked):
            raise BadInput(
                f"data.max_rows = {max_rows} leaves classes of the train split without "
                f"a row; give at least {len(ranked)}, one per class"
            )
        firsts = [rows[0] for rows in ranked.values()]
        others = sorted(
            (row for rows in ranked.values() for row in rows[1:]),
            key=lambda row: order[row],
        )
        keep = firsts + others[: max_rows - len(firsts)]
    else:
        keep = [row for rows in ranked.values() for row in rows]
    return split.take(sorted(keep))


def together(groups: Sequence[str], contents: Sequence[Any]) -> tuple[str, ...]:
    """The group of each row, where rows of equal content are of one group as well.

    So no cut parts what says the same. Groups that share a content are joined under
    the name of the first of them.
    """
    parent = {name: name for name in groups}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[Any, str] = {}
    place = {name: n for n, name in reversed([*enumerate(groups)])}
    for name, content in zip(groups, contents, strict=True):
        one, other = root(name), root(first.setdefault(content, name))
        early, late = sorted((one, other), key=place.__getitem__)
        parent[late] = early
    return tuple(map(root, groups))


def tied(splits: Mapping[str, Split], most: float = 0.0) -> dict[str, Split]:
    """The splits with groups that are `together` over all of them.

    Rows that are in no group are one each, unless another says the same.

    Args:
      splits: As they were given.
      most: Largest share of a split whose text may stand in one before it, too.

    Raises:
      BadInput: A group that was given, or more texts, are in two splits.
    """
    rows = [(name, n) for name, split in splits.items() for n in range(len(split))]
    own = lambda name, n: (splits[name].groups or splits[name].ids)[n]
    says = lambda name, n: tuple(
        column[n].strip().casefold()
        for column in (splits[name].texts, splits[name].pairs)
        if column is not None
    )
    groups = together([own(*one) for one in rows], [says(*one) for one in rows])
    found: dict[str, list[str]] = {name: [] for name in splits}
    homes: list[dict[Any, str]] = [{}, {}]
    doubles: dict[str, list[str]] = {name: [] for name in splits}
    for (name, n), group in zip(rows, groups, strict=True):
        found[name].append(group)
        given, text = (
            home.setdefault(key, name)
            for home, key in zip(homes, (own(name, n), says(name, n)), strict=True)
        )
        row = f"{splits[name].ids[n]!r}"
        if given != name:
            raise BadInput(
                f"group {own(name, n)!r} of row {row} of the {name} split is in the "
                f"{given} split, too: what is learned there would be known here. Cut "
                "by groups, or give one file, which is cut so"
            )
        if text != name:
            doubles[name].append(f"{row} (in {text})")
    for name, seen in doubles.items():
        if len(seen) > most * len(splits[name]):
            raise BadInput(
                f"{len(seen)} of {len(splits[name])} rows of the {name} split say what "
                f"stands in another split (at most {most:.0%} may): "
                f"{', '.join(seen[:_SHOWN])}. Leave them out, or give one file, which "
                "is cut so that none does"
            )
    return {
        name: dataclasses.replace(split, groups=tuple(found[name]))
        for name, split in splits.items()
    }


def check_cut(source: Any) -> None:
    """Checks the seed and the shares by which a source of data is cut.

    Raises:
      BadInput: One is out of range.
    """
    for name in ("validation_share", "test_share"):
        if not 0.0 < (share := getattr(source, name, 0.5)) < 1.0:
            raise BadInput(f"data.{name} must lie between 0 and 1, not {share}")
    if not 0 <= source.seed < 2**31:
        raise BadInput(f"data.seed must be from 0 to 2**31 - 1, not {source.seed}")


def cut_missing(
    splits: Mapping[str, Split], validation_share: float, test_share: float, seed: int
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Cuts test and then validation off train where they are missing.

    Returns:
      (splits, a note for the record on what was cut).

    Raises:
      BadInput: There are too few rows.
    """
    found, notes = dict(splits), {}
    for name, share in (("test", test_share), ("validation", validation_share)):
        if name not in found:
            grouped = found["train"].groups is not None
            found["train"], found[name] = cut(found["train"], share, seed, name)
            notes[f"cut_{name}"] = {
                "from": "train",
                "share": share,
                "seed": seed,
                "by_group": grouped,
                "rows": len(found[name]),
            }
    return found, notes


def _order(seed: int, what: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{what}\0{key}".encode()).digest()


def _chance(seed: int, *names: str) -> float:
    return int.from_bytes(_order(seed, "\0".join(names), "")[:6], "big") / 2**48
