"""The contract with training: what is measured, when ranks move, and to what.

An `Allocation` is an allocator on a layout, for one trial. Its program is static; its
numbers (budgets, dates, bounds, rates, first ranks) are constants, arrays that training
hands back to every call. So trials that share a program are mapped over together,
whatever their numbers, and all of it can be jitted:

    memory = init(factors)
    gates = gates(constants)                        # open at the start
    if needs and measure_every == 0:                # measured once: before any event
        memory = observe(memory, signals, 0, constants)
    each step t:
        if due(t, constants):
            gates, memory = event(memory, gates, t, key, constants)
        train a step with these gates
        if measures(t, constants):
            memory = observe(memory, signals, t, constants)
    if not memory["sound"]: raise                   # when results reach the host

These are the allocation's methods and properties. An event comes before the step it is
named by, so budget(t, constants) bounds what step t computes with. Its gates go to the
dials, and `transitions` say what becomes of the factors.

A budget is never exceeded. It is met exactly where one component more counts one: with
unit=components and no ties. Of tied layers and of parameters less may be open, by less
than what still had a claim counts; and the `variance` selector may ask for less.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowrank.allocate import ranking, schedules
from lowrank.allocate.importance import Constants, Importance, Memory, Signals
from lowrank.allocate.normalisers import NORMALISERS
from lowrank.allocate.schedules import at
from lowrank.allocate.selectors import Contest, select
from lowrank.allocate.singular import Singular, importance_of
from lowrank.allocate.slots import Slots, Unit
from lowrank.core.arrays import Key
from lowrank.core.errors import BadInput

Flat = Float[Array, " components"]
Step = Int[Array, ""] | int


@dataclasses.dataclass(frozen=True)
class Program:
    """What trials of a pack must share.

    Attributes:
      importance: A name in `IMPORTANCES`; None if ranks never move.
      basis: In which it is taken: "own" or "singular", see `singular.Singular`.
      normaliser, selector: Names in their tables.
      unit: What budgets count.
      revivable: Whether losers keep their gates until the last event.
      squeezed: Whether corrections are written by their singular values at events.
      measure_every: Steps between two measurements; 0 if what is needed is measured
        once, before the first step and before any event.
    """

    importance: str | None = None
    basis: str = "own"
    normaliser: str = "none"
    selector: str = "top"
    unit: Unit = "components"
    revivable: bool = False
    squeezed: bool = False
    measure_every: int = 0

    @property
    def judges(self) -> Importance | None:
        """What components are ranked by; None if ranks never move."""
        if self.importance is None:
            return None
        return importance_of(self.importance, self.basis)


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """An allocator on a layout.

    Attributes:
      slots: The layout.
      program: Its static part.
      constants: Its numbers, for one trial.
    """

    slots: Slots
    program: Program
    constants: Mapping[str, np.ndarray]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals to measure."""
        importance = self.program.judges
        return frozenset() if importance is None else importance.signals

    @property
    def measure_every(self) -> int:
        """Steps between two measurements; 0: once, before the loop, if `needs` any."""
        return self.program.measure_every

    def check_available(self, available: Collection[str], where: str) -> None:
        """Raises BadInput if a signal cannot be measured.

        Args:
          available: What can be.
          where: Of what: a delta, a pack, a model.
        """
        if missing := sorted(self.needs - {*available}):
            singular = self.program.basis == "singular" and {*missing} <= Singular.READS
            remedy = "ranks.basis=own" if singular else "ranks.importance to another"
            raise BadInput(
                f"importance {self.program.importance!r} in the {self.program.basis} "
                f"basis needs the signal {missing[0]!r}, which cannot be measured for "
                f"{where}; it offers {', '.join(sorted(available)) or 'none'}. Set "
                f"{remedy}"
            )

    def init(self, factors: Mapping[str, Any] | None = None) -> Memory:
        """What is remembered of one trial before its first step.

        Args:
          factors: The trained tree or its shapes, for importances that look at it.
        """
        importance = self.program.judges
        own = {} if importance is None else importance.init(self.slots, factors)
        return {
            "importance": own,
            # The winners of the last event, which in revivable mode are not the gates.
            "kept": jnp.ones(self.slots.num_components),
            # Whether every importance that was asked for was a number.
            "sound": jnp.bool_(True),
        }

    def gates(self, constants: Constants) -> Flat:
        """The gates of the first step."""
        return self.slots.prefix(constants["ranks"])

    def due(self, step: Step, constants: Constants) -> Bool[Array, ""]:
        """Whether ranks are reconsidered before this step."""
        return at(constants["due"], step)

    def measures(self, step: Step, constants: Constants) -> Bool[Array, ""]:
        """Whether what this step measures will be used; never, if measured once."""
        if not self.measure_every:
            return jnp.bool_(False)
        step = jnp.asarray(step, jnp.int32)
        return (step % self.measure_every == 0) & (step < constants["end"])

    def budget(self, step: Step, constants: Constants) -> Int[Array, ""]:
        """The most that is kept at this step; without ties, in components: so much."""
        return at(constants["budget"], step)

    def forward_budget(self, step: Step, constants: Constants) -> Int[Array, ""]:
        """The most this step computes with: if revivable all, until the last event."""
        if not self.program.revivable:
            return self.budget(step, constants)
        step = jnp.where(jnp.asarray(step) < constants["end"], 0, step)
        return self.budget(step, constants)

    def observe(
        self, memory: Memory, signals: Signals, step: Step, constants: Constants
    ) -> Memory:
        """The memory with what a step has measured.

        Raises:
          BadInput: A signal that is needed is not among those given.
        """
        del step
        importance = self.program.judges
        if importance is None:
            return memory
        self.check_available(signals, "this step")
        own = importance.observe(self.slots, memory["importance"], signals, constants)
        return {**memory, "importance": own}

    def event(
        self, memory: Memory, gates: Flat, step: Step, key: Key, constants: Constants
    ) -> tuple[Flat, Memory]:
        """Moves ranks, whether or not it is due: the caller asks `due`.

        Where the importance of an open component is not a finite number, or nothing
        was measured, nothing moves and `memory["sound"]` is false from then on; the
        caller is to raise.

        Args:
          memory: Of the trial.
          gates: Before the event.
          step: The step that follows.
          key: The trial's; the step is folded in here.
          constants: Of the trial.

        Returns:
          The new gates and the new memory.
        """
        program, slots = self.program, self.slots
        importance = program.judges
        if importance is None:
            return gates, memory
        constants = jax.tree.map(jnp.asarray, dict(constants))
        own, is_open = memory["importance"], gates != 0
        values = importance.values(
            slots, own, gates, constants, jax.random.fold_in(key, jnp.asarray(step))
        )
        values = jnp.where(is_open, values, 0)
        sound = jnp.all(jnp.isfinite(values)) & importance.ready(own)
        values = NORMALISERS[program.normaliser](slots, values, gates)
        contest = Contest(
            slots=slots,
            unit=program.unit,
            seats=ranking.seats(slots, values, gates),
            budget=self.budget(step, constants),
            least=constants["least"],
            most=constants["most"],
            moves=at(constants["moves"], step),
            pool=constants["pool"],
            add=constants["add"],
            threshold=constants["threshold"],
        )
        kept = jnp.where(sound, select(program.selector, contest), gates)
        new = kept
        if program.revivable:
            new = jnp.where(jnp.asarray(step) < constants["end"], gates, kept)
        own = importance.forget(slots, own, (new != 0) & ~is_open)
        return new, {"importance": own, "kept": kept, "sound": memory["sound"] & sound}

    def average_budget(self) -> float:
        """The mean of `budget` over the run's steps: the most that is kept on average.

        With ties, or in parameters, a run may keep less: count its gates for what it
        did keep.
        """
        return schedules.average(self.constants["budget"])

    def average_forward_budget(self) -> float:
        """The mean of `forward_budget` over the run's steps, a bound like the other."""
        table = self.constants["budget"]
        if self.program.revivable:
            before = np.arange(len(table)) < self.constants["end"]
            table = np.where(before, table[0], table)
        return schedules.average(table)


def pack(
    allocations: Sequence[Allocation],
) -> tuple[Allocation, dict[str, np.ndarray]]:
    """One allocation for all trials of a pack, and the constants of each.

    A trial whose ranks never move fits into any pack: its events are never due.

    Returns:
      The allocation, and constants with a leading axis of trials.

    Raises:
      BadInput: The trials differ in more than numbers.
    """
    moving = [one for one in allocations if one.program.importance is not None]
    first = (moving or list(allocations))[0]
    for trial, one in enumerate(allocations):
        if one in moving and one.program != first.program:
            raise BadInput(
                f"trial {trial} allocates ranks by {one.program}, another of its pack "
                f"by {first.program}; trials that differ so cannot share a program"
            )
        if one.program.unit != first.program.unit:
            raise BadInput(
                f"trial {trial} counts its budget in {one.program.unit}, another of "
                f"its pack in {first.program.unit}; set ranks.unit alike, which for "
                "given and shuffled ranks is components"
            )
        if _layout(one.slots) != _layout(first.slots):
            raise BadInput(
                f"trial {trial} holds other components than its pack: sites, max_rank "
                "and ties must be alike; ranks, minima and maxima may differ"
            )
        for name, value in first.constants.items():
            if one.constants[name].shape != value.shape:
                raise BadInput(
                    f"trial {trial} runs for another number of steps than its pack"
                )
    names = first.constants
    stacked = {n: np.stack([one.constants[n] for one in allocations]) for n in names}
    return first, stacked


def _layout(slots: Slots) -> list[Any]:
    blank = {"ranks": 0, "least": 0, "most": None}
    return [dataclasses.replace(one, **blank) for one in slots.competitors]
