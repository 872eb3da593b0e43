"""The optimizer as an optax transformation whose constants are data.

Every constant that may differ between trials is an array handed to `transformation`
inside the step, so trials with different learning rates share one program. Only
what changes the program's structure (schedule shape, whether to clip) is static.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank.core.arrays import Trained
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec


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
        }
        for name, holds in rules.items():
            if not holds:
                raise BadInput(
                    f"optim.{name} = {getattr(self, name)!r} is out of range"
                )

    def constants(self) -> dict[str, float]:
        """What may differ between trials of one pack."""
        return {
            "lr": self.lr,
            "head_ratio": (self.head_lr or self.lr) / self.lr,
            "weight_decay": self.weight_decay,
            "b1": self.b1,
            "b2": self.b2,
            "eps": self.eps,
            "clip": self.clip or 0.0,
            "label_smoothing": self.label_smoothing,
        }


CATALOGUE = {"adamw": AdamW}


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
) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule, for one trial's constants.

    Entries that are not `active` get no update, not even decay, and keep the moments
    that they have.
    """
    active = active or {}
    steps: list[optax.GradientTransformation] = []
    if optim.clip is not None:
        steps.append(optax.clip_by_global_norm(constants["clip"]))
    steps += [
        _adam(constants, active),
        optax.add_decayed_weights(constants["weight_decay"], mask=_matrices),
        optax.stateless(
            lambda u, _: only(active, _scale_whole(u, constants["head_ratio"]))
        ),
        optax.scale_by_learning_rate(rate(optim, constants["lr"], num_steps)),
    ]
    return optax.chain(*steps)


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
    constants: Mapping[str, Array], active: Active
) -> optax.GradientTransformation:
    inner = optax.scale_by_adam(constants["b1"], constants["b2"], constants["eps"])

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new: Any
        updates, new = inner.update(updates, state, params)
        return updates, new._replace(
            mu=only(active, new.mu, state.mu), nu=only(active, new.nu, state.nu)
        )

    return optax.GradientTransformation(inner.init, update)


def _matrices(trained: Trained) -> Trained:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, trained)


def _scale_whole(updates: Any, ratio: Array) -> Any:
    """Updates of weights trained in full, which are bare arrays, times `ratio`."""
    return {
        path: jax.tree.map(lambda u: u * ratio, update)
        if not isinstance(update, Mapping)
        else update
        for path, update in updates.items()
    }


def init(optim: AdamW, trained: Trained) -> optax.OptState:
    """The optimizer's state; its structure does not depend on the constants."""
    zeros = {name: jnp.float32(value) for name, value in optim.constants().items()}
    return transformation(optim, zeros, 1).init(trained)
