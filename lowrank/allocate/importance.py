"""What an allocator ranks components by: signals remembered, and made into one number.

An importance is a handful of pure functions over a memory, a pytree of one trial: so a
pack maps over it. Importances are float32 and at least zero; only their order, and for
some selectors their sums, matter. What was never measured is no reason to shut
anything: `ready` tells, and a value that is not finite is left for the caller to see.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lowrank.allocate.signals import effective_rank, stable_rank
from lowrank.allocate.slots import Slots
from lowrank.allocate.transitions import draw, over
from lowrank.core.arrays import Key
from lowrank.core.errors import BadInput
from lowrank.core.keys import key_for

Flat = Float[Array, " components"]
Memory = Mapping[str, Any]
Constants = Mapping[str, Any]
Signals = Mapping[str, Any]


class Importance(abc.ABC):
    """How signals become importance.

    Attributes:
      signals: Names in `signals.SIGNALS` that `observe` reads.
      memory: What is remembered per trial, in words.
      degree: How it grows with a component: like its norm (1), like the square of that
        (2), or not in such a way (None).
    """

    signals: frozenset[str]
    memory: str
    degree: int | None = None

    @abc.abstractmethod
    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        """The memory before anything is measured; `factors` may be shapes."""

    @abc.abstractmethod
    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        """The memory with one more measurement."""

    @abc.abstractmethod
    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        """The importance of every open component; of shut ones anything.

        What shut ones hold, however recently they died, must not reach open ones.
        """

    @abc.abstractmethod
    def ready(self, memory: Memory) -> Bool[Array, ""]:
        """Whether anything was measured yet."""

    def forget(self, slots: Slots, memory: Memory, born: Bool[Array, "..."]) -> Memory:
        """The memory without the past of components that are born."""
        del slots, born
        return memory


class Sensitivity(Importance):
    """Ibar * Ubar of every entry of the factors, averaged over those of a component.

        I_t = |w_t dL/dw_t|
        Ibar_t = beta1 Ibar_{t-1} + (1 - beta1) I_t
        Ubar_t = beta2 Ubar_{t-1} + (1 - beta2) |I_t - Ibar_t|
        S_j = sum over factors of the mean over entries of component j of Ibar Ubar

    AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, eqs. 8 to 12). Of P Lambda Q the
    factors are b, the diagonal and a; of LoRA, a and b. Departs from the code in that
    w and gradient belong to the same step, as in the paper, where the code multiplies
    the gradient with the weights after the update; and in that the penalty's gradient
    and the clipping of gradients do not leak in. As there, the averages start at zero
    and are not corrected for it, which scales all components alike: but only while
    all are of one age. So S of a component born later is multiplied by

        (1 - beta1^N) (1 - beta2^N) / ((1 - beta1^n) (1 - beta2^n))

    with n its measurements and N those of the oldest. Where nothing is born, that is
    one, and S the paper's. What is left errs in favor of the young, whose deviations
    are from an average that knows little yet: Ubar is there to keep what is uncertain.
    After a dozen measurements little of it remains.

    A factor counts if its axes begin with (*stack, max_rank).
    """

    signals = frozenset({"factors", "gradients"})
    degree = 2
    memory = "two numbers per entry of the factors, one per component"

    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        if factors is None:
            raise BadInput(
                "importance 'sensitivity' remembers every entry of the factors, and "
                "was given none: pass the trained tree, or its shapes, to `init`"
            )
        zeros = {
            path: {name: jnp.zeros(x.shape, jnp.float32) for name, x in own.items()}
            for path, own in _counted(slots, factors).items()
        }
        count = jnp.zeros(slots.num_components, jnp.int32)
        return {"mean": zeros, "deviation": zeros, "count": count}

    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        own = _counted(slots, signals["factors"])
        grads = {
            path: {name: signals["gradients"][path][name] for name in part}
            for path, part in own.items()
        }
        wide = lambda x: x.astype(jnp.float32)
        size = jax.tree.map(lambda w, g: jnp.abs(wide(w) * wide(g)), own, grads)
        decay, slow = constants["decay"], constants["deviation_decay"]
        mean = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, memory["mean"], size
        )
        deviation = jax.tree.map(
            lambda old, new, now: slow * old + (1 - slow) * jnp.abs(new - now),
            memory["deviation"],
            size,
            mean,
        )
        return {"mean": mean, "deviation": deviation, "count": memory["count"] + 1}

    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        del gates, key
        product = jax.tree.map(jnp.multiply, memory["mean"], memory["deviation"])
        found = {}
        for one in slots.competitors:
            shape = (*one.stack, one.max_rank)
            total = jnp.zeros(shape)
            for part in product[one.path].values():
                total += jnp.mean(part, axis=tuple(range(len(shape), part.ndim)))
            found[one.path] = total
        count, values = memory["count"], slots.flat(found)
        for decay in (constants["decay"], constants["deviation_decay"]):
            values = values * _caught_up(count, decay)
        return values

    def ready(self, memory: Memory) -> Bool[Array, ""]:
        return jnp.any(memory["count"] > 0)

    def forget(self, slots: Slots, memory: Memory, born: Bool[Array, "..."]) -> Memory:
        masks = slots.parts(born.astype(jnp.float32))
        blank = lambda mask, x: jnp.where(over(mask != 0, x), 0, x)

        def clean(own: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
            return {
                path: {name: blank(masks[path], x) for name, x in part.items()}
                for path, part in own.items()
            }

        return {
            "mean": clean(memory["mean"]),
            "deviation": clean(memory["deviation"]),
            "count": jnp.where(born, 0, memory["count"]),
        }


class OfOneSignal(Importance):
    """An importance that reads one signal, of one number per component.

    Attributes:
      signal: Name of the signal.
    """

    def __init__(self, signal: str, degree: int | None = None):
        self.signal = signal
        self.degree = degree
        self.signals = frozenset({signal})


class Smoothed(OfOneSignal):
    """|m_j|, m the exponential mean of the signal.

    Divided by 1 - decay^n after n measurements since the component's birth, so that a
    young one compares with an old one.
    """

    memory = "two numbers per component"

    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        del factors
        return {
            "mean": jnp.zeros(slots.num_components),
            "count": jnp.zeros(slots.num_components, jnp.int32),
        }

    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        del slots
        new = signals[self.signal].astype(jnp.float32)
        decay = constants["decay"]
        mean = decay * memory["mean"] + (1 - decay) * new
        return {**memory, "mean": mean, "count": memory["count"] + 1}

    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        del slots, gates, key
        return jnp.abs(corrected(memory["mean"], memory["count"], constants["decay"]))

    def ready(self, memory: Memory) -> Bool[Array, ""]:
        return jnp.any(memory["count"] > 0)

    def forget(self, slots: Slots, memory: Memory, born: Bool[Array, "..."]) -> Memory:
        del slots
        # Whatever else is remembered per component goes the same way.
        return {name: jnp.where(born, 0, x) for name, x in memory.items()}


class RankOfSpectrum(Smoothed):
    """e_l n_j / sum of n over the layer's open components: e, shared out by norms.

    e_l is the effective or the stable rank of a layer. The sum over a layer is e_l, so
    that `proportional` gives ranks in proportion to it, and within a layer the largest
    components come first. It does not change when a layer's correction is scaled: it
    tells how many directions a layer uses, not how much they matter.
    """

    memory = "three numbers per component"

    def __init__(self, rank: Callable[[Array], Array]) -> None:
        super().__init__("norms")
        self.rank = rank
        self.signals = frozenset({"norms", "spectrum"})

    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        used = jnp.zeros(slots.num_components)
        return {**super().init(slots, factors), "used": used}

    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        memory = super().observe(slots, memory, signals, constants)
        spectra = slots.parts(signals["spectrum"])
        ranks = {
            path: jnp.broadcast_to(self.rank(s)[..., None], s.shape)
            for path, s in spectra.items()
        }
        decay = constants["decay"]
        used = decay * memory["used"] + (1 - decay) * slots.flat(ranks)
        return {**memory, "used": used}

    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        sizes = super().values(slots, memory, gates, constants, key)
        used = corrected(memory["used"], memory["count"], constants["decay"])
        # What died is still remembered: it would hold back a share of its layer, which
        # would lose again for having lost.
        total = slots.per_layer(jnp.where(gates != 0, sizes, 0))[slots.layer]
        return used * sizes / jnp.where(total > 0, total, 1)


class Latest(OfOneSignal):
    """max(x_j, 0) of the latest measurement: for what is measured once, or anew."""

    memory = "one number per component"

    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        del factors
        return {"value": jnp.zeros(slots.num_components), "count": jnp.int32(0)}

    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        del slots, constants
        new = signals[self.signal].astype(jnp.float32)
        return {"value": new, "count": memory["count"] + 1}

    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        del slots, gates, constants, key
        # Not `maximum`, which says nothing of a NaN on some devices.
        return jnp.where(memory["value"] < 0, 0, memory["value"])

    def ready(self, memory: Memory) -> Bool[Array, ""]:
        return memory["count"] > 0


class Random(Importance):
    """Uniform numbers, drawn anew at every event: the control of any importance.

    Each component draws from a key of its own, so that none depends on what else
    competes, or on how many components a pack makes it hold.
    """

    signals = frozenset()
    memory = "nothing"

    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        del slots, factors
        return {}

    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        del slots, signals, constants
        return memory

    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        del memory, gates, constants
        numbers = lambda one: draw(
            key_for(key, "allocate", one.path),
            jnp.zeros((*one.stack, one.max_rank)),
            one.stack,
            jax.random.uniform,
        )
        return slots.flat({one.path: numbers(one) for one in slots.competitors})

    def ready(self, memory: Memory) -> Bool[Array, ""]:
        del memory
        return jnp.bool_(True)


def corrected(
    mean: Float[Array, "..."], count: Int[Array, "..."], decay: Array
) -> Float[Array, "..."]:
    """An exponential mean that started at zero, as a mean of what it has seen."""
    seen = 1 - decay ** count.astype(jnp.float32)
    return jnp.where(count > 0, mean / jnp.where(count > 0, seen, 1), 0)


def _caught_up(
    count: Int[Array, " components"], decay: Array
) -> Float[Array, " components"]:
    """Factors that make up for averages that started at zero later than the oldest."""
    seen = 1 - decay ** count.astype(jnp.float32)
    return jnp.where(
        count > 0, jnp.max(seen, initial=0) / jnp.where(count > 0, seen, 1), 0
    )


def _counted(slots: Slots, factors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The factors that have a component axis, of the sites that compete."""
    found = {}
    for one in slots.competitors:
        lead = (*one.stack, one.max_rank)
        own = factors[one.path]
        found[one.path] = {n: x for n, x in own.items() if x.shape[: len(lead)] == lead}
    return found


IMPORTANCES: Mapping[str, Importance] = {
    # The mean square of per-example gate gradients (the Fisher information of the
    # gate): twice the second-order rise of the loss when the gate is shut.
    "fisher": Smoothed("gate_fisher", degree=2),
    # The signed mean: near zero wherever training has converged. Known to mislead.
    "gradient": Smoothed("gate_gradient", degree=1),
    "norm": Smoothed("norms", degree=1),
    # The norm on the inputs that there are.
    "activation": Smoothed("activations", degree=2),
    "sensitivity": Sensitivity(),
    "effective_rank": RankOfSpectrum(effective_rank),
    "stable_rank": RankOfSpectrum(stable_rank),
    # Singular values: of components only where they are in their order.
    "spectrum": Latest("spectrum"),
    "variance": Latest("variance"),
    "first_gradient": Latest("first_gradient"),
    "ablation": Latest("ablation", degree=2),
    "random": Random(),
}
