"""Log-probabilities of given tokens, without the logits of all tokens at once.

A vocabulary is a hundred times as wide as a model: the logits of a batch are its
largest array, and a loss needs three numbers of each row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: Logits that are held at once: 64 MiB of float32.
MOST_LOGITS = 2**24


def label_scores(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "batch seq d_model"],
    label: Int[Array, "batch seq"],
    vocab_size: int,
    most: int = MOST_LOGITS,
) -> dict[str, Float[Array, "batch seq"]]:
    r"""Three numbers of every place, for any loss that looks at one token.

    .. math:: \log p_{label}, \quad \frac{1}{V} \sum_v \log p_v, \quad
              [\arg\max_v p_v = label]

    Pieces of the sequence come one after the other, and each is computed again on the
    way back: at any time one piece's logits exist. Every label must be a token, also
    where it is not counted.

    Args:
      logits: Hidden states -> logits, row by row.
      hidden: What the head gets.
      label: The token that is to follow.
      vocab_size: Columns of the logits.
      most: Logits that may be held at once; at least one place of every row is.

    Returns:
      "picked", "mean" and "correct".
    """
    batch, seq = label.shape
    piece = places_at_once(batch, seq, vocab_size, most)

    def scored(part: tuple[Array, Array]) -> dict[str, Array]:
        states, wanted = part
        log_p = jax.nn.log_softmax(logits(states), axis=-1)
        picked = jnp.take_along_axis(log_p, wanted[..., None], axis=-1)[..., 0]
        hit = jnp.argmax(log_p, axis=-1) == wanted
        return {
            "picked": picked,
            "mean": jnp.mean(log_p, axis=-1),
            "correct": hit.astype(log_p.dtype),
        }

    if piece == seq:
        return scored((hidden, label))
    cut = lambda x: x.reshape(batch, seq // piece, piece, *x.shape[2:]).swapaxes(0, 1)
    found = jax.lax.map(jax.checkpoint(scored), (cut(hidden), cut(label)))
    return {name: x.swapaxes(0, 1).reshape(batch, seq) for name, x in found.items()}


def places_at_once(batch: int, seq: int, vocab_size: int, most: int) -> int:
    """The longest piece that divides a sequence and has no more logits than `most`."""
    for pieces in range(1, seq + 1):
        if seq % pieces == 0 and batch * (seq // pieces) * vocab_size <= most:
            return seq // pieces
    return 1
