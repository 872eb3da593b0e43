"""What a step minimizes: a sum over targets and the weight it is divided by.

A loss returns sums, not means, so that micro-batches, shards and padded rows add up
to exactly what one large batch without padding would give.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank.core.arrays import Scalar


class Sums(NamedTuple):
    """Loss and weight, each summed over a batch, and further sums to report."""

    loss: Scalar
    weight: Scalar
    extra: dict[str, Scalar]


#: (model outputs, batch, constants of the trial) -> sums
Loss = Callable[[Any, Mapping[str, Array], Mapping[str, Array]], Sums]


def cross_entropy(
    logits: Float[Array, "*rows classes"],
    batch: Mapping[str, Array],
    constants: Mapping[str, Array],
) -> Sums:
    """-sum_i w_i sum_c q_ic log p_ic with q = (1 - e) onehot(label) + e / classes.

    Labels and weights may have any number of axes, one fewer than the logits: rows of
    a classification task, or tokens of a language model. Rows of weight zero are
    padding; their labels are not looked at.

    Args:
      logits: Model outputs.
      batch: "label" and "weight" of shape `rows`.
      constants: "label_smoothing" e.

    Returns:
      Summed loss, summed weight, and the weight of correctly classified rows.
    """
    logits = _wide(logits)
    weight = batch["weight"].astype(jnp.float32)
    label = jnp.where(weight > 0, batch["label"], 0)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
    smooth = constants["label_smoothing"]
    loss = -((1 - smooth) * picked + smooth * jnp.mean(log_p, axis=-1))
    correct = (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
    return Sums(
        jnp.sum(loss * weight), jnp.sum(weight), {"accuracy": jnp.sum(correct * weight)}
    )


def next_token(
    scores: Mapping[str, Float[Array, "batch seq"]],
    batch: Mapping[str, Array],
    constants: Mapping[str, Array],
) -> Sums:
    """The cross-entropy of labels whose log-probabilities the model gives itself.

    As `cross_entropy`, for outputs of `models.head.label_scores`: the logits of all
    tokens need not exist at once.

    Args:
      scores: "picked", the log-probability of the label; "correct", whether the label
        is the likeliest.
      batch: "weight" of the same shape. Places of weight zero are not looked at.
      constants: Not looked at: tokens have no label smoothing.
    """
    del constants
    weight = batch["weight"].astype(jnp.float32)
    told = lambda name: _wide(jnp.where(weight > 0, scores[name], 0))
    return Sums(
        -jnp.sum(told("picked") * weight),
        jnp.sum(weight),
        {"accuracy": jnp.sum(told("correct") * weight)},
    )


def squared_error(
    outputs: Float[Array, "rows targets"],
    batch: Mapping[str, Array],
    constants: Mapping[str, Array],
) -> Sums:
    """sum_i w_i mean_j (y_ij - f_ij)^2: regression.

    Args:
      outputs: Model outputs f.
      batch: "y" of their shape, and "weight" of one number per row.
      constants: Not looked at.

    Returns:
      Summed loss and summed weight.
    """
    del constants
    weight = batch["weight"].astype(jnp.float32)
    # A row of padding may hold anything, and 0 times NaN is NaN.
    error = jnp.where(weight[:, None] > 0, outputs - batch["y"], 0)
    loss = jnp.mean(jnp.square(_wide(error)), axis=-1)
    return Sums(jnp.sum(loss * weight), jnp.sum(weight), {})


def _wide(x: Array) -> Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
