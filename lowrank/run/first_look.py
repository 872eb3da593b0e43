"""What is measured once, before the first step: inputs, and the first gradient.

Both are dense matrices, of shape (d_in, d_in) and (d_in, d_out) for every layer, and
both are the derivative of a low-rank correction that is wide enough: of a `Probe`, and
of one that is the identity on one side and zero on the other. So whatever a model does
around its weights is dealt with where it is for every delta, and nothing of the model
is written here. Wide ones are looked at block by block, as wide as a correction may be.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank.adapt.attach import Adapted
from lowrank.adapt.plan import Plan
from lowrank.adapt.sites import Site
from lowrank.allocate.adaptive import Adaptive, Allocator
from lowrank.allocate.recipes import EVA
from lowrank.allocate.signals import ONCE, explained_variance, gradient_energy
from lowrank.core.arrays import Frozen, Trained
from lowrank.core.errors import BadInput
from lowrank.deltas.base import Delta
from lowrank.deltas.lora import LoRA
from lowrank.deltas.probe import Probe
from lowrank.run.forward import on_inputs
from lowrank.sharding.processes import on_host, within_reach
from lowrank.train.batches import Batches
from lowrank.train.losses import Loss
from lowrank.train.ranks import RankEvents
from lowrank.train.state import TrainState

#: Path -> a dense matrix per layer.
Dense = Mapping[str, Float[np.ndarray, "layers d_in d"]]


def first_look(
    adapted: Adapted,
    allocators: Sequence[Allocator],
    events: RankEvents,
    state: TrainState,
    frozen: Frozen,
    batches: Batches,
    loss: Loss,
    inputs: Callable[[Mapping[str, Any]], Any],
) -> TrainState:
    """The state of a pack with what its first batches tell, trial by trial.

    Every trial sees its own batches, so that it chooses what it would alone.

    Args:
      adapted: The model in the common shape.
      allocators: One per trial.
      events: Of the pack.
      state: Before the first step.
      frozen: The base, on its devices.
      batches: Training data; read from its beginning, and not moved on.
      loss: What is minimized.
      inputs: Picks the model's input from a batch.

    Raises:
      BadInput: A weight is used so that it has no directions, or no input matters.
    """
    (wanted,) = events.allocation.needs & ONCE
    look = {"variance": second_moments, "first_gradient": first_gradients}[wanted]
    trials, started = [], dict(state.trained)
    shapes = {
        path: (*site.stack_shape, adapted.max_rank(path))
        for path, site in adapted.sites.items()
    }
    for trial, allocator in enumerate(allocators):
        if not isinstance(allocator, Adaptive):
            # Its ranks stay, whatever its neighbors look at.
            trials.append({wanted: {p: jnp.zeros(s) for p, s in shapes.items()}})
            continue
        one = lambda tree, t=trial: jax.tree.map(lambda x: x[t], tree)
        seen = _batches(batches, trial, allocator.first_batches)
        # Of several processes, each has a part of the base, and needs these whole.
        own = jax.tree.map(on_host, one(state.trained))
        constants = jax.tree.map(on_host, one(state.constants))
        found = look(adapted, own, constants, frozen, seen, loss, inputs)
        _check_seen(found, wanted, trial)
        trials.append(_signal(adapted, found, wanted))
        if isinstance(allocator, EVA) and allocator.directions:
            for path, axes in _directions(adapted, found).items():
                name = adapted.recipe(path).linear["in"]
                factor = started[path][name]
                new = factor.at[trial].set(axes.reshape(factor.shape[1:]))
                started[path] = {**started[path], name: new.astype(factor.dtype)}
    return events.looked(state.replace(trained=started), trials)


def _batches(
    batches: Batches, trial: int, count: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """A trial's own first batches."""
    for _, batch in itertools.islice(batches.iterate(0), count):
        yield {name: x[trial] for name, x in batch.items()}


def second_moments(adapted, trained, constants, frozen, batches, loss, inputs) -> Dense:
    """sum x^T x over the rows that matter, of every layer."""
    sites, batches = adapted.sites, list(batches)
    wide = _under(adapted, Probe(), frozen, inputs, loss)
    blocks = {path: math.ceil(s.d_in / s.largest_rank) for path, s in sites.items()}
    found = {p: np.zeros((s.num_layers, s.d_in, s.d_in)) for p, s in sites.items()}
    for block in range(max(blocks.values())):
        factors = {
            path: {
                "a": _eye(site, "in", block),
                "b": _eye(site, "out", 0),
            }
            for path, site in sites.items()
        }
        for batch in batches:
            given = wide({**trained, **factors}, constants, batch)
            for path, site in sites.items():
                rank = site.largest_rank
                first = block * rank
                if first < site.d_in:
                    rows = np.asarray(given[path]["a"], np.float64)
                    rows = rows.reshape(site.num_layers, rank, site.d_in)
                    last = min(first + rank, site.d_in)
                    found[path][:, first:last] += rows[:, : last - first]
    return found


def first_gradients(
    adapted, trained, constants, frozen, batches, loss, inputs
) -> Dense:
    """dL/dW summed over batches, of every layer; transposed where W is tall."""
    sites = adapted.sites
    wide = _under(adapted, LoRA(alpha=1.0), frozen, inputs, loss)
    found: dict[str, Any] = {}
    factors = {}
    for path, site in sites.items():
        tall = site.d_in > site.d_out
        sides = {"a": _eye(site, "in", 0), "b": _eye(site, "out", 0)}
        silent = "a" if tall else "b"
        factors[path] = {**sides, silent: np.zeros_like(sides[silent])}
    for batch in batches:
        given = wide({**trained, **factors}, constants, batch)
        for path, site in sites.items():
            moved = given[path]["a" if site.d_in > site.d_out else "b"]
            dense = np.asarray(moved, np.float64)
            dense = dense.reshape(site.num_layers, site.largest_rank, -1)
            found[path] = found.get(path, 0) + dense
    return found


def _under(
    adapted: Adapted, delta: Delta, frozen: Frozen, inputs: Callable, loss: Loss
) -> Callable[..., Trained]:
    """(trained, constants, batch) -> gradients of the mean loss, under wide deltas."""
    plans = {
        path: Plan(delta, (site.largest_rank,) * site.num_layers, site.largest_rank)
        for path, site in adapted.sites.items()
    }
    wide = adapted.with_plans(plans, adapted.rules, 1)
    model, dials = on_inputs(wide.apply, inputs), wide.dials()

    def judged(trained: Trained, frozen: Frozen, constants: Any, batch: Any) -> Array:
        outputs = model(frozen, trained, batch, dials=dials, key=None)
        sums = loss(outputs, batch, constants)
        return sums.loss / jnp.maximum(sums.weight, 1e-9)

    slope = jax.jit(jax.grad(judged))

    return lambda trained, constants, batch: within_reach(
        slope(trained, frozen, constants, batch)
    )


def _eye(site: Site, role: str, block: int) -> np.ndarray:
    """Rows of the identity over a role's axes, from those of a block on; then zeros."""
    axes = site.ins if role == "in" else site.outs
    sizes = [site.shape[d] for d in axes]
    eye = np.eye(
        site.largest_rank, math.prod(sizes), block * site.largest_rank, np.float32
    )
    return np.broadcast_to(
        eye.reshape(-1, *sizes), (*site.stack_shape, site.largest_rank, *sizes)
    )


def _signal(adapted: Adapted, found: Dense, wanted: str) -> dict[str, Any]:
    """The signal of one trial, path -> (*stack, max_rank)."""
    of = {"variance": explained_variance, "first_gradient": gradient_energy}[wanted]
    signal = {}
    for path, dense in found.items():
        rank = adapted.max_rank(path)
        values = of(jnp.asarray(dense, jnp.float32), rank)
        signal[path] = values.reshape(*adapted.sites[path].stack_shape, rank)
    return {wanted: signal}


def _directions(adapted: Adapted, found: Dense) -> dict[str, np.ndarray]:
    """The principal directions of every layer, the first ones first."""
    directions = {}
    for path, gram in found.items():
        _, vectors = np.linalg.eigh(gram)
        rows = np.swapaxes(vectors[..., ::-1], -1, -2)[:, : adapted.max_rank(path)]
        # An eigenvector has no sign of its own: its largest entry is positive.
        largest = np.abs(rows).argmax(axis=-1)[..., None]
        signs = np.sign(np.take_along_axis(rows, largest, axis=-1))
        directions[path] = (rows * signs).astype(np.float32)
    return directions


def _check_seen(found: Dense, wanted: str, trial: int) -> None:
    whole = [float(np.abs(dense).sum()) for dense in found.values()]
    if not math.isfinite(sum(whole)) or not any(whole):
        raise BadInput(
            f"importance {wanted!r} was measured on the first batches of trial {trial} "
            f"and is {'zero' if math.isfinite(sum(whole)) else 'not finite'} "
            "everywhere: the loss depends on no corrected weight, or the base is "
            "damaged. Look at its outputs, or set another ranks.importance"
        )
