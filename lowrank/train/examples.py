"""What every example of a batch says of every gate, from the step's own pass.

With l_n the loss of example n alone, summed over its targets, and g_j a gate,

    gate_gradient_j = sum_n dl_n/dg_j / sum_n w_n
    gate_fisher_j   = sum_n (dl_n/dg_j)^2 / #{n: w_n > 0}

the gradient of the batch's mean loss, and the diagonal of the gates' empirical Fisher
information. Every example gets gates of its own, all alike, and the model is mapped
over examples and their gates. The loss depends on the gates of example n through l_n
alone, so the step's one pass back, which forms the gradients of weights anyway, yields
every dl_n/dg_j beside them. `python -m experiments.bench.ranks` says what that costs;
held are max_rank numbers per example and layer more.

What is trained stays what it was, up to rounding, with one difference: where the model
draws random numbers, examples draw each for itself. Dropout of activations does so in
any case; components that `rank_dropout` leaves out are, in a step that measures, left
out for one example and not for all. Signals are measured under this noise.

That is the sum over a batch only for a model that treats examples apart, without
batch statistics or losses that compare them. `check_examples_apart` finds out.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank.core.arrays import Dials, Frozen, Key, Scalar, Trained
from lowrank.core.errors import BadInput
from lowrank.train.losses import Loss

#: The signals that are measured here.
OF_EXAMPLES = frozenset({"gate_gradient", "gate_fisher"})
#: Largest relative difference between a batch and its examples that rounding explains.
TOLERANCE = 1e-2
#: Examples that the check is made on.
_CHECKED = 4

#: Path -> gates, (rows, *stack, max_rank).
RowGates = Mapping[str, Float[Array, " *rows_gate"]]


class OfGates(NamedTuple):
    """Sums over examples, so that parts of a batch add up.

    Attributes:
      gradient: Path -> sum_n dl_n/dg, (*stack, max_rank).
      squares: Path -> sum_n (dl_n/dg)^2.
      count: Examples with a weight.
    """

    gradient: dict[str, Array]
    squares: dict[str, Array]
    count: Scalar

    def signals(self, weight: Scalar) -> dict[str, dict[str, Array]]:
        """Both signals, by path; `weight` is that of all targets together."""
        over = lambda tree, by: jax.tree.map(lambda x: x / jnp.maximum(by, 1e-9), tree)
        return {
            "gate_gradient": over(self.gradient, weight),
            "gate_fisher": over(self.squares, self.count),
        }


def own_gates(dials: Dials, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The gates of a trial once per row of a batch."""
    rows = next(iter(batch.values())).shape[0]
    wide = lambda gate: jnp.broadcast_to(gate, (rows, *gate.shape))
    return {path: wide(own["gate"]) for path, own in dials.items()}


def apart(
    model: Callable[..., Any],
    frozen: Frozen,
    trained: Trained,
    gates: RowGates,
    batch: Mapping[str, Array],
    dials: Dials,
    key: Key | None,
) -> Any:
    """The model's outputs, every row computed by itself with gates of its own.

    Args:
      model: The adapted model: (frozen, trained, batch, dials=, key=) -> outputs.
      frozen, trained, batch, dials, key: Its arguments.
      gates: From `own_gates`; they stand in for those of the dials.
    """

    def one(gates: Mapping[str, Array], row: Mapping[str, Array], key: Key | None):
        own = {path: {**dials[path], "gate": gate} for path, gate in gates.items()}
        alone = {name: x[None] for name, x in row.items()}
        return model(frozen, trained, alone, dials=own, key=key)

    rows = next(iter(batch.values())).shape[0]
    keys = None if key is None else jax.random.split(key, rows)
    outputs = jax.vmap(one)(gates, batch, keys)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], *x.shape[2:]), outputs)


def of_gates(
    slopes: RowGates,
    outputs: Any,
    loss: Loss,
    batch: Mapping[str, Array],
    constants: Mapping[str, Array],
) -> OfGates:
    """Sums what a pass has found; rows without weight have no say.

    Args:
      slopes: dL/d gates of every row, from the sum over the batch.
      outputs, loss, batch, constants: Of the pass: which rows have a weight, the loss
        knows.
    """

    def weight(outputs: Any, row: Mapping[str, Array]) -> Scalar:
        alone = lambda tree: jax.tree.map(lambda x: x[None], tree)
        return loss(alone(outputs), alone(dict(row)), constants).weight

    real = jax.vmap(weight)(outputs, dict(batch)) > 0
    total = jax.tree.map(lambda g: jnp.sum(g, axis=0), dict(slopes))
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), dict(slopes))
    return OfGates(total, squares, jnp.sum(real.astype(jnp.float32)))


def nothing(dials: Dials) -> OfGates:
    """What a step that does not measure has found."""
    gates = {path: jnp.zeros_like(own["gate"]) for path, own in dials.items()}
    return OfGates(gates, gates, jnp.float32(0))


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
