"""How large the budget is at each step: a table of whole numbers, made before the run.

A budget is looked up, not computed, inside the program. So it is exact: the formulas
are evaluated in whole numbers of any length, where float32 is one component off in some
runs (the cubic from 576 to 144 in 300 steps), and off by many parameters in most. And
it is data: trials of a pack may differ in budgets, windows and even in the shape of the
schedule. A table takes four bytes a step.

With k = t - begin, n = end - begin and p = k / n clipped to [0, 1], a shape q(p) climbs
from q(0) = 0 to q(1) = 1, and the budget is first + (last - first) q(p), rounded down
when it shrinks and up when it grows, so that it is `last` exactly from `end` on.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from lowrank.core.errors import BadInput, UnknownName, nearest

#: q(k / n) as a fraction of whole numbers.
Shape = Callable[[int, int], tuple[int, int]]
#: A cosine is rational at p = 0, 1/3, 1/2, 2/3 and 1, and exact there at this grain.
_GRAIN = 10**12


def _cosine(k: int, n: int) -> tuple[int, int]:
    return round(_GRAIN * (1 - math.cos(math.pi * k / n)) / 2), _GRAIN


#: constant   q = 0; first and last are one number
#: linear     q = p
#: cubic      q = 1 - (1 - p)^3: fast, then slow. AdaLoRA (Zhang et al. 2023,
#:            arXiv:2303.10512) as in its code. Eq. 14 of the paper has p = (t - t_i -
#:            t_f) / (T - t_i - t_f), exceeds `first` at t_i and never reaches `last`.
#: late_cubic q = p^3: slow, then fast (Mao et al. 2024, arXiv:2405.17357)
#: cosine     q = (1 - cos(pi p)) / 2
SHAPES: Mapping[str, Shape] = {
    "constant": lambda k, n: (0, 1),
    "linear": lambda k, n: (k, n),
    "cubic": lambda k, n: (n**3 - (n - k) ** 3, n**3),
    "late_cubic": lambda k, n: (k**3, n**3),
    "cosine": _cosine,
}
#: Grows by a pace at every event: min(last, first + pace j) after j events.
STAIRCASE = "staircase"


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps in which ranks move.

    Attributes:
      begin: The budget is the first one up to this step.
      end: The step of the last event; from it on, ranks stand still.
      every: Steps between two events.
      num_steps: Steps of the run, numbered 0 to num_steps - 1.
    """

    begin: int
    end: int
    every: int
    num_steps: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def num_events(self) -> int:
        return max(-(-self.length // self.every), 1)

    def events(self) -> np.ndarray:
        """Whether ranks are reconsidered before each step 0 to num_steps.

        Every `every` steps after `begin`, and at `end` whatever the distance.
        """
        after = np.arange(self.num_steps + 1) - self.begin
        inside = (after > 0) & (after < self.length) & (after % self.every == 0)
        return inside | (after == self.length)

    def passed(self, step: int) -> int:
        """Events up to and including the one before `step`."""
        if step >= self.end:
            return self.num_events
        return max(step - self.begin, 0) // self.every


def window(begin: int | float, end: int | float, every: int, num_steps: int) -> Window:
    """The window from steps (whole numbers) or fractions of the run (floats).

    Raises:
      BadInput: It is not within the run, or leaves no step after its last event.
    """
    if every < 1:
        raise BadInput(f"ranks.every = {every}: events are at least 1 step apart")
    first, last = (
        _step(name, value, num_steps)
        for name, value in (("begin", begin), ("end", end))
    )
    if not 0 <= first <= last < num_steps:
        raise BadInput(
            f"ranks.begin = {begin!r} and ranks.end = {end!r} are steps {first} and "
            f"{last} of a run of {num_steps}: they must come in this order, from 0 to "
            f"{num_steps - 1}, so that the last ranks are trained for a step at least. "
            "Give whole numbers for steps, 0.0 to 1.0 for fractions of the run; or "
            "train longer"
        )
    return Window(first, last, every, num_steps)


def _step(name: str, value: int | float, num_steps: int) -> int:
    if isinstance(value, int):
        return value
    if not 0.0 <= value <= 1.0:
        raise BadInput(
            f"ranks.{name} = {value!r} is no fraction of the run: 0.0 to 1.0; a number "
            "of steps has no decimal point"
        )
    return math.floor(value * num_steps + 0.5)


def curve(
    shape: str, window: Window, first: int, last: int, pace: int | None = None
) -> np.ndarray:
    """The budget that the formula gives at steps 0 to num_steps.

    Args:
      shape: A name in `SHAPES`, or "staircase".
      window: When it moves.
      first, last: The budgets before and after it.
      pace: Of a staircase: growth per event; by default the smallest that suffices.

    Returns:
      int32 of shape (num_steps + 1,).

    Raises:
      UnknownName: There is no such shape.
      BadInput: A constant is to move, or a staircase to shrink or to stop too low.
    """
    if shape not in SHAPES and shape != STAIRCASE:
        raise UnknownName(
            f"ranks.schedule = {shape!r} is unknown. Nearest: "
            f"{nearest(shape, [*SHAPES, STAIRCASE])}"
        )
    if shape == STAIRCASE:
        values = _stairs(window, first, last, pace)
    elif shape == "constant" and first != last:
        raise BadInput(
            f"ranks.schedule = 'constant' cannot lead from a budget of {first} to "
            f"{last}; set ranks.start=1.0, or take another schedule"
        )
    else:
        values = [
            _between(SHAPES[shape], k, window.length, first, last, last > first)
            for k in range(window.length)
        ]
    return _outside(window, first, last, values)


def moves(window: Window, first: int) -> np.ndarray:
    """How many components change places: round(first (1 - p^3)), 0 from `end` on.

    ElaLoRA (arXiv:2504.00254). Departs from its code in rounding halves up.
    """
    n = max(window.length, 1) ** 3
    values = [(2 * first * (n - k**3) + n) // (2 * n) for k in range(window.length)]
    return _outside(window, first, 0, values)


def held(table: np.ndarray, window: Window) -> np.ndarray:
    """The budget in force: that of the last event, since ranks move only there."""
    steps = np.arange(len(table))
    last = np.maximum.accumulate(np.where(window.events(), steps, 0))
    return table[last]


def average(table: np.ndarray) -> float:
    """The mean budget over the steps of the run: what adapters cost in training."""
    return float(np.mean(table[:-1], dtype=np.float64))


def at(
    table: Shaped[Array | np.ndarray, " steps"], step: Int[Array, ""] | int
) -> Shaped[Array, ""]:
    """An entry of a table; before its first step the first one, after it the last."""
    return jnp.asarray(table)[
        jnp.clip(jnp.asarray(step, jnp.int32), 0, table.shape[-1] - 1)
    ]


def _between(shape: Shape, k: int, n: int, first: int, last: int, up: bool) -> int:
    part, whole = shape(k, n)
    change = (last - first) * part
    return first - (-change // whole) if up else first + change // whole


def _stairs(window: Window, first: int, last: int, pace: int | None) -> list[int]:
    """IncreLoRA's growth (arXiv:2308.12043), without running past the budget."""
    if last < first:
        raise BadInput(
            f"ranks.schedule = 'staircase' grows, and the budget is to fall from "
            f"{first} to {last}; set ranks.start below 1.0, or take 'cubic'"
        )
    needed = -(-(last - first) // window.num_events)
    pace = needed if pace is None else pace
    if pace < needed:
        raise BadInput(
            f"a staircase from {first} to {last} in {window.num_events} events climbs "
            f"{needed} at each, and may climb {pace}: widen ranks.begin to ranks.end, "
            "lower ranks.every, or let more layers grow at once"
        )
    steps = range(window.begin, window.end)
    return [min(last, first + pace * window.passed(step)) for step in steps]


def _outside(window: Window, first: int, last: int, inside: list[int]) -> np.ndarray:
    after = window.num_steps + 1 - window.end
    return np.array([*[first] * window.begin, *inside, *[last] * after], np.int32)
