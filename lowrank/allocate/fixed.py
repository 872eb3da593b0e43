"""Allocators whose ranks never move: uniform, given, and the controls of a claim."""

from collections.abc import Mapping

import numpy as np

from lowrank.allocate import dealing
from lowrank.allocate.adaptive import Allocator
from lowrank.allocate.allocation import Allocation, Program
from lowrank.allocate.slots import Slots, Unit
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec


def still(slots: Slots, ranks: np.ndarray, num_steps: int, unit: Unit) -> Allocation:
    """An allocation of ranks that stay as they are.

    Raises:
      BadInput: A rank is out of its bounds, or tied layers differ.
    """
    slots.check_ranks(ranks, "ranks")
    least, most = slots.group_bounds(slots.least, slots.most)
    steps = num_steps + 1
    spent = slots.spent(ranks, unit)
    slots.check_budget(spent, unit, "the budget of these ranks")
    constants = {
        "budget": np.full(steps, spent, np.int32),
        "due": np.zeros(steps, bool),
        "end": np.int32(0),
        "ranks": ranks.astype(np.int32),
        "least": least.astype(np.int32),
        "most": most.astype(np.int32),
        "moves": np.zeros(steps, np.int32),
        "pool": np.int32(1),
        "add": np.int32(1),
        "threshold": np.float32(1),
        "decay": np.float32(0),
        "deviation_decay": np.float32(0),
    }
    return Allocation(slots, Program(unit=unit), constants)


@spec
class Uniform(Allocator):
    """The ranks of the rules; or a budget dealt out in proportion to them.

    Attributes:
      budget: By default what the ranks count.
      unit: What it counts.
    """

    budget: int | None = None
    unit: Unit = "components"

    def on(self, slots: Slots, num_steps: int) -> Allocation:
        ranks = slots.ranks
        if self.budget is not None:
            ranks = dealing.deal(slots, slots.ranks, self.budget, self.unit)
        return still(slots, ranks, num_steps, self.unit)


@spec
class Given(Allocator):
    """Ranks by name: those of another run, retrained from the start.

    Attributes:
      ranks: Of every layer, by its name or by its site's.
    """

    ranks: Mapping[str, int]

    def on(self, slots: Slots, num_steps: int) -> Allocation:
        return still(slots, slots.from_names(self.ranks), num_steps, "components")


@spec
class Ramp(Allocator):
    """Ranks that change linearly with depth (PRILoRA's, arXiv:2401.11316).

    Only the ranks are PRILoRA's, not its pruning of entries of a. The cheapest
    allocation that is not uniform, and a control: it looks at nothing.

    Attributes:
      ratio: Rank of the last layer over that of the first; 3 is the paper's 4 to 12.
      budget: By default what the rules' ranks count.
      unit: What it counts.
    """

    ratio: float = 3.0
    budget: int | None = None
    unit: Unit = "components"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1e6:
            raise BadInput(
                f"ranks.ratio = {self.ratio} is out of range: the last layer's rank "
                "over the first's, a positive number"
            )

    def on(self, slots: Slots, num_steps: int) -> Allocation:
        budget = self.budget
        if budget is None:
            budget = slots.spent(slots.ranks, self.unit)
        # `deal` weighs ranks, whatever the budget counts: no cost bends the ramp.
        weights = dealing.ramp(slots, self.ratio)
        ranks = dealing.deal(slots, weights, budget, self.unit)
        return still(slots, ranks, num_steps, self.unit)


@spec
class Shuffled(Allocator):
    """Ranks of another run on the wrong layers: does it matter which ones? A control.

    Attributes:
      ranks: As for `Given`.
      seed: Of the shuffle.
    """

    ranks: Mapping[str, int]
    seed: int = 0

    def on(self, slots: Slots, num_steps: int) -> Allocation:
        ranks = dealing.shuffle(slots, slots.from_names(self.ranks), self.seed)
        return still(slots, ranks, num_steps, "components")
