"""Allocators that a config names: compositions of importance, selector and schedule.

`Adaptive` holds every piece as a field, and a named method is `Adaptive` with other
defaults. So `ranks=adalora ranks.importance=fisher` is an experiment, not a fork. The
budget is by default what the ranks of the rules add up to: an adaptive run ends with as
many components as the fixed run with the same rules; with ties, at most as many, and
with unit=parameters, at most as many parameters.
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
    "spectrum",
    "variance",
    "first_gradient",
    "ablation",
    "random",
]
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
        rules = {
            "budget": self.budget is None or self.budget >= 1,
            "start": self.start is None or 0 < self.start < math.inf,
            "every": self.every >= 1,
            "measure_every": 0 <= self.measure_every <= self.every,
            "first_batches": self.first_batches >= 1,
            "decay": 0 <= self.decay < 1,
            "deviation_decay": 0 <= self.deviation_decay < 1,
            "rho": self.rho is None or 1 <= self.rho < math.inf,
            "add": self.add >= 1,
            "at_once": self.at_once is None or self.at_once >= 1,
            "moves": self.moves >= 0,
            "pool": self.pool >= 1,
            "threshold": 0 < self.threshold <= 1,
        }
        for name, holds in rules.items():
            if not holds:
                raise BadInput(
                    f"ranks.{name} = {getattr(self, name)!r} is out of range (events "
                    "are at least as far apart as measurements, rates are below 1)"
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
        slots.check_budget(last, self.unit, "the budget", top)
        slots.check_budget(first, self.unit, "the first budget", top)
        self._check_direction(slots, first, last)
        curve = schedules.curve(self.schedule, when, first, last, self._pace(slots))
        moves = self.moves if self.selector == "swap" else 0
        least = slots.group_bounds(slots.least, top)[0]
        constants = {
            "budget": schedules.held(curve, when),
            "due": when.events(),
            "end": np.int32(when.end),
            "ranks": dealing.deal(slots, slots.ranks, first, self.unit, top),
            "least": least.astype(np.int32),
            "most": most.astype(np.int32),
            "moves": schedules.held(schedules.moves(when, moves), when),
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
        needs = IMPORTANCES[self.importance].signals
        once = needs <= ONCE
        return Program(
            importance=self.importance,
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
            most = np.minimum(most, np.maximum(limit, slots.least))
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

    def _check_measured(self, when: Window) -> None:
        needs = IMPORTANCES[self.importance].signals
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
                "raise max_rank, or lower the rank or ranks.budget"
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


@spec
class AdaLoRA(Adaptive):
    """Sensitivity, the best of all layers, a cubic fall (Zhang et al. 2023).

    arXiv:2303.10512. Faithful in scores, schedule and revival, beside P Lambda Q and
    the orthogonality penalty, which are a delta's and a penalty's. Departs from the
    code where that is wrong: equal scores do not make it keep less than the budget;
    no penalty and no clipping in the scores; a last event instead of one at every step
    of the final phase (as PEFT has it); events are counted from `begin`. With
    mode=hard the forward budget is the one that is claimed, which in the paper it is
    only after the last event.
    """

    importance: Name = "sensitivity"
    start: float | None = 1.5
    measure_every: int = 1
    decay: float = 0.85
    mode: Mode = "revivable"

    __post_init__ = Adaptive.__post_init__


@spec
class Fisher(Adaptive):
    """Prunes components whose gates carry the least Fisher information; the default.

    F_j = E_n[(d l_n / d g_j)^2]: half of it is the second-order rise of the loss when
    gate j is shut, at one number per component. `Adaptive` as it is.
    """

    __post_init__ = Adaptive.__post_init__


@spec
class Norm(Adaptive):
    """Prunes the components of smallest |c_j| |a_j| |b_j|, over all layers.

    Mao et al. 2024 (arXiv:2405.17357) without their division by the layer's norm,
    which makes layers incomparable (normaliser=layer), and without the dense products
    that their code forms.
    """

    importance: Name = "norm"
    __post_init__ = Adaptive.__post_init__


@spec
class Squeeze(Adaptive):
    """Trains wide, and is cut to the budget by the singular values of all layers.

    LoRA-Squeeze (arXiv:2602.10993), which trains on after the cut, with PARA's one
    threshold for all layers: what is left is the nearest correction with so many
    components, all layers together (Eckart & Young 1936). With `begin` before `end` it
    is cut in stages, as their In-Squeeze. Exact where theirs is randomised. How many a
    layer keeps is decided by its last measurement, at most `measure_every` steps old;
    what they are, by the correction of the moment.
    """

    importance: Name = "spectrum"
    begin: int | float = 0.9
    end: int | float = 0.9
    mode: Mode = "squeezed"
    __post_init__ = Adaptive.__post_init__


@spec
class Random(Adaptive):
    """Prunes at random, on the same schedule: what pruning alone does, a control."""

    importance: Name = "random"
    __post_init__ = Adaptive.__post_init__


@spec
class EVA(Adaptive):
    """Ranks from the variance of inputs, before the first step (Paischer et al. 2024).

    arXiv:2410.07170. Each layer may have up to rho times its rank; the budget goes to
    the directions that explain most of their layer's inputs, and these directions are
    what `a` starts as, of length one. Departs from the code, where sites with equal
    inputs get ranks by their order: here equal inputs give equal importances, and such
    sites differ only in what is tied where the budget ends. The scale stays that of the
    rules, as PEFT's `adjust_scaling_factors` has it.

    Attributes:
      directions: Whether `a` starts as the directions; or as the delta has it, so that
        ranks and start can be told apart.
    """

    importance: Name = "variance"
    schedule: Shape = "linear"
    begin: int | float = 0
    end: int | float = 0
    rho: float | None = 2.0
    directions: bool = True
    __post_init__ = Adaptive.__post_init__


@spec
class Growth(Adaptive):
    """Starts with half of the budget and adds where layers matter most.

    IncreLoRA (arXiv:2308.12043) with births that change no output, a scale that does
    not jump, and no step past the budget. Departs in what matters: the summed Fisher
    information of a layer's gates instead of |D dL/dD| entry by entry, which needs the
    dense gradient of every weight; and in holding no reserve component.
    """

    selector: Selector = "grow"
    schedule: Shape = "staircase"
    start: float | None = 0.5
    __post_init__ = Adaptive.__post_init__


@spec
class EffectiveRank(Adaptive):
    """Ranks in proportion to how many directions a layer's correction uses.

    r_l = kappa exp(entropy of its singular values), projected on the budget, where
    kappa cancels. Knows nothing of which layer matters. Every event may move ranks both
    ways; a layer with a rank of one cannot show that it needs two, so minima of two
    keep it able to.
    """

    importance: Name = "effective_rank"
    selector: Selector = "proportional"
    schedule: Shape = "constant"
    start: float | None = 1.0
    __post_init__ = Adaptive.__post_init__
