"""What a step's own pass back tells of components, beside the gradients it is for.

Arrays that change nothing go into the model, and the pass is asked for the derivative
by them too. Of what the model holds nothing is computed twice.

Gates of its own for every example, all alike, the model mapped over examples and their
gates: with l_n the loss of example n alone, summed over its targets, and g_j a gate,

    gate_gradient_j = sum_n dl_n/dg_j / sum_n w_n
    gate_fisher_j   = sum_n (dl_n/dg_j)^2 / #{n: w_n > 0}

the gradient of the batch's mean loss, and the diagonal of the gates' empirical Fisher
information: the loss depends on the gates of example n through l_n alone. What is
trained stays what it was, up to rounding, with one difference: where the model draws
random numbers, examples draw each for itself. Dropout of activations does so in any
case; components that `rank_dropout` leaves out are left out for one example here, and
not for all. Signals are measured under this noise. Needs a model that treats examples
apart, without batch statistics or losses that compare them: `train.examples` finds out.

A Gram matrix for every layer, whose derivative by definition (`deltas.product`) are

    G = sum_t u_t^T u_t / sum_n w_n        u_t = x_t a^T

the second moments of what its weight's inputs are in rank space, over those rows that
the loss depends on.

`python -m experiments.bench.ranks` says what gates of examples cost. Held are max_rank
numbers per example and layer, or max_rank^2 per layer.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank.core.arrays import Dials, Frozen, Key, Scalar, Trained
from lowrank.train.losses import Loss

#: Signals that need gates for every example.
OF_EXAMPLES = frozenset({"gate_gradient", "gate_fisher"})
#: Those that need Gram matrices.
OF_INPUTS = frozenset({"activations"})
#: All that are measured here.
OF_PASS = OF_EXAMPLES | OF_INPUTS


class Probes(NamedTuple):
    """What the derivative is taken by, by path; empty where it is not asked for.

    Attributes:
      gates: Of every row of a batch, (rows, *stack, max_rank).
      grams: (*stack, max_rank, max_rank), of any value.
    """

    gates: Mapping[str, Float[Array, " *rows_gate"]]
    grams: Mapping[str, Float[Array, " *gram"]]


class Seen(NamedTuple):
    """Sums over examples, by path, so that parts of a batch add up.

    Attributes:
      gradient: sum_n dl_n/dg, (*stack, max_rank).
      squares: sum_n (dl_n/dg)^2.
      grams: sum_t u_t^T u_t.
      count: Examples with a weight.
    """

    gradient: dict[str, Array]
    squares: dict[str, Array]
    grams: dict[str, Array]
    count: Scalar

    def signals(self, weight: Scalar) -> dict[str, dict[str, Array]]:
        """All of them, by name; `weight` is that of all targets together."""
        over = lambda tree, by: jax.tree.map(lambda x: x / jnp.maximum(by, 1e-9), tree)
        return {
            "gate_gradient": over(self.gradient, weight),
            "gate_fisher": over(self.squares, self.count),
            "activations": over(self.grams, weight),
        }


def probes(dials: Dials, batch: Mapping[str, Array], asked: Collection[str]) -> Probes:
    """What a pass on a batch is asked for, of one trial."""
    rows = next(iter(batch.values())).shape[0]
    gates = {path: own["gate"] for path, own in dials.items()}
    wide = lambda gate: jnp.broadcast_to(gate, (rows, *gate.shape))
    square = lambda gate: jnp.zeros((*gate.shape, gate.shape[-1]), jnp.float32)
    return Probes(
        jax.tree.map(wide, gates) if OF_EXAMPLES & {*asked} else {},
        jax.tree.map(square, gates) if OF_INPUTS & {*asked} else {},
    )


def probed(
    model: Callable[..., Any],
    frozen: Frozen,
    trained: Trained,
    probes: Probes,
    batch: Mapping[str, Array],
    dials: Dials,
    key: Key | None,
) -> Any:
    """The model's outputs with probes in it: every row by itself, if gates are its own.

    Args:
      model: The adapted model: (frozen, trained, batch, dials=, key=) -> outputs.
      frozen, trained, batch, dials, key: Its arguments.
      probes: From `probes`; gates stand in for those of the dials.
    """

    def run(gates: Mapping[str, Array], batch: Mapping[str, Array], key: Key | None):
        own = {path: {**dial} for path, dial in dials.items()}
        for name, parts in (("gate", gates), ("gram", probes.grams)):
            for path, part in parts.items():
                own[path][name] = part
        return model(frozen, trained, batch, dials=own, key=key)

    if not probes.gates:
        return run({}, batch, key)
    rows = next(iter(batch.values())).shape[0]
    keys = None if key is None else jax.random.split(key, rows)
    alone = lambda row: {name: x[None] for name, x in row.items()}
    one = lambda gates, row, key: run(gates, alone(row), key)
    outputs = jax.vmap(one)(probes.gates, dict(batch), keys)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], *x.shape[2:]), outputs)


def seen(
    slopes: Probes,
    outputs: Any,
    loss: Loss,
    batch: Mapping[str, Array],
    constants: Mapping[str, Array],
) -> Seen:
    """Sums what a pass has found; rows without weight do not count.

    Args:
      slopes: The derivative of the batch's summed loss by the probes.
      outputs, loss, batch, constants: Of the pass: which rows have a weight, the loss
        knows.
    """

    def weight(outputs: Any, row: Mapping[str, Array]) -> Scalar:
        alone = lambda tree: jax.tree.map(lambda x: x[None], tree)
        return loss(alone(outputs), alone(row), constants).weight

    real = jax.vmap(weight)(outputs, dict(batch)) > 0
    gates = dict(slopes.gates)
    return Seen(
        jax.tree.map(lambda g: jnp.sum(g, axis=0), gates),
        jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), gates),
        dict(slopes.grams),
        jnp.sum(real.astype(jnp.float32)),
    )


def nothing(dials: Dials, batch: Mapping[str, Array], asked: Collection[str]) -> Seen:
    """What a step that does not measure has found."""
    shapes = jax.eval_shape(lambda: probes(dials, batch, asked))
    gates = {p: jnp.zeros(x.shape[1:], x.dtype) for p, x in shapes.gates.items()}
    grams = {p: jnp.zeros(x.shape, x.dtype) for p, x in shapes.grams.items()}
    return Seen(gates, gates, grams, jnp.float32(0))
