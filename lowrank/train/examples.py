"""What every example of a batch says of every gate: gradients one by one.

With l_n the loss of example n alone, summed over its targets, and g_j a gate,

    gate_gradient_j = sum_n dl_n/dg_j / sum_n w_n
    gate_fisher_j   = sum_n (dl_n/dg_j)^2 / #{n: w_n > 0}

the gradient of the batch's mean loss, and the diagonal of the gates' empirical Fisher
information, both over those rows that are measured. A model runs on each example by
itself, mapped over all of them, so nothing is asked of how it lays out its batch. It
costs a pass forward and one back through activations; gradients of weights are not
formed, and per example and site max_rank numbers are held. Dropout is off: what is
measured is the model that will be used.

That is the sum over a batch only for a model that treats examples apart, without
batch statistics or losses that compare them. `check_examples_apart` finds out.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.core.errors import BadInput
from lowrank.train.losses import Loss

#: The signals that are measured here.
OF_EXAMPLES = frozenset({"gate_gradient", "gate_fisher"})
#: Largest relative difference between a batch and its examples that rounding explains.
TOLERANCE = 1e-2
#: Examples that the check is made on.
_CHECKED = 4
#: Of so many rows of a batch one is measured, at a part of the cost
#: (`experiments.bench.ranks` says what is left of it).
ONE_IN = 4


def gauge(
    model: Callable[..., Any], loss: Loss, accumulate: int = 1, one_in: int = ONE_IN
) -> Callable:
    """Builds (frozen, trained, dials, constants, batch) -> both signals, by path.

    Args:
      model: The adapted model: (frozen, trained, batch, dials=, key=) -> outputs.
      loss: What is minimized, as sums.
      accumulate: Parts that a batch is measured in, to hold fewer activations.
      one_in: Of so many rows one is measured. A batch is drawn at random, so that is a
        smaller batch, at a fraction of the cost.
    """

    def measure(
        frozen: Frozen,
        trained: Trained,
        dials: Dials,
        constants: Mapping[str, Array],
        batch: Mapping[str, Array],
    ) -> dict[str, dict[str, Array]]:
        gates = {path: own["gate"] for path, own in dials.items()}

        def of_example(gates: Any, row: Mapping[str, Array]):
            own = {path: {**dials[path], "gate": gate} for path, gate in gates.items()}
            alone = {name: x[None] for name, x in row.items()}
            outputs = model(frozen, trained, alone, dials=own, key=None)
            sums = loss(outputs, alone, constants)
            return sums.loss, sums.weight

        def of_part(part: Mapping[str, Array]):
            one = jax.grad(of_example, has_aux=True)
            each, weight = jax.vmap(one, in_axes=(None, 0))(gates, part)
            real = weight > 0
            # A row of padding may have nothing to take a mean of, and so no gradient.
            blank = lambda g: jnp.where(
                real.reshape(real.shape + (1,) * (g.ndim - 1)), g, 0
            )
            each = jax.tree.map(blank, each)
            total = jax.tree.map(lambda g: jnp.sum(g, axis=0), each)
            squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), each)
            return total, squares, jnp.sum(weight), jnp.sum(real.astype(jnp.float32))

        # Each device that holds rows of the batch measures some of its own.
        rows = {name: x[::one_in] for name, x in batch.items()}
        in_parts = math.gcd(accumulate, next(iter(rows.values())).shape[0])
        if in_parts == 1:
            found = of_part(rows)
        else:
            cut = lambda x: x.reshape(in_parts, -1, *x.shape[1:])
            parts = jax.lax.map(of_part, {n: cut(x) for n, x in rows.items()})
            found = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
        total, squares, weight, count = found
        over = lambda tree, by: jax.tree.map(lambda x: x / jnp.maximum(by, 1e-9), tree)
        return {
            "gate_gradient": over(total, weight),
            "gate_fisher": over(squares, count),
        }

    return measure


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
      model, loss: As for `gauge`.
      frozen, trained, dials, constants: Of one trial.
      batch: Of that trial.

    Raises:
      BadInput: They differ.
    """
    few = {name: jnp.asarray(x[:_CHECKED]) for name, x in batch.items()}

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
