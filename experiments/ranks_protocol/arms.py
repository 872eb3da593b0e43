"""The arms: how ranks are chosen, at one final budget.

    uniform      the same rank everywhere: the baseline
    oracle       the teacher's ranks: the most that an allocation can do
    fisher       gate-Fisher             } the best components of all layers, in one
    sensitivity  AdaLoRA's importance    } window and on one cubic schedule, with gates
    norm         component norm          } that shut for good; in the singular basis
    activation   its output's energy     }
    fisher-own, sensitivity-own: the same by components as training leaves them
    random       the same at random: what pruning does alone
    retrain      the final ranks of fisher from the start: which ranks, without pruning
    shuffled     these ranks on the wrong layers
    ramp         ranks that rise with depth
    average      uniform at the time-average budget of the pruned arms: the only arm
                 with more than the others at the end

Each importance is measured and smoothed as its recipe says; none has a constant that
was tuned for this.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from experiments.ranks_protocol.settings import Protocol
from lowrank.allocate.adaptive import Adaptive, Allocator
from lowrank.allocate.fixed import Given, Ramp, Shuffled, Uniform
from lowrank.allocate.slots import Slots, Unit
from lowrank.core.errors import BadInput, UnknownName, nearest

BASELINE, ORACLE = "uniform", "oracle"
#: Arms that choose by looking at what training tells them.
METHODS = (
    "fisher", "sensitivity", "norm", "activation", "fisher-own", "sensitivity-own"
)  # fmt: skip
#: Those whose gain is asked for: either importance, in either basis.
CLAIMED = ("fisher", "sensitivity", "fisher-own", "sensitivity-own")
#: Those that look at nothing.
BLIND = ("random", "shuffled")


@dataclasses.dataclass(frozen=True)
class Place:
    """What an arm may know of a trial.

    Attributes:
      slots: What competes.
      budget, unit: At the end.
      truth: The teacher's ranks, if there are any: for the oracle alone.
      found: Final ranks of the arm that this one `needs`, for the same seed.
      seed: Of the trial.
    """

    slots: Slots
    budget: int
    unit: Unit
    truth: Mapping[str, int] | None
    found: Mapping[str, int] | None
    seed: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of choosing ranks.

    Attributes:
      allocator: (place, protocol) -> the allocator.
      needs: The arm whose final ranks it is given.
      knows: Whether it is given the truth.
    """

    allocator: Callable[[Place, Protocol], Allocator]
    needs: str | None = None
    knows: bool = False


def _by(**fields: Any) -> Callable[[Place, Protocol], Adaptive]:
    """Pruning by an importance, in the protocol's window."""

    def make(place: Place, protocol: Protocol) -> Adaptive:
        window = {"begin": protocol.begin, "end": protocol.end, "every": protocol.every}
        # Nothing is decided by what was measured before the event before.
        measured = {"measure_every": min(Adaptive.measure_every, protocol.every)}
        own = {**measured, **fields}
        return Adaptive(unit=place.unit, budget=place.budget, **window, **own)

    return make


#: Its importance, as its recipe measures and smooths it.
_ADALORA = {"importance": "sensitivity", "measure_every": 1, "decay": 0.85}


def _average(place: Place, protocol: Protocol) -> Uniform:
    pruned = _by(importance="random")(place, protocol).on(place.slots, protocol.steps)
    budget = math.ceil(pruned.average_forward_budget())
    return Uniform(budget=budget, unit=place.unit)


ARMS: Mapping[str, Arm] = {
    "uniform": Arm(lambda p, _: Uniform(budget=p.budget, unit=p.unit)),
    "oracle": Arm(lambda p, _: Given(ranks=_told(p.truth)), knows=True),
    "fisher": Arm(_by(importance="fisher", basis="singular")),
    "sensitivity": Arm(_by(basis="singular", **_ADALORA)),
    "norm": Arm(_by(importance="norm", basis="singular")),
    "activation": Arm(_by(importance="activation", basis="singular")),
    "fisher-own": Arm(_by(importance="fisher")),
    "sensitivity-own": Arm(_by(**_ADALORA)),
    "random": Arm(_by(importance="random")),
    "retrain": Arm(lambda p, _: Given(ranks=_told(p.found)), needs="fisher"),
    "shuffled": Arm(
        lambda p, _: Shuffled(ranks=_told(p.found), seed=p.seed), needs="fisher"
    ),
    "ramp": Arm(lambda p, _: Ramp(budget=p.budget, unit=p.unit)),
    "average": Arm(_average),
}


def check(protocol: Protocol) -> None:
    """Refuses arms that are unknown, or have nobody to take their ranks from.

    Raises:
      BadInput: Names the arm.
    """
    for name in protocol.arms:
        if name not in ARMS:
            raise UnknownName(
                f"arms has {name!r}, which is none. Nearest: {nearest(name, ARMS)}. "
                f"There are {', '.join(ARMS)}."
            )
        if (needs := ARMS[name].needs) and needs not in protocol.arms:
            raise BadInput(
                f"arm {name!r} takes the ranks that {needs!r} ends with: add "
                f"{needs!r} to arms, or leave {name!r} out"
            )
    if BASELINE not in protocol.arms:
        raise BadInput(f"every arm is compared with {BASELINE!r}: add it to arms")


def program(allocator: Allocator) -> tuple[str, ...]:
    """What trials must have in common to be trained in one pack."""
    unit = getattr(allocator, "unit", "components")
    if not isinstance(allocator, Adaptive):
        return ("still", unit)
    importance = f"{allocator.importance} {allocator.basis}"
    return (importance, str(allocator.measure_every), unit)


def _told(ranks: Mapping[str, int] | None) -> Mapping[str, int]:
    assert ranks is not None, "the study gives every arm what it needs"
    return ranks
