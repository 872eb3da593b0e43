"""Bounds on the ranks of single layers, and layers whose ranks are to be equal.

What a config says in patterns and names, `allocate` wants as numbers of layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.allocate.slots import Competitor
from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.core.paths import compile_pattern, layers_of, select

#: The smallest and the largest rank of a layer; None leaves that end open.
Range = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the config group `ranks` says of single layers.

    Attributes:
      ranges: Patterns, of weights or of layers of a stack, with the smallest and the
        largest rank of what they cover; of several patterns the first one counts.
      tied: Names that stand for each other in a path: layers whose paths differ by
        such names alone get equal ranks.
    """

    ranges: tuple[tuple[str, Range], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()

    def on(self, competitors: Sequence[Competitor]) -> list[Competitor]:
        """The competitors within their bounds, and in their groups.

        A layer that the rules freeze stays frozen, whatever its smallest rank.

        Raises:
          UnknownName: A pattern covers no path, or a name stands in none.
          BadInput: A layer is asked to have more components than it holds, patterns
            before it leave one nothing, or layers of a bracket are not there.
        """
        paths = [one.path for one in competitors]
        owners: dict[str, list[Range | None]] = {
            one.path: [None] * one.num_layers for one in competitors
        }
        for pattern, bound in self.ranges:
            taken = 0
            for path in select(pattern, paths):
                own = owners[path]
                for layer in _layers(pattern, path, len(own)):
                    if own[layer] is None:
                        own[layer] = bound
                        taken += 1
            if not taken:
                raise BadInput(
                    f"ranks.bounds: every layer that {pattern!r} covers falls under a "
                    "pattern before it; move it up, or leave it out"
                )
        groups = self._groups(paths)
        return [
            dataclasses.replace(_within(one, owners[one.path]), group=groups[one.path])
            for one in competitors
        ]

    def _groups(self, paths: Sequence[str]) -> dict[str, str | None]:
        """Path -> the path with tied names joined; None where it is the only such."""
        known = {part for path in paths for part in path.split("/")}
        joined = {}
        for names in self.tied:
            for name in names:
                if name not in known:
                    raise UnknownName(
                        f"ranks.tied: {name!r} stands in no path of a weight that "
                        f"competes. Nearest: {nearest(name, known)}"
                    )
                joined[name] = "|".join(names)
        groups = {
            path: "/".join(joined.get(part, part) for part in path.split("/"))
            for path in paths
        }
        common = [*groups.values()]
        return {p: g if common.count(g) > 1 else None for p, g in groups.items()}


def bounds(ranges: Any, tied: Any) -> Bounds:
    """The fields `ranks.bounds` and `ranks.tied`, checked; None stands for none.

    Raises:
      BadInput: They are no mapping from patterns to pairs, and no lists of names.
    """
    ranges = {} if ranges is None else ranges
    tied = [] if tied is None else tied
    if not isinstance(ranges, Mapping):
        raise BadInput(
            'ranks.bounds maps patterns to pairs, as {"**/query/**": [1, 16]}, not '
            f"{ranges!r}"
        )
    for pattern, pair in ranges.items():
        if isinstance(pattern, str):
            compile_pattern(pattern)
        if not (isinstance(pattern, str) and _is_range(pair)):
            raise BadInput(
                f"ranks.bounds[{pattern!r}] is the smallest and the largest rank, as "
                f"[1, 16], whole numbers of at least 0 or null, not {pair!r}"
            )
    if isinstance(tied, str) or not all(_are_names(names) for names in tied):
        raise BadInput(
            f"ranks.tied is a list of lists of two names or more, as [[query, value]], "
            f"not {tied!r}"
        )
    every = [name for names in tied for name in names]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise BadInput(
            f"ranks.tied names {twice[0]!r} twice; put all that is tied in one list"
        )
    return Bounds(
        tuple((pattern, (pair[0], pair[1])) for pattern, pair in ranges.items()),
        tuple(map(tuple, tied)),
    )


def _is_range(pair: Any) -> bool:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        return False
    whole = all(n is None or (type(n) is int and n >= 0) for n in pair)
    return whole and (None in pair or pair[0] <= pair[1])


def _are_names(names: Any) -> bool:
    several = isinstance(names, Sequence) and not isinstance(names, str)
    return several and len(names) > 1 and all(isinstance(n, str) for n in names)


def _layers(pattern: str, path: str, count: int) -> tuple[int, ...]:
    """The layers of a weight that a pattern takes, by number."""
    taken = layers_of(pattern)
    if taken is None:
        return tuple(range(count))
    try:
        return taken.of(count)
    except BadInput as error:
        raise BadInput(f"ranks.bounds: {pattern!r}, for {path!r}: {error}") from None


def _within(one: Competitor, owners: Sequence[Range | None]) -> Competitor:
    least, most = list(one.by_layer("least")), list(one.by_layer("most"))
    for layer, bound in enumerate(owners):
        if bound is None or not most[layer]:
            continue
        low, high = bound
        low = least[layer] if low is None else low
        high = most[layer] if high is None else high
        if max(low, high) > most[layer]:
            raise BadInput(
                f"ranks.bounds: {one.layer_names[layer]!r} is to have {low} to {high} "
                f"components and holds {most[layer]}; raise ranks.max_rank, or lower "
                "the bound"
            )
        least[layer], most[layer] = low, high
    return dataclasses.replace(one, least=tuple(least), most=tuple(most))
