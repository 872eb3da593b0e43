"""Whether a model and its loss treat the examples of a batch apart.

What is measured of every example by itself (`train.probes`) is that of the batch only
where they do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.core.errors import BadInput
from lowrank.train.losses import Loss

#: Largest relative difference between a batch and its examples that rounding explains.
TOLERANCE = 1e-2
#: Examples that the check is made on.
_CHECKED = 4


def check_examples_apart(
    model: Callable[..., Any],
    loss: Loss,
    frozen: Frozen,
    trained: Trained,
    dials: Dials,
    constants: Mapping[str, Array],
    batch: Mapping[str, np.ndarray],
) -> None:
    """Refuses models and losses in which the examples of a batch meet.

    Compares the loss of some examples together with the sum of their losses one by one:
    a small compilation, before that of the step. What is trained is disturbed for it,
    so that no zero of the start hides anything. A coupling that happens to leave the
    loss of these examples alone, to a hundredth of it, is not found.

    Args:
      model, loss: As for `make_step`.
      frozen, trained, dials, constants: Of one trial.
      batch: Of that trial.

    Raises:
      BadInput: They differ.
    """
    few = {name: x[:_CHECKED] for name, x in batch.items()}

    def both(frozen: Frozen, trained: Trained, dials: Dials, few: Any):
        trained = _disturbed(trained)

        def judged(rows: Mapping[str, Array]) -> Array:
            outputs = model(frozen, trained, rows, dials=dials, key=None)
            return loss(outputs, rows, constants).loss

        alone = lambda row: judged({name: x[None] for name, x in row.items()})
        return judged(few), jnp.sum(jax.vmap(alone)(few))

    whole, apart = (float(x) for x in jax.jit(both)(frozen, trained, dials, few))
    if abs(whole - apart) > TOLERANCE * max(abs(whole), abs(apart), 1e-6):
        raise BadInput(
            f"the loss of {_CHECKED} examples together is {whole:.6g}, and one by one "
            f"{apart:.6g}: the model or the loss lets examples of a batch meet (batch "
            "statistics, contrasts), so gates have no gradient per example. Set "
            "ranks.importance to one that needs none: norm, sensitivity"
        )


def _disturbed(trained: Trained) -> Any:
    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
    return structure.unflatten(map(noise, keys, leaves))
