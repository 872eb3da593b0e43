"""What every component does for the loss, found by leaving it out.

    ablation_j = L(g with g_j = 0) - L(g)

on the batch of a step, with the weights of that step and without dropout. No
approximation stands between this and what shutting a gate costs: it is what other
signals are measured against. It costs a forward pass of the whole batch per component,
one after the other, so that memory does not grow: for small models.

Source: a term of ALoRA's score (Liu et al. 2024, arXiv:2403.16187), of the loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.train.losses import Loss


def ablation(model: Callable[..., Any], loss: Loss) -> Callable:
    """Builds (frozen, trained, dials, constants, batch) -> the signal, by path.

    Args:
      model: The adapted model: (frozen, trained, batch, dials=, key=) -> outputs.
      loss: What is minimized, as sums.
    """

    def measure(
        frozen: Frozen,
        trained: Trained,
        dials: Dials,
        constants: Mapping[str, Array],
        batch: Mapping[str, Array],
    ) -> dict[str, dict[str, Array]]:
        flat, tree = ravel_pytree({path: own["gate"] for path, own in dials.items()})

        def judged(flat: Array) -> Array:
            own = {path: {**dials[path], "gate": g} for path, g in tree(flat).items()}
            outputs = model(frozen, trained, batch, dials=own, key=None)
            sums = loss(outputs, batch, constants)
            return sums.loss / jnp.maximum(sums.weight, 1e-9)

        whole = judged(flat)

        def without(number: Array) -> Array:
            # A shut one is no work for a trial by itself; side by side, trials take
            # both ways.
            return jax.lax.cond(
                flat[number] != 0,
                lambda: judged(flat.at[number].set(0)) - whole,
                lambda: jnp.zeros_like(whole),
            )

        return {"ablation": tree(jax.lax.map(without, jnp.arange(flat.size)))}

    return measure
