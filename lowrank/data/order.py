"""What all training data shares: seeds, positions, and streams of random numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput, Corrupt
from lowrank.data.buckets import MAX_SEED


def generator(*numbers: int) -> np.random.Generator:
    """The stream of some numbers; their first tells streams of equal seeds apart."""
    # Both algorithms are named, so that no default of NumPy can change the order.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def checked_seeds(trial_seeds: Sequence[int]) -> tuple[int, ...]:
    """One seed per trial.

    Raises:
      BadInput: There is none, or one is out of range.
    """
    seeds = tuple(int(seed) for seed in trial_seeds)
    if not seeds or any(not 0 <= seed < MAX_SEED for seed in seeds):
        raise BadInput(
            "trial seeds must be one or more numbers from 0 to 2**31 - 1, not "
            f"{list(trial_seeds)}"
        )
    return seeds


def place(step: int, num_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch, number within it) of a step.

    Raises:
      IndexError: There is no such step.
    """
    if not 0 <= step < num_steps:
        raise IndexError(f"step {step} is not one of {num_steps}")
    return divmod(step, steps_per_epoch)


def check_start(step: int, num_steps: int) -> None:
    """Refuses to start beyond the end.

    Raises:
      BadInput: It is beyond the end.
    """
    if not 0 <= step <= num_steps:
        raise BadInput(f"cannot start at step {step} of a run of {num_steps} steps")


def check_state(
    here: Mapping[str, Any], state: Mapping[str, Any], num_steps: int
) -> None:
    """Refuses a stored state whose position means another batch here.

    Args:
      here: The state of this run at any step.
      state: The stored one.
      num_steps: Of this run.

    Raises:
      Corrupt: A field is missing or differs; names it and both values.
    """
    for name, value in here.items():
        if name not in state:
            raise Corrupt(f"the stored data state has no {name!r}; start over")
        if name != "position" and state[name] != value:
            raise Corrupt(
                f"the stored run used other data: {name} was {state[name]!r} and "
                f"is {value!r}. Restore the old setting, or start over with "
                "force=true."
            )
    if not 0 <= state["position"] <= num_steps:
        raise Corrupt(
            f"the stored data position {state['position']} is not among the "
            f"{num_steps} steps of this run; start over with force=true"
        )
