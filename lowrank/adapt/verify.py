"""The oracle: the factored program against the merged one, outputs and gradients."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank.core.arrays import Frozen, Key, PyTree, Trained
from lowrank.core.errors import LowrankError
from lowrank.core.keys import key_for


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far the factored program is from the merged one, relative to its size.

    Attributes:
      output_error: max |y - y'| / max |y'|, the largest over outputs.
      gradient_error: The same for the gradient of every trained leaf, where the
        merged program is differentiated through the dense weight.
      tolerance: What was asked for.
    """

    output_error: float
    gradient_error: float
    tolerance: float


def compare(
    factored: Callable[[Trained, Frozen], PyTree],
    merged: Callable[[Trained, Frozen], PyTree],
    trained: Trained,
    frozen: Frozen,
    key: Key,
    tolerance: float,
) -> Verification:
    """Compares two programs that should be one function.

    Trained leaves are moved at random, so that none of them is silent, and every
    output enters the gradient with a random weight.

    Args:
      factored: (trained, frozen) -> outputs, as it will be used.
      merged: The same through dense weights.
      trained: Where to start from.
      frozen: The base.
      key: Decides moves and weights.
      tolerance: Largest relative error to accept.

    Raises:
      LowrankError: An error is above `tolerance`, or not a number.
    """
    trained = _perturbed(trained, key_for(key, "verify"))

    def weighted(outputs: PyTree) -> Array:
        total = jnp.zeros(())
        for i, x in enumerate(jax.tree.leaves(outputs)):
            if jnp.issubdtype(x.dtype, jnp.inexact):
                own = key_for(key, "weight", i)
                total += jnp.sum(x * jax.random.normal(own, x.shape, x.dtype))
        return total

    def run(program: Callable[[Trained, Frozen], PyTree]) -> tuple[PyTree, PyTree]:
        def loss(trained: Trained, frozen: Frozen) -> tuple[Array, PyTree]:
            outputs = program(trained, frozen)
            return weighted(outputs), outputs

        return jax.jit(jax.grad(loss, has_aux=True))(trained, frozen)

    with jax.default_matmul_precision("highest"):
        (ours, y), (oracle, z) = run(factored), run(merged)
    report = Verification(distance(y, z), distance(ours, oracle), tolerance)
    errors = (report.output_error, report.gradient_error)
    if not all(error <= tolerance for error in errors):
        raise LowrankError(
            f"the factored program departs from the merged one: {report}. Either the "
            "model computes in low precision (give a wider tolerance), its outputs are "
            "not finite, or this is a bug: please report the model."
        )
    return report


def distance(ours: PyTree, oracle: PyTree) -> float:
    """max over leaves of max |a - b| / max |b|; NaN where one of them is NaN.

    A leaf whose exact value is zero, as the gradient of an attention key's bias, is
    all rounding: no leaf is measured by less than a hundredth of the largest one.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True)
    ]
    sizes = [np.abs(b[np.isfinite(b)]).max(initial=0.0) for _, b in pairs]
    floor = max(1e-2 * max(sizes, default=0.0), 1e-30)
    worst = [0.0]
    for (a, b), size in zip(pairs, sizes, strict=True):
        # Equal infinities, as of masked logits, are equal.
        apart = np.abs(np.subtract(a, b, where=a != b, out=np.zeros_like(a)))
        worst.append(apart.max(initial=0.0) / max(size, floor))
    return float(np.max(worst))


def _perturbed(trained: Trained, key: Key) -> Trained:
    leaves, structure = jax.tree.flatten(trained)
    moved = [
        x + 0.1 * jax.random.normal(key_for(key, i), x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, moved)
