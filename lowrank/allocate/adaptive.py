"""The allocator that holds every piece of a method as a field.

`ranks=adalora ranks.importance=fisher` is so an experiment, not a fork; the methods
that have names are in `recipes`. The budget is by default what the ranks of the rules
add up to: an adaptive run ends with as many components as the fixed run with the same
rules; with ties, at most as many, and with unit=parameters, at most as many parameters.
"""

import abc
import math
from typing import ClassVar, Literal

import numpy as np

from lowrank.allocate import dealing, schedules
from lowrank.allocate.allocation import Allocation, Program
from lowrank.allocate.importance import IMPORTANCES
from lowrank.allocate.schedules import STAIRCASE, Window, window
from lowrank.allocate.selectors import GAINING
from lowrank.allocate.signals import ONCE
from lowrank.allocate.singular import importance_of
from lowrank.allocate.slots import LARGEST, Slots, Unit
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

Name = Literal[
    "fisher",
    "gradient",
    "norm",
    "activation",
    "sensitivity",
    "effective_rank",
    "stable_rank",
    "spectrum",
    "variance",
    "first_gradient",
    "ablation",
    "random",
]
Basis = Literal["own", "singular"]
Normaliser = Literal["none", "cost", "layer"]
Selector = Literal["top", "proportional", "grow", "swap", "variance"]
Mode = Literal["hard", "revivable", "squeezed"]
Shape = Literal["constant", "linear", "cubic", "late_cubic", "cosine", "staircase"]


class Allocator(abc.ABC):
    """How ranks are chosen."""

    @abc.abstractmethod
    def on(self, slots: Slots, num_steps: int) -> Allocation:
        """The allocator on a layout, for a run of so many steps.

        Raises:
          BadInput: Budget, bounds, window and ranks do not go together.
        """


@spec
class Adaptive(Allocator):
    """Ranks that move during training.

    Attributes:
      importance: What components are ranked by.
      basis: "own": components as training leaves them. "singular": how many of a layer
        stay follows from the singular values of its correction, so that components
        that say the same are not counted twice; see `singular.Singular`.
      normaliser: What it is divided by; by default the cost where the budget counts
        parameters and components compete one by one, else nothing.
      selector: How winners follow from it.
      schedule: Shape of the budget between its first and its last value.
      unit: What budgets count.
      budget: The last one; by default what the rules' ranks count.
      start: The first budget as a multiple of the last one; None: all components held.
      begin, end: Where the window begins and where its last event is: steps (whole
        numbers) or fractions of the run (with a decimal point).
      every: Steps between events.
      measure_every: Steps between measurements.
      first_batches: Batches that are looked at before the first step, where what is
        measured is measured once.
      decay: Of the exponential mean of what is measured.
      deviation_decay: Of the mean deviation, for sensitivity.
      mode: "hard" shuts the gates of losers. "revivable" leaves them open and has
        training zero their values at each event, until the last one. "squeezed" writes
        every correction by its singular values at each event, the largest first, and
        shuts what is last in a layer, so that the nearest correction of the new rank
        is left; moments begin anew.
      rho: Largest rank of a layer as a multiple of its rank in the rules.
      add: Components that a layer gains at once, for grow.
      at_once: Layers that gain at one event, for a staircase; by default as few as
        reach the budget.
      moves: Components that change places at the first event, for swap; falls to 0.
      pool: Components of each layer that may change places, for swap.
      threshold: Share of a layer's importance to be kept, for variance.
    """

    #: Fields that are constants: trials that differ in them may share a program.
    dialled: ClassVar[frozenset[str]] = frozenset(
        {"schedule", "budget", "start", "begin", "end", "every", "decay", "rho"}
        | {"deviation_decay", "add", "at_once", "moves", "pool", "threshold"}
    )

    importance: Name = "fisher"
    basis: Basis = "own"
    normaliser: Normaliser | None = None
    selector: Selector = "top"
    schedule: Shape = "cubic"
    unit: Unit = "components"
    budget: int | None = None
    start: float | None = None
    begin: int | float = 0.15
    end: int | float = 0.6
    every: int = 20
    measure_every: int = 5
    first_batches: int = 8
    decay: float = 0.9
    deviation_decay: float = 0.85
    mode: Mode = "hard"
    rho: float | None = None
    add: int = 1
    at_once: int | None = None
    moves: int = 4
    pool: int = 2
    threshold: float = 1.0

    def __post_init__(self) -> None:
        below, rate = f"0 to ranks.every = {self.every}", "at least 0 and below 1"
        rules = {
            "budget": (self.budget is None or self.budget >= 1, "at least 1"),
            "start": (self.start is None or 0 < self.start < math.inf, "above 0"),
            "every": (self.every >= 1, "at least 1"),
            "measure_every": (0 <= self.measure_every <= self.every, below),
            "first_batches": (self.first_batches >= 1, "at least 1"),
            "decay": (0 <= self.decay < 1, rate),
            "deviation_decay": (0 <= self.deviation_decay < 1, rate),
            "rho": (self.rho is None or 1 <= self.rho < math.inf, "at least 1"),
            "add": (self.add >= 1, "at least 1"),
            "at_once": (self.at_once is None or self.at_once >= 1, "at least 1"),
            "moves": (self.moves >= 0, "at least 0"),
            "pool": (self.pool >= 1, "at least 1"),
            "threshold": (0 < self.threshold <= 1, "above 0 and at most 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise BadInput(
                    f"ranks.{name} = {getattr(self, name)!r} is out of range: give "
                    f"{allowed}"
                )
        if self.basis == "singular" and IMPORTANCES[self.importance].degree is None:
            known = sorted(n for n, one in IMPORTANCES.items() if one.degree)
            raise BadInput(
                "ranks.basis = 'singular' weighs singular values by importance, and "
                f"ranks.importance = {self.importance!r} does not grow with the size "
                f"of a component: set ranks.basis=own, or one of {', '.join(known)}"
            )
        if (self.mode == "squeezed") != (self.importance == "spectrum"):
            raise BadInput(
                "ranks.mode = 'squeezed' puts components in the order of singular "
                "values, which ranks.importance = 'spectrum' ranks by: either goes "
                f"with the other alone, and here are {self.mode!r} and "
                f"{self.importance!r}"
            )
        if self.mode == "squeezed" and self.selector in GAINING:
            raise BadInput(
                "ranks.mode = 'squeezed' leaves nothing in components that are shut, "
                f"and ranks.selector = {self.selector!r} opens gates; set "
                "ranks.selector=top"
            )
        if self.mode == "revivable" and self.selector in GAINING:
            raise BadInput(
                f"ranks.mode = 'revivable' lets losers come back by themselves, and "
                f"ranks.selector = {self.selector!r} opens gates; set ranks.mode=hard"
            )

    def on(self, slots: Slots, num_steps: int) -> Allocation:
        when = window(self.begin, self.end, self.every, num_steps)
        self._check_measured(when)
        most = self._most(slots)
        top = most[slots.group]
        ruled = slots.spent(slots.ranks, self.unit)
        last = ruled if self.budget is None else self.budget
        full = slots.spent(top, self.unit)
        first = full if self.start is None else math.floor(self.start * last + 0.5)
        room = "ranks.bounds or ranks.max_rank"
        room += "" if self.rho is None else ", or raise ranks.rho"
        for budget, what, own in (
            (last, "the budget", "ranks.budget"),
            (first, "the first budget", "ranks.start"),
        ):
            slots.check_budget(budget, self.unit, what, top, f"{own}, {room}")
        self._check_direction(slots, first, last)
        curve = schedules.curve(self.schedule, when, first, last, self._pace(slots))
        dealt = dealing.deal(slots, slots.ranks, first, self.unit, top)
        moves = self.moves if self.selector == "swap" else 0
        changes = schedules.held(schedules.moves(when, moves), when)
        self._check_exchange(slots, dealt, top, changes[when.events()])
        least = slots.group_bounds(slots.least, top)[0]
        constants = {
            "budget": schedules.held(curve, when),
            "due": when.events(),
            "end": np.int32(when.end),
            "ranks": dealt,
            "least": least.astype(np.int32),
            "most": most.astype(np.int32),
            "moves": changes,
            "pool": np.int32(self.pool),
            "add": np.int32(self.add),
            "threshold": np.float32(self.threshold),
            "decay": np.float32(self.decay),
            "deviation_decay": np.float32(self.deviation_decay),
        }
        return Allocation(slots, self._program(), constants)

    def _program(self) -> Program:
        # A proportional share is divided by what it buys already.
        by_cost = self.unit == "parameters" and self.selector != "proportional"
        usual = "cost" if by_cost else "none"
        needs = importance_of(self.importance, self.basis).signals
        once = needs <= ONCE
        return Program(
            importance=self.importance,
            basis=self.basis,
            normaliser=self.normaliser or usual,
            selector=self.selector,
            unit=self.unit,
            revivable=self.mode == "revivable",
            squeezed=self.mode == "squeezed",
            measure_every=0 if once else self.measure_every,
        )

    def _most(self, slots: Slots) -> np.ndarray:
        """The largest rank of every group."""
        most = slots.most
        if self.rho is not None:
            limit = np.floor(self.rho * slots.ranks + 0.5).astype(np.int32)
            # Tied layers have one minimum, the largest of theirs.
            least = slots.by_group(slots.least, np.maximum)[slots.group]
            most = np.minimum(most, np.maximum(limit, least))
        return slots.group_bounds(slots.least, most)[1]

    def _pace(self, slots: Slots) -> int | None:
        if self.at_once is None or self.schedule != STAIRCASE:
            return None
        if self.unit != "components":
            raise BadInput(
                "ranks.at_once counts layers that gain components, and ranks.unit is "
                f"{self.unit!r}; set ranks.unit=components, or leave at_once out"
            )
        return min(self.at_once * self.add, LARGEST, slots.num_components)

    def _check_exchange(
        self, slots: Slots, dealt: np.ndarray, top: np.ndarray, changes: np.ndarray
    ) -> None:
        """Raises BadInput if layers could not gain, whatever is measured."""
        if self.selector not in ("grow", "swap"):
            return
        if empty := np.flatnonzero((dealt == 0) & (top > 0)).tolist():
            raise BadInput(
                f"ranks.selector = {self.selector!r} goes by what the components of a "
                f"layer are worth, and {slots.names[empty[0]]!r} would begin without "
                "any, and so never gain one; raise ranks.start, delta.rank or "
                "ranks.budget, or give ranks.bounds a minimum of 1"
            )
        if self.selector == "swap" and not changes.any():
            raise BadInput(
                f"ranks.selector = 'swap' with ranks.moves = {self.moves} changes "
                f"nothing at any of its {len(changes)} event(s), since moves fall to 0 "
                "at ranks.end; lower ranks.every, or raise ranks.moves"
            )

    def _check_measured(self, when: Window) -> None:
        needs = importance_of(self.importance, self.basis).signals
        during = bool(needs) and not needs <= ONCE
        if during and not self.measure_every:
            raise BadInput(
                f"importance {self.importance!r} is measured in training: set "
                "ranks.measure_every to 1 or more"
            )
        if during and when.end == 0:
            raise BadInput(
                f"ranks.end = {self.end!r} has ranks chosen before the first step, "
                f"when importance {self.importance!r} has not been measured; set a "
                "later end"
            )

    def _check_direction(self, slots: Slots, first: int, last: int) -> None:
        """Raises BadInput if the selector cannot lead from one budget to the other."""
        if not slots.num_components:
            raise BadInput(
                "ranks are to adapt and no component competes: every max_rank is 0. "
                "Set max_rank, or ranks=uniform"
            )
        wrong = ""
        if self.selector in ("top", "variance") and first < last:
            wrong = "only prunes, and the budget is to grow: set ranks.start above 1"
        elif self.selector == "top" and first == last:
            wrong = (
                "chooses among more components than it keeps, and there are no more: "
                "raise ranks.max_rank (and ranks.rho, if there is one), or lower "
                "delta.rank or ranks.budget"
            )
        elif self.selector == "grow" and first >= last:
            wrong = "only grows: set ranks.start below 1"
        elif self.selector == "swap" and first != last:
            wrong = "keeps the total: set ranks.start=1.0 and ranks.schedule=constant"
        elif self.selector == "swap" and len({*slots.price(self.unit).tolist()}) > 1:
            wrong = (
                "exchanges components that count the same, and these do not: set "
                "ranks.unit=components, and tie no groups of different sizes"
            )
        if wrong:
            raise BadInput(
                f"ranks.selector = {self.selector!r} {wrong} (the budget goes from "
                f"{first} to {last} {self.unit})"
            )
