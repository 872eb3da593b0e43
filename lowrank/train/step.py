"""One training step of one trial, as a pure function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.train.losses import Loss, Sums
from lowrank.train.optim import Active, AdamW, only, rate, transformation
from lowrank.train.state import TrainState

#: (frozen, trained, batch, dials=, key=) -> outputs; the adapted model.
Model = Callable[..., Any]


def make_step(
    model: Model,
    loss: Loss,
    optim: AdamW,
    num_steps: int,
    draws: bool,
    active: Callable[[Dials], Active] = lambda dials: {},
) -> Callable[[Frozen, TrainState, Mapping[str, Array]], tuple[TrainState, dict]]:
    """Builds `step(frozen, state, batch) -> (state, metrics)` for one trial.

    A step whose loss or gradient norm is not finite changes nothing but the counters:
    trained weights and moments stay bit-identical, and the caller decides what to do.
    Of a trial that has ended (`state.live` is false) no step changes anything.

    Args:
      model: The adapted model.
      loss: What is minimized, as sums.
      optim: Static choices; the constants come from the state.
      num_steps: Length of the schedule.
      draws: Whether the model draws random numbers in training.
      active: Which entries of the factors may move, from the dials; all by default.
        Padding is silent: the others get no gradient, no decay and no moments.
    """

    def objective(trained: Trained, frozen: Frozen, state: TrainState, batch, key):
        outputs = model(frozen, trained, batch, dials=state.dials, key=key)
        sums = loss(outputs, batch, state.constants)
        return sums.loss, sums

    gradient = jax.grad(objective, has_aux=True)

    def gradients(frozen, state, batch) -> tuple[Trained, Sums]:
        key = jax.random.fold_in(state.key, state.step) if draws else None
        if optim.accumulate == 1:
            return gradient(state.trained, frozen, state, batch, key)

        def one(total, part):
            index, micro = part
            own = None if key is None else jax.random.fold_in(key, index)
            return jax.tree.map(
                jnp.add, total, gradient(state.trained, frozen, state, micro, own)
            ), None

        parts = jax.tree.map(
            lambda x: x.reshape(optim.accumulate, -1, *x.shape[1:]), batch
        )
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, state.trained, frozen, state, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(one, zeros, (jnp.arange(optim.accumulate), parts))
        return total

    def step(frozen: Frozen, state: TrainState, batch: Mapping[str, Array]):
        grads, sums = gradients(frozen, state, batch)
        weight = jnp.maximum(sums.weight, 1e-9)
        moving = active(state.dials)
        grads = only(moving, jax.tree.map(lambda g: g / weight, grads))
        value, norm = sums.loss / weight, optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        tx = transformation(optim, state.constants, num_steps, moving)
        updates, opt = tx.update(grads, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        moves = finite & state.live
        keep = lambda new, old: jnp.where(moves, new, old)
        # The optimizer's own count: it stands still in a step that is not applied.
        applied = state.step - state.skipped
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "lr": rate(optim, state.constants["lr"], num_steps)(applied),
            "finite": finite,
            **{name: total / weight for name, total in sums.extra.items()},
        }
        return state.replace(
            step=state.step + 1,
            trained=jax.tree.map(keep, trained, state.trained),
            opt=jax.tree.map(keep, opt, state.opt),
            skipped=state.skipped + (~finite & state.live).astype(state.skipped.dtype),
        ), metrics

    return step
