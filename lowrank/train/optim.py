"""The optimizer as an optax transformation whose constants are data.

Every constant that may differ between trials is an array handed to `transformation`
inside the step, so trials with different learning rates share one program. Only
what changes the program's structure (schedule shape, whether to clip) is static.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank.core.arrays import Roles, Trained
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec, without_later
from lowrank.train.aging import by_component, of_ages, told


@spec
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with warm-up and decay.

    Attributes:
      lr: Peak learning rate of the factors.
      head_lr: Peak learning rate of weights trained in full; `lr` if None.
      weight_decay: Decoupled decay per step, times the learning rate; matrices only.
      b1, b2, eps: Moment decays and the denominator's floor.
      schedule: Shape after the warm-up, ending at zero unless constant.
      warmup: Fraction of all steps in which the rate climbs from zero.
      clip: Largest global gradient norm, or None.
      epochs: Passes over the training rows.
      accumulate: Micro-batches per step; equal to one large batch, at less memory.
      label_smoothing: Mass spread evenly over all classes.
      b_ratio: Learning rate of the factors along the outputs, over `lr`: LoRA+ (Hayou
        et al. 2024, arXiv:2402.12354), where it is 16 or so. The whole update of b is
        so many times as large, its decay included. Unlike the paper's code, this knows
        b by its axes and not by its name, so that a bias is never taken for one; and
        embeddings have no rate of their own.
    """

    lr: float = 2e-3
    head_lr: float | None = None
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    clip: float | None = 1.0
    epochs: int = 8
    accumulate: int = 1
    label_smoothing: float = 0.0
    b_ratio: float = 1.0

    later: ClassVar[Mapping[str, float]] = {"b_ratio": 1.0}

    def __post_init__(self) -> None:
        rules = {
            "lr": self.lr > 0,
            "head_lr": self.head_lr is None or self.head_lr > 0,
            "weight_decay": self.weight_decay >= 0,
            "b1": 0 <= self.b1 < 1,
            "b2": 0 <= self.b2 < 1,
            "eps": self.eps > 0,
            "warmup": 0 <= self.warmup < 1,
            "clip": self.clip is None or self.clip > 0,
            "epochs": self.epochs >= 1,
            "accumulate": self.accumulate >= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "b_ratio": 0 < self.b_ratio < math.inf,
        }
        for name, holds in rules.items():
            if not holds:
                raise BadInput(
                    f"optim.{name} = {getattr(self, name)!r} is out of range"
                )

    def constants(self) -> dict[str, float]:
        """What may differ between trials of one pack.

        What came later is left out where it changes nothing: such a run holds, stores
        and compiles what it did before; see `tables`.
        """
        return {
            "lr": self.lr,
            "head_ratio": (self.head_lr or self.lr) / self.lr,
            "weight_decay": self.weight_decay,
            "b1": self.b1,
            "b2": self.b2,
            "eps": self.eps,
            "clip": self.clip or 0.0,
            "label_smoothing": self.label_smoothing,
            **without_later({"b_ratio": self.b_ratio}, type(self)),
        }


CATALOGUE = {"adamw": AdamW}


def tables(optims: Sequence[AdamW]) -> list[dict[str, float]]:
    """The constants of every trial of a pack, under the same names."""
    own = [optim.constants() for optim in optims]
    named = {name for table in own for name in table}
    later = {name: value for name, value in AdamW.later.items() if name in named}
    return [{**later, **table} for table in own]


def rate(optim: AdamW, peak: Array, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear climb to `peak`, then the chosen shape."""
    warm = int(optim.warmup * num_steps)
    rest = max(num_steps - warm, 1)
    shapes = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    schedule = shapes[optim.schedule]
    if warm:
        # The first step already moves: (t + 1) / warm of the peak.
        climb = optax.linear_schedule(peak / warm, peak * (warm + 1) / warm, warm)
        schedule = optax.join_schedules([climb, schedule], [warm])
    # Counts are integers, and their quotients float32 whatever the peak is.
    return lambda step: schedule(jnp.asarray(step, jnp.asarray(peak).dtype))


#: Path -> factor -> which of its entries may move; what is not named moves whole.
Active = Mapping[str, Mapping[str, Array]]


def transformation(
    optim: AdamW,
    constants: Mapping[str, Array],
    num_steps: int,
    active: Active | None = None,
    roles: Roles | None = None,
    ages: bool = False,
) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule, for one trial's constants.

    Entries that are not `active` get no update, not even decay, and keep the moments
    and ages that they have. The schedule is the run's, whatever the ages.

    Args:
      optim: Static choices.
      constants: The trial's, as arrays.
      num_steps: Length of the schedule.
      active: Which entries of the factors may move; all of them if None.
      roles: What the axes of the factors are for; ages and `b_ratio` need them.
      ages: Whether components count their updates each for itself, which those that
        are born in mid-run need (`train.aging`). No field of `AdamW`: it follows from
        whether ranks change in a run, is no choice, and names no other trial.
    """
    active, roles = active or {}, roles or {}
    steps: list[optax.GradientTransformation] = []
    if optim.clip is not None:
        steps.append(optax.clip_by_global_norm(constants["clip"]))
    steps += [
        _adam(constants, active, roles if ages else None),
        optax.add_decayed_weights(
            constants["weight_decay"], mask=lambda trained: _matrices(trained, roles)
        ),
        optax.stateless(
            lambda u, _: only(active, _scale_whole(u, constants["head_ratio"]))
        ),
    ]
    by_rate = optax.scale_by_learning_rate(rate(optim, constants["lr"], num_steps))
    if "b_ratio" in constants:
        by_rate = _b_scaled(by_rate, constants["b_ratio"], roles)
    return optax.chain(*steps, by_rate)


def only(active: Active, new: Trained, old: Trained | None = None) -> Trained:
    """`new` where entries are active, `old` elsewhere: zero if not given."""
    if not active:
        return new
    found = dict(new)
    for path, masks in active.items():
        was = {} if old is None else old[path]
        found[path] = {
            name: jnp.where(masks[name], leaf, was.get(name, 0))
            if name in masks
            else leaf
            for name, leaf in new[path].items()
        }
    return found


def _adam(
    constants: Mapping[str, Array], active: Active, roles: Roles | None
) -> optax.GradientTransformation:
    """Adam with moments that stand still where entries do; with ages, given roles."""
    inner = optax.scale_by_adam(constants["b1"], constants["b2"], constants["eps"])
    inner = inner if roles is None else by_component(inner, roles)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new: Any
        updates, new = inner.update(updates, state, params)
        held = {"mu": only(active, new.mu, state.mu)}
        held["nu"] = only(active, new.nu, state.nu)
        if roles is not None:
            held["age"] = only(of_ages(active, roles), new.age, state.age)
        return updates, new._replace(**held)

    return optax.GradientTransformation(inner.init, update)


def _matrices(trained: Any, roles: Roles) -> Any:
    """What decays: of a factor its roles decide, whether or not layers are stacked."""

    def is_matrix(path: str, name: str, leaf: Array) -> bool:
        own = roles.get(path, {}).get(name)
        if own is None:
            return leaf.ndim >= 2
        return len({*own} & {"rank", "in", "out"}) >= 2

    return {
        path: {name: is_matrix(path, name, leaf) for name, leaf in own.items()}
        if isinstance(own, Mapping)
        else jax.tree.map(lambda leaf: leaf.ndim >= 2, own)
        for path, own in trained.items()
    }


def _scale_whole(updates: Any, ratio: Array) -> Any:
    """Updates of weights trained in full, which are bare arrays, times `ratio`."""
    return {
        path: jax.tree.map(lambda u: u * ratio, update)
        if not isinstance(update, Mapping)
        else update
        for path, update in updates.items()
    }


def _b_scaled(
    inner: optax.GradientTransformation, ratio: Array, roles: Roles
) -> optax.GradientTransformation:
    """`inner` with updates `ratio` times as large for factors along the outputs."""

    def scaled(path: str, name: str, update: Array) -> Array:
        own = told(roles, path, name)
        is_b = "rank" in own and "out" in own
        return update * ratio.astype(update.dtype) if is_b else update

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found: Any
        found, state = inner.update(updates, state, params)
        return {
            path: {name: scaled(path, name, u) for name, u in own.items()}
            if isinstance(own, Mapping)
            else own
            for path, own in found.items()
        }, state

    # The state is `inner`'s: trials with and without a ratio hold the same leaves.
    return optax.GradientTransformation(inner.init, update)


def init(
    optim: AdamW, trained: Trained, roles: Roles | None = None, ages: bool = False
) -> optax.OptState:
    """The optimizer's state; its structure does not depend on the constants."""
    zeros = {name: jnp.float32(value) for name, value in optim.constants().items()}
    return transformation(optim, zeros, 1, roles=roles, ages=ages).init(trained)
