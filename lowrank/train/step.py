"""One training step of one trial, as a pure function."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lowrank.core.arrays import Dials, Frozen, Roles, Trained
from lowrank.train import probes as probing
from lowrank.train.losses import Loss, Sums
from lowrank.train.optim import Active, AdamW, only, rate, transformation
from lowrank.train.penalties import Gradients, Imposed, closed, with_drift
from lowrank.train.probes import OF_PASS, Probes, Seen
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
    imposed: Imposed = Imposed(),
    roles: Roles | None = None,
    ages: bool = False,
    tells: Collection[str] = frozenset(),
) -> Callable[..., tuple]:
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
      imposed: Penalties; the reported loss is the task's, the gradient norm that of
        all together, as it is clipped.
      roles: What the axes of the factors are for; ages and `b_ratio` need them.
      ages: Whether components count their updates each for itself, as where gates open
        in mid-run they must; the state is made with them.
      tells: Signals for allocators that the step comes by: "gradients", the task's mean
        over the batch before penalties and clipping, and those of `train.probes`. If
        there are any it takes a fourth argument, whether it measures, and returns
        (state, metrics, signals). A step that does not measure runs the plain pass, and
        tells zeros; all trials of a pack measure in a step, or none.
    """
    asked = OF_PASS & {*tells}

    def gradient(
        trained, frozen, state, batch, key, measures: bool
    ) -> tuple[Gradients, Sums, Seen | None]:
        """Sums over a batch, and if it measures over what its pass comes by."""

        def run(trained: Trained, probes: Probes):
            if measures:
                own = (trained, probes, batch, state.dials, key)
                return probing.probed(model, frozen, *own)
            return model(frozen, trained, batch, dials=state.dials, key=key)

        def objective(trained: Trained, probes: Probes):
            outputs = run(trained, probes)
            sums = judge(outputs)
            return sums.loss, (sums, outputs)

        judge = lambda outputs: loss(outputs, batch, state.constants)
        given = state.dials, batch, asked
        probes = probing.probes(*given) if measures else Probes({}, {})
        if imposed.drifts:
            shut = closed(state.dials)
            base = model(frozen, trained, batch, dials=shut, key=None)
            found, slopes, sums, outputs = with_drift(
                run, judge, (trained, probes), base, batch
            )
        else:
            of_task = jax.grad(objective, argnums=(0, 1), has_aux=True)
            (task, slopes), (sums, outputs) = of_task(trained, probes)
            found = Gradients(task)
        if measures:
            seen = probing.seen(slopes, outputs, loss, batch, state.constants)
        else:
            seen = probing.nothing(*given) if asked else None
        return found, sums, seen

    def gradients(frozen, state, batch, measures: bool):
        key = jax.random.fold_in(state.key, state.step) if draws else None
        if optim.accumulate == 1:
            return gradient(state.trained, frozen, state, batch, key, measures)

        def one(total, part):
            index, micro = part
            own = None if key is None else jax.random.fold_in(key, index)
            found = gradient(state.trained, frozen, state, micro, own, measures)
            return jax.tree.map(jnp.add, total, found), None

        parts = jax.tree.map(
            lambda x: x.reshape(optim.accumulate, -1, *x.shape[1:]), batch
        )
        first = jax.tree.map(lambda x: x[0], parts)
        of_one = lambda *given: gradient(*given, measures=measures)
        shapes = jax.eval_shape(of_one, state.trained, frozen, state, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(one, zeros, (jnp.arange(optim.accumulate), parts))
        return total

    def step(
        frozen: Frozen,
        state: TrainState,
        batch: Mapping[str, Array],
        measures: Bool[Array, ""] | bool = False,
    ):
        if asked:
            found, sums, seen = jax.lax.cond(
                measures,
                lambda: gradients(frozen, state, batch, measures=True),
                lambda: gradients(frozen, state, batch, measures=False),
            )
        else:
            found, sums, seen = gradients(frozen, state, batch, measures=False)
        weight = jnp.maximum(sums.weight, 1e-9)
        moving = active(state.dials)
        task = only(moving, jax.tree.map(lambda g: g / weight, found.task))
        grads, added = imposed.add(Gradients(task, found.drift), weight, state, moving)
        value, norm = sums.loss / weight, optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        tx = transformation(optim, state.constants, num_steps, moving, roles, ages)
        updates, opt = tx.update(grads, state.opt, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        # The optimizer's own count: it stands still in a step that is not applied.
        present = lambda: rate(optim, state.constants["lr"], num_steps)(
            state.step - state.skipped
        )
        trained, settled = imposed.settle(trained, frozen, state, moving, present)
        moves = finite & state.live
        keep = lambda new, old: jnp.where(moves, new, old)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "lr": present(),
            "finite": finite,
            **{name: total / weight for name, total in sums.extra.items()},
            **added,
            **settled,
        }
        after = state.replace(
            step=state.step + 1,
            trained=jax.tree.map(keep, trained, state.trained),
            opt=jax.tree.map(keep, opt, state.opt),
            skipped=state.skipped + (~finite & state.live).astype(state.skipped.dtype),
        )
        if not tells:
            return after, metrics
        told: dict[str, Any] = {"gradients": task} if "gradients" in tells else {}
        if seen is not None:
            told |= {n: x for n, x in seen.signals(weight).items() if n in tells}
        return after, metrics, told

    return step
