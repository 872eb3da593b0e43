"""Penalties on the correction: what they add to a step, and which weigh nothing.

Which penalties are in play is static, their weights are data: a pack holds a leaf for
each penalty that some trial has, and a trial of weight zero is left exactly alone. A
pack without any runs the program that it would run without this file.

The gradient of the task is never mixed with theirs before the step has seen it, since
importance is measured from the task alone.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank.core.arrays import Dials, Frozen, Scalar, Trained
from lowrank.core.errors import BadInput
from lowrank.core.spec import fields_of, spec
from lowrank.deltas.thin import Terms, Thin, departures, squared_norms, total
from lowrank.train.losses import Sums
from lowrank.train.optim import Active, only
from lowrank.train.state import TrainState

#: Under this the step reports each value, before a slash and the penalty's name.
PREFIX = "penalty"
#: What needs the correction as a sum of thin products.
_OF_SIZE = ("frobenius", "orthogonality", "norm_cap")


@spec
class Penalties:
    """Weights of one trial's penalties; zero is off.

    Let D = sum_r c_r a_r b_r be the correction of a layer, c its gates times its scale,
    and A, B the factors of its open components. A step follows the gradient of

        task + frobenius sum ||D||_F^2
             + orthogonality sum (||A A^T - I||_F^2 + ||B B^T - I||_F^2) + drift K,

    sums over all layers of all sites, K = mean_i w_i KL(p_i || q_i) / mean_i w_i, where
    q is the model's distribution and p the base's. Then the optimizer moves, clipping
    the sum of the gradients; then factors decay; then norms are capped.

    Attributes:
      frobenius: Of ||D||_F^2: decay of the correction itself, whatever its factors.
      orthogonality: Of the distance of the components from orthonormal ones. AdaLoRA's
        regulariser (Zhang et al. 2023, arXiv:2303.10512, eq. 4), which there keeps
        singular vectors beside a diagonal of their values. LoRA has no such diagonal:
        rows of length one then mean ||D||_F = scale sqrt(rank), so small weights only.
        As in the paper a sum of squares over all layers; the authors' code has the
        mean over matrices of norms that are not squared, so its 0.1 or 0.5 is another
        strength than the same number here.
      norm_cap: Largest ||D||_F / ||W||_F of every layer after a step; b is shortened
        where it is exceeded. Relative to the weight, so that one number means the same
        in every layer and for every base; a constraint, not a term of the loss.
      drift: Of K. Only corrections feel it. The base is the model with every gate shut
        under the trial's present whole weights: with a fresh head, which the base does
        not have, K compares what that head makes of features with and without
        corrections, and the head itself is free to learn.
      factor_decay: Decoupled decay of factors per step, times the learning rate, beside
        `optim.weight_decay`, which is for heads too (Loshchilov & Hutter 2019,
        arXiv:1711.05101).
    """

    frobenius: float = 0.0
    orthogonality: float = 0.0
    norm_cap: float = 0.0
    drift: float = 0.0
    factor_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in self.constants().items():
            if not (math.isfinite(value) and value >= 0):
                raise BadInput(
                    f"penalty.{name} = {value!r} is out of range: a weight is finite "
                    "and at least 0, and 0 leaves the penalty out"
                )

    def constants(self) -> dict[str, float]:
        """The weights by name."""
        return {name: getattr(self, name) for name in fields_of(type(self))}

    @property
    def named(self) -> tuple[str, ...]:
        """Penalties that weigh something."""
        return tuple(name for name, value in self.constants().items() if value)


class Gradients(NamedTuple):
    """Gradients summed over a batch, of the task and of the drift.

    Attributes:
      task: Of the loss alone; what importance is computed from.
      drift: Of K, for corrections; None where no trial has it.
    """

    task: Trained
    drift: Trained | None = None


@dataclasses.dataclass(frozen=True)
class Imposed:
    """The penalties of a pack, as its step needs them; none by default.

    Attributes:
      names: Those that weigh something in some trial.
      thin: How corrections are read, by path; empty if no penalty is on their size.
    """

    names: tuple[str, ...] = ()
    thin: Mapping[str, Thin] = dataclasses.field(default_factory=dict)

    @property
    def drifts(self) -> bool:
        """Whether outputs are compared with the base's."""
        return "drift" in self.names

    def weights(self, penalties: Sequence[Penalties]) -> list[dict[str, float]]:
        """The leaves of every trial, for `train.state.start`."""
        tables = [one.constants() for one in penalties]
        return [{name: table[name] for name in self.names} for table in tables]

    def add(
        self, found: Gradients, weight: Scalar, state: TrainState, moving: Active
    ) -> tuple[Trained, dict[str, Scalar]]:
        """The gradient that the optimizer gets, and the values of what was added.

        Args:
          found: The task's gradient, as a mean over the batch, and the drift's, summed.
          weight: What sums over the batch are divided by.
          state: Before the step.
          moving: Which entries may move.
        """
        grads, values = found.task, {}
        corrections = {path: state.trained[path] for path in self.thin}
        for name, each in (("frobenius", squared_norms), ("orthogonality", departures)):
            if name in self.names:
                value = lambda t, each=each: total(self._measured(each, t, state.dials))
                values[f"{PREFIX}/{name}"], own = jax.value_and_grad(value)(corrections)
                grads = _plus(grads, only(moving, own), state.constants[name])
        if found.drift is not None:
            own = jax.tree.map(lambda g: g / weight, found.drift)
            grads = _plus(grads, only(moving, own), state.constants["drift"])
        return grads, values

    def settle(
        self,
        trained: Trained,
        frozen: Frozen,
        state: TrainState,
        moving: Active,
        rate: Callable[[], Any],
    ) -> tuple[Trained, dict[str, Scalar]]:
        """Decays factors and caps norms after the optimizer has moved.

        Args:
          trained: As the optimizer left it.
          frozen: The base.
          state: Before the step.
          moving: Which entries may move.
          rate: The step's learning rate.
        """
        values = {}
        if "factor_decay" in self.names:
            decay = state.constants["factor_decay"]
            shed = rate() * decay
            before = _corrections(state.trained)
            step = lambda new, old: new - _weighed(shed, old, decay)
            after = {
                p: jax.tree.map(step, trained[p], old) for p, old in before.items()
            }
            trained = {**trained, **only(moving, after, before)}
            squares = only(moving, jax.tree.map(jnp.square, before))
            sizes = [jnp.sum(x) for x in jax.tree.leaves(squares)]
            values[f"{PREFIX}/factor_decay"] = sum(sizes[1:], sizes[0])
        if "norm_cap" in self.names:
            trained, ratio = self._capped(trained, frozen, state)
            values[f"{PREFIX}/norm_cap"] = ratio
        return trained, values

    def _capped(
        self, trained: Trained, frozen: Frozen, state: TrainState
    ) -> tuple[Trained, Scalar]:
        """Corrections no larger than the cap, and the largest ||D|| / ||W|| left."""
        cap, dials = state.constants["norm_cap"], state.dials
        found, ratios = dict(trained), []
        for path, thin in self.thin.items():
            squares = squared_norms(thin.terms(trained[path], dials[path]))
            # Nothing is differentiated here: at zero the root is zero and that is all.
            size = jnp.sqrt(jnp.maximum(squares, 0))
            base = jnp.sqrt(thin.squares(frozen[path])).astype(size.dtype)
            over = (cap > 0) & (size > cap * base)
            by = jnp.where(over, cap * base / jnp.where(over, size, 1), 1)
            found[path] = thin.shrunk(trained[path], dials[path], by)
            # Beside a weight that is zero there is no ratio, and a cap leaves nothing.
            ratios.append(
                jnp.where(base > 0, by * size / jnp.where(base > 0, base, 1), 0)
            )
        return found, jnp.max(jnp.stack([jnp.max(one) for one in ratios]))

    def _measured(
        self, each: Callable[[Terms], Float[Array, " layers"]], trained, dials: Dials
    ) -> list[Float[Array, " layers"]]:
        return [
            each(thin.terms(trained[path], dials[path]))
            for path, thin in self.thin.items()
        ]


def impose(
    penalties: Sequence[Penalties],
    corrected: Collection[str],
    thin: Callable[[], Mapping[str, Thin]],
) -> Imposed:
    """The penalties that some of the trials of a pack have.

    Args:
      penalties: One per trial.
      corrected: Paths of the corrected weights.
      thin: How to read them; asked only for penalties on the size of a correction.

    Raises:
      BadInput: There is no correction to penalise, or one has no such size.
    """
    named = {name for one in penalties for name in one.named}
    names = tuple(name for name in fields_of(Penalties) if name in named)
    if names and not corrected:
        raise BadInput(
            f"penalty.{names[0]} weighs corrections, and no weight is corrected: set "
            "penalty=none, or adapt something (delta=lora)"
        )
    return Imposed(names, thin() if {*names} & {*_OF_SIZE} else {})


def with_drift(
    run: Callable[[Trained, Any], Any],
    judge: Callable[[Any], Sums],
    at: tuple[Trained, Any],
    base: Array,
    batch: Mapping[str, Array],
) -> tuple[Gradients, Any, Sums, Any]:
    """Gradients of task and drift, apart, from one forward pass and two backward.

    Args:
      run: (trained tree, whatever else is asked about) -> outputs.
      judge: Outputs -> the task's sums.
      at: Where the gradients are taken.
      base: The base's outputs.
      batch: With "weight".

    Returns:
      Both gradients by what is trained, the task's by the rest, the task's sums with
      that of the drift among the extra ones, and the outputs.
    """

    def task(outputs):
        sums = judge(outputs)
        return sums.loss, sums

    outputs, pull = jax.vjp(run, *at)
    _check_logits(outputs, batch)
    base = jax.lax.stop_gradient(base)
    value, away = jax.value_and_grad(drift)(outputs, base, batch)
    toward, sums = jax.grad(task, has_aux=True)(outputs)
    extra = {**sums.extra, f"{PREFIX}/drift": value}
    of_task, rest = pull(toward)
    found = Gradients(of_task, _corrections(pull(away)[0]))
    return found, rest, sums._replace(extra=extra), outputs


def drift(
    logits: Float[Array, "*rows classes"],
    base: Float[Array, "*rows classes"],
    batch: Mapping[str, Array],
) -> Scalar:
    """sum_i w_i KL(p_i || q_i), p of the base and q of the model, without padding.

    Computed as sum_c p (e^d - 1 - d), d = log q - log p, which is the same since p and
    q have the same sum: no term is negative, so none cancels another, and a small
    divergence is not lost in rounding. A class that the base excludes counts with q.

    Args:
      logits: Of the model.
      base: Of the base.
      batch: "weight" of shape `rows`; rows of weight zero are not looked at.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    log_q = jax.nn.log_softmax(logits.astype(dtype), axis=-1)
    log_p = jax.nn.log_softmax(base.astype(dtype), axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    d = jnp.where(p > 0, log_q - log_p, 0)
    near = (p > 0) & (jnp.abs(d) < 1)
    d_near = jnp.where(near, d, 0)
    terms = jnp.where(near, p * (jnp.expm1(d_near) - d_near), q - p - p * d)
    apart = jnp.sum(terms, axis=-1)
    weight = batch["weight"].astype(dtype)
    return jnp.sum(jnp.where(weight > 0, apart * weight, 0))


def closed(dials: Dials) -> dict[str, dict[str, Any]]:
    """The dials with every gate shut: those of the base.

    Raises:
      BadInput: A correction has no gates to shut.
    """
    for path, own in dials.items():
        if "gate" not in own:
            raise BadInput(
                f"penalty.drift needs the base's outputs, and the correction of "
                f"{path!r} has no gate to shut: set penalty.drift=0"
            )
    return {
        path: {**own, "gate": jnp.zeros_like(own["gate"])}
        for path, own in dials.items()
    }


def _check_logits(outputs: Any, batch: Mapping[str, Array]) -> None:
    weight = batch.get("weight")
    shape = getattr(outputs, "shape", None)
    if weight is None or shape is None or shape[:-1] != weight.shape:
        raise BadInput(
            "penalty.drift compares distributions over classes: the model must return "
            "one array of logits (*rows, classes) and the batch hold a weight per row; "
            f"here outputs are {shape or type(outputs).__name__} and weights "
            f"{None if weight is None else weight.shape}. Set penalty.drift=0"
        )


def _corrections(trained: Trained) -> dict[str, Any]:
    """Without weights that are trained whole, which are bare arrays."""
    return {path: own for path, own in trained.items() if isinstance(own, Mapping)}


def _plus(grads: Trained, own: Trained, weight: Scalar) -> dict[str, Any]:
    add = lambda g, o: g + _weighed(weight, o, weight).astype(g.dtype)
    more = {path: jax.tree.map(add, grads[path], part) for path, part in own.items()}
    return {**grads, **more}


def _weighed(by: Scalar, x: Array, weight: Scalar) -> Array:
    """`by * x`, and zero for a weight of zero even where `x` is not finite."""
    return jnp.where(weight > 0, by * x, 0)
