"""Log-probabilities of given tokens, without the logits of all tokens at once.

A vocabulary is a hundred times as wide as a model: the logits of a batch are its
largest array, and a loss needs two numbers of each row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
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
    r"""Two numbers of every place, for any loss that looks at one token.

    .. math:: \log p_{label}, \quad [\arg\max_v p_v = label]

    Pieces of the sequence come one after the other: at any time one piece's logits
    exist. The slope of a place's number does not depend on what a loss makes of it,

    .. math:: \frac{\partial \log p_{label}}{\partial h}
              = \left(\frac{\partial z}{\partial h}\right)^T (e_{label} - p)

    so where the head itself is not trained, it is taken while the piece's logits z are
    there, and the way back only weighs it: two products with the head, where computing
    the logits again would make three. A head that is trained has its logits computed
    again. Every label must be a token, also where it is not counted.

    Args:
      logits: Hidden states -> logits, row by row.
      hidden: What the head gets.
      label: The token that is to follow.
      vocab_size: Columns of the logits.
      most: Logits that may be held at once; at least one place of every row is.

    Returns:
      "picked" and "correct".

    Source: The slope on the way forth is that of the fused linear cross-entropy of
    Hsu et al., 2024, https://arxiv.org/abs/2410.10989, section 3.2; there it is the
    slope of the batch's loss, and the head's is taken with it.
    """
    batch, seq = label.shape
    piece = places_at_once(batch, seq, vocab_size, most)
    # What the head closes over becomes arguments, since it may be what is trained.
    # (A function of its own, since JAX remembers what it converted.)
    head, weights = jax.closure_convert(lambda x: logits(x), hidden[:, :piece])

    def in_pieces(one: Callable[[Array, Array], Any], *given: Array) -> Any:
        if piece == seq:
            return one(*given)
        cut = lambda x: x.reshape(batch, -1, piece, *x.shape[2:]).swapaxes(0, 1)
        join = lambda x: x.swapaxes(0, 1).reshape(batch, seq, *x.shape[3:])
        found = jax.lax.map(lambda both: one(*both), tuple(map(cut, given)))
        return jax.tree.map(join, found)

    def plain(
        states: Array, label: Array, weights: Sequence[Array]
    ) -> dict[str, Array]:
        def one(states: Array, wanted: Array) -> dict[str, Array]:
            return _scores(head(states, *weights), wanted)[0]

        return in_pieces(one if piece == seq else jax.checkpoint(one), states, label)

    def forth(
        states: Any, label: Any, weights: Sequence[Any]
    ) -> tuple[dict[str, Array], Any]:
        own = [weight.value for weight in weights]
        if any(weight.perturbed for weight in weights):
            run = lambda states, weights: plain(states, label.value, weights)
            return jax.vjp(run, states.value, own)

        def one(states: Array, wanted: Array) -> tuple[dict[str, Array], Array]:
            found, pull = jax.vjp(lambda x: head(x, *own), states)
            told, log_p = _scores(found, wanted)
            (slope,) = pull(
                jax.nn.one_hot(wanted, vocab_size, dtype=log_p.dtype) - jnp.exp(log_p)
            )
            return told, slope

        return in_pieces(one, states.value, label.value)

    def back(kept: Any, told: dict[str, Any]) -> tuple[Array, None, Any]:
        if not isinstance(kept, Array):
            slope, of_weights = kept(jax.tree.map(_filled, told, is_leaf=_is_zero))
            return slope, None, of_weights
        share = _filled(told["picked"])[..., None]
        return (share * kept).astype(kept.dtype), None, [None for _ in weights]

    scores = jax.custom_vjp(plain)
    scores.defvjp(forth, back, symbolic_zeros=True)
    return scores(hidden, label, weights)


def _scores(
    logits: Float[Array, "*rows vocab"], wanted: Int[Array, "*rows"]
) -> tuple[dict[str, Float[Array, "*rows"]], Float[Array, "*rows vocab"]]:
    """The numbers of every place, and the logarithms of all probabilities."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, wanted[..., None], axis=-1)[..., 0]
    hit = jnp.argmax(log_p, axis=-1) == wanted
    return {"picked": picked, "correct": hit.astype(log_p.dtype)}, log_p


def _is_zero(told: Any) -> bool:
    return isinstance(told, SymbolicZero)


def _filled(told: Any) -> Array:
    """A cotangent as an array, also where nothing depends on its number."""
    return jnp.zeros(told.aval.shape, told.aval.dtype) if _is_zero(told) else told


def places_at_once(batch: int, seq: int, vocab_size: int, most: int) -> int:
    """The longest piece that divides a sequence and has no more logits than `most`."""
    for pieces in range(1, seq + 1):
        if seq % pieces == 0 and batch * (seq // pieces) * vocab_size <= most:
            return seq // pieces
    return 1
