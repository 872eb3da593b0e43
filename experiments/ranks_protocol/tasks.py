"""What arms are compared on: a table of tasks, and what the study asks of each.

A task says which seeds may share a pack, gives the adapted model and the batches, and
judges what came of a training. The study knows nothing else of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from experiments.ranks_protocol import real, teachers
from experiments.ranks_protocol.settings import Protocol as Settings
from experiments.ranks_protocol.teachers import EQUAL, Family, Teacher
from lowrank.adapt.attach import Adapted, attach
from lowrank.adapt.rules import Rule
from lowrank.allocate.slots import Slots, Unit
from lowrank.core.errors import UnknownName, nearest
from lowrank.data.rows import RowPipeline
from lowrank.deltas.lora import LoRA
from lowrank.run.fit import Fit
from lowrank.train.batches import TrainBatches
from lowrank.train.losses import Loss, squared_error

#: The rank that rules give, and components that layers hold while ranks move.
RANK, HELD = 2, 8


class Task(Protocol):
    """A comparison's ground.

    Attributes:
      name: In the tables.
      unit: What budgets count.
      claim: What the wanted outcomes say of it: "gain", "equal", or None.
      has_truth: Whether an oracle knows which ranks are right.
      without: Arms that say nothing here.
      loss: What is minimized.
      in_points: Whether errors are shares of rows, whose differences count; else their
        ratios do.
      apart: Whether every arm has packs of its own: packs of one size are one program,
        which counts where compiling takes longer than training.
      identity: What results depend on, beside the protocol, as JSON types.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Unit: ...

    @property
    def claim(self) -> str | None: ...

    @property
    def has_truth(self) -> bool: ...

    @property
    def without(self) -> frozenset[str]: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def in_points(self) -> bool: ...

    @property
    def apart(self) -> bool: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def place(self, seed: int, settings: Settings) -> int:
        """A number that seeds which may share a pack have in common."""
        ...

    def model(self, seed: int, settings: Settings) -> Adapted:
        """The adapted model of a seed, and of all others at its place."""
        ...

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        """What the model reads of a batch."""
        ...

    def batches(self, seeds: Sequence[int], settings: Settings) -> TrainBatches:
        """Training data of a pack: one seed per trial, all at one place."""
        ...

    def truth(self, seed: int, settings: Settings) -> Mapping[str, int] | None:
        """The right ranks, by the name of the layer."""
        ...

    def budget(self, seed: int, slots: Slots, settings: Settings) -> int:
        """What every arm has at the end, in the task's unit."""
        ...

    def errors(
        self, fitted: Fit, seeds: Sequence[int], settings: Settings
    ) -> list[float]:
        """The error of every trial on rows that it was not trained on.

        Positive, unless it is in points. Of tuning seeds and of judged ones these may
        be other rows.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """A task with a teacher of known ranks; see `Task`.

    The seeds of one base share a pack: the base is frozen, and everything else, the
    teacher included, is a seed's own.
    """

    name: str
    family: Family
    unit: Unit = "components"
    claim: str | None = None
    without: frozenset[str] = frozenset()
    has_truth: bool = True
    loss: Loss = squared_error
    in_points: bool = False
    apart: bool = False

    @property
    def identity(self) -> Mapping[str, Any]:
        family = dataclasses.asdict(self.family)
        return {"family": family, "unit": self.unit, "rank": RANK, "held": HELD}

    def place(self, seed: int, settings: Settings) -> int:
        return seed % settings.bases

    def teacher(self, seed: int, settings: Settings) -> Teacher:
        """The seed's teacher and data."""
        return _teacher(
            self.family,
            self.place(seed, settings),
            seed,
            rows=settings.rows,
            noise=settings.noise,
            test_rows=settings.test_rows,
        )

    def model(self, seed: int, settings: Settings) -> Adapted:
        return _model(self.family, self.place(seed, settings), settings.batch_size)

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return batch["x"]

    def batches(self, seeds: Sequence[int], settings: Settings) -> TrainBatches:
        return RowPipeline(
            {seed: self.teacher(seed, settings).train for seed in {*seeds}},
            trial_seeds=seeds,
            batch_size=settings.batch_size,
            num_steps=settings.steps,
        )

    def truth(self, seed: int, settings: Settings) -> Mapping[str, int]:
        return self.teacher(seed, settings).ranks

    def budget(self, seed: int, slots: Slots, settings: Settings) -> int:
        return slots.spent(slots.from_names(self.truth(seed, settings)), self.unit)

    def errors(
        self, fitted: Fit, seeds: Sequence[int], settings: Settings
    ) -> list[float]:
        rows = {seed: self.teacher(seed, settings).test for seed in {*seeds}}
        one = lambda frozen, trained, dials, x: fitted.adapted.apply(
            frozen, trained, x, dials=dials
        )
        each: Callable[..., Any] = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))
        x, y = (np.stack([getattr(rows[s], n) for s in seeds]) for n in ("x", "y"))
        found = each(fitted.frozen, fitted.chosen, fitted.state.dials, x)
        off = np.asarray(found, np.float64) - y
        return np.mean(off**2, axis=(1, 2)).tolist()


# Every arm asks for the same ones again.
_teacher = functools.lru_cache(maxsize=128)(teachers.draw)


@functools.lru_cache(maxsize=32)
def _model(family: Family, base: int, batch_size: int) -> Adapted:
    params = teachers.draw_base(family, base)
    x = jax.ShapeDtypeStruct((batch_size, teachers.WIDTH), np.dtype(np.float32))
    # alpha = ref_rank: the scale is one, as in the teacher.
    rule = Rule("*/kernel", LoRA(alpha=float(RANK)), rank=RANK, max_rank=HELD)
    return attach(teachers.apply, params, x, rules=[rule], ref_rank=RANK)


#: By name. A task joins by its entry.
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        # Ranks differ between layers: there is much to gain.
        Synthetic("heterogeneous", Family(), claim="gain"),
        # Uniform ranks are right: whoever gains here gains by something else. There is
        # no other allocation of these ranks, and the oracle's is the baseline's.
        Synthetic(
            "homogeneous",
            Family(ranks=EQUAL),
            claim="equal",
            without=frozenset({"oracle", "shuffled"}),
        ),
        # Some directions of the inputs hardly occur.
        Synthetic("anisotropic", Family(anisotropy=1.0)),
        # Later components of a correction matter less.
        Synthetic("decaying", Family(decay=1.0)),
        # Layers differ in what a component costs, and budgets count parameters.
        Synthetic("unequal", Family(widths=(16, 64)), unit="parameters"),
    )
}


def chosen(names: Sequence[str]) -> list[Task]:
    """Tasks by name.

    Raises:
      UnknownName: There is none of that name.
    """
    return [find(name) for name in names]


def find(name: str) -> Task:
    """A task by its name; of real text, by source and rank: "intents@4".

    Raises:
      UnknownName: There is none of that name.
    """
    task = TASKS.get(name) or real.at(name)
    if task is None:
        known = [*TASKS, *(f"{source}@4" for source in real.SOURCES)]
        raise UnknownName(
            f"tasks has {name!r}, which is none. Nearest: {nearest(name, known)}. "
            f"There are {', '.join(known)}, and other ranks."
        )
    return task
