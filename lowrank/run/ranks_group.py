"""The config group `ranks`: an allocator from its fields, or ranks of another run.

Beside the allocator's own fields there are, where ranks move, `max_rank`, the
components that a layer holds meanwhile, and the `bounds` and ties of single layers; and
for given ranks `from`, the run that left them.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowrank.allocate.adaptive import Adaptive, Allocator
from lowrank.allocate.catalogue import CATALOGUE
from lowrank.allocate.fixed import Uniform
from lowrank.allocate.schedules import window
from lowrank.allocate.selectors import GAINING, SELECTORS
from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build, fields_of
from lowrank.io.files import local_path
from lowrank.run.bounds import Bounds, bounds

#: What a run leaves its final ranks in, by the name of the layer.
RANKS = "ranks.yaml"
#: Components held while ranks move, as a multiple of the rank.
_ROOM = 2
#: Selectors under which no layer gains.
_PRUNING = {*SELECTORS} - GAINING


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How a trial's ranks are chosen.

    Attributes:
      allocator: Whose choice they are.
      max_rank: Components that a layer holds while ranks move; if None twice its rank,
        or `rho` times where that is more, and where ranks only fall no more than the
        first budget opens.
      bounds: Of single layers, and which have equal ranks.
    """

    allocator: Allocator = Uniform()
    max_rank: int | None = None
    bounds: Bounds = Bounds()

    @property
    def move(self) -> bool:
        """Whether ranks change in mid-run."""
        return isinstance(self.allocator, Adaptive)

    @property
    def moving(self) -> Allocator:
        """What moves ranks in training; of ranks that stay, rules say what they are."""
        return self.allocator if self.move else Uniform()

    @property
    def usual(self) -> bool:
        """Whether the ranks are those of the rules, as before there was this group."""
        return self == Ranks()

    def settled(self, num_steps: int) -> int:
        """Steps after which the last ranks have trained for one; 0 if none moves.

        Raises:
          BadInput: The window does not fit a run of so many steps.
        """
        one = self.allocator
        if not isinstance(one, Adaptive):
            return 0
        return window(one.begin, one.end, one.every, num_steps).end + 1

    def held(self, rank: int) -> int | None:
        """Components that a layer of this rank holds; None: so many as its rank."""
        one = self.allocator
        if not isinstance(one, Adaptive):
            return None
        if self.max_rank is not None:
            return self.max_rank
        room: float = _ROOM
        if one.rho is not None:
            room = max(_ROOM, one.rho)
        elif one.start is not None and one.selector in _PRUNING and one.budget is None:
            # What no budget ever opens need not be held.
            room = min(_ROOM, max(one.start, 1.0))
        return math.ceil(room * rank)


def filled(group: Any) -> dict[str, Any]:
    """The group with the ranks of the run that it names; None is the default.

    So the record of a run says which ranks it had, whatever becomes of the other run.

    Raises:
      BadInput: It is no group, the run has left no ranks, or other ranks are given.
    """
    group = {"name": "uniform"} if group is None else group
    if not isinstance(group, Mapping):
        raise BadInput(f"ranks is a group of fields, not {group!r}")
    found = dict(group)
    takes = "ranks" in fields_of(CATALOGUE[found["name"]]) if _known(found) else False
    source, given = found.get("from"), found.get("ranks")
    if not takes:
        if source is not None:
            raise UnknownName(
                f"ranks.from is for ranks=given and ranks=shuffled, not for "
                f"ranks={found.get('name')}"
            )
        return found
    if source is None and given is None:
        raise BadInput(
            f"ranks={found['name']} needs ranks: ranks.from=<run directory>, or "
            "ranks.ranks={path: rank}"
        )
    if source is None:
        return found
    file = _file(source)
    if given is not None and not file.exists():
        return found
    stored = read_ranks(file)
    if given is not None and dict(given) != stored:
        raise BadInput(
            f"ranks.ranks and ranks.from = {source!r} give different ranks; leave one "
            "of them out"
        )
    return {**found, "ranks": stored}


def chosen(group: Mapping[str, Any]) -> Ranks:
    """The group, from `filled`, as an object.

    Raises:
      BadInput: A field is unknown, missing or out of range.
    """
    fields = dict(group)
    fields.pop("from", None)
    most = fields.pop("max_rank", None)
    ranges, tied = fields.pop("bounds", None), fields.pop("tied", None)
    if most is not None and (type(most) is not int or most < 1):
        raise BadInput(
            f"ranks.max_rank is a whole number of at least 1, or null, not {most!r}"
        )
    found = Ranks(build(fields, CATALOGUE, "ranks"), most, bounds(ranges, tied))
    for name, value in (("max_rank", most), ("bounds", ranges), ("tied", tied)):
        if value is not None and not found.move:
            raise BadInput(
                f"ranks.{name} = {value} is for layers whose ranks move, and those of "
                f"ranks={fields['name']} stay; leave it out"
            )
    return found


def read_ranks(file: Path) -> dict[str, int]:
    """Ranks that a run has left.

    Raises:
      BadInput: There is no such file, or it holds something else.
    """
    try:
        stored = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(
            f"ranks.from: {file} cannot be read ({error}); give the directory of a "
            "finished run, or a YAML file of layer: rank"
        ) from None
    good = isinstance(stored, dict) and stored
    if not good or not all(
        isinstance(name, str) and type(rank) is int and rank >= 0
        for name, rank in stored.items()
    ):
        raise BadInput(
            f"ranks.from: {file} does not map names of layers to ranks of at least 0"
        )
    return stored


def _known(group: Mapping[str, Any]) -> bool:
    name = group.get("name")
    return isinstance(name, str) and name in CATALOGUE


def _file(source: Any) -> Path:
    if not isinstance(source, str):
        raise BadInput(f"ranks.from is the directory of a run, not {source!r}")
    path = local_path(source)
    return path / RANKS if path.is_dir() or path.suffix != ".yaml" else path
