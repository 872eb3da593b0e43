"""Importance in the basis where components do not overlap: that of singular values.

Training leaves components as it finds them. Three of a layer may share two directions:
then each is missed if it alone is shut, and one of them can go for good. Gates cannot
tell, whichever signal they are judged by; the singular values of the whole correction
can.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from lowrank.allocate.importance import (
    IMPORTANCES,
    Constants,
    Flat,
    Importance,
    Memory,
    Signals,
)
from lowrank.allocate.ranking import sorted_within
from lowrank.allocate.slots import Slots
from lowrank.core.arrays import Key


class Singular(Importance):
    """What a layer's importance per size is worth in its singular directions.

        v_k = s_k^d sum_j v_j / sum_j n_j^d

    for the component that comes k-th in its layer by v, with v_j the importances of
    open components, n_j = |c_j a_j b_j| their norms, s_1 >= s_2 >= ... the singular
    values of their sum, and d the `degree` of the importance. Powers are averaged over
    measurements with the importance's own decay.

    So how many components a layer keeps is decided by its singular values, and which
    of them stay, by their own importance. Where components are orthogonal in both
    factors, s are the n, and v_k is v_j if importance is in proportion to n_j^d. That
    proportion is taken to be one for the directions of a layer, and differs between
    layers: for Fisher information, how much the loss bends. Importance by norm becomes
    the singular value itself.

    Sizes are those of open components alone, but singular values of measurements before
    an event are of all that were open then: just after one, a layer that lost some may
    look larger than it is, and less so with each measurement.

    Of no paper that we know; `python -m experiments.ranks_protocol` has it side by side
    with components as they are.
    """

    #: Signals of any such importance, beside its own.
    READS: ClassVar = frozenset({"norms", "spectrum"})

    def __init__(self, own: Importance):
        """Takes an importance that has a degree."""
        assert own.degree is not None, "recipes refuse one without"
        self.own = own
        self.degree = own.degree
        self.signals = own.signals | self.READS
        self.memory = f"{own.memory}, and two numbers per component"

    def init(self, slots: Slots, factors: Mapping[str, Any] | None) -> Memory:
        none = jnp.zeros(slots.num_components)
        return {"own": self.own.init(slots, factors), "sizes": none, "values": none}

    def observe(
        self, slots: Slots, memory: Memory, signals: Signals, constants: Constants
    ) -> Memory:
        decay = constants["decay"]

        def mean(old: Array, signal: str) -> Array:
            new = signals[signal].astype(jnp.float32) ** self.degree
            return decay * old + (1 - decay) * new

        return {
            "own": self.own.observe(slots, memory["own"], signals, constants),
            "sizes": mean(memory["sizes"], "norms"),
            "values": mean(memory["values"], "spectrum"),
        }

    def values(
        self, slots: Slots, memory: Memory, gates: Flat, constants: Constants, key: Key
    ) -> Flat:
        own = self.own.values(slots, memory["own"], gates, constants, key)
        is_open = gates != 0
        total = lambda x: slots.per_layer(jnp.where(is_open, x, 0))
        size = total(memory["sizes"])
        each = total(own) / jnp.where(size > 0, size, 1)
        # Both means began at zero together, so that their ratio needs no correction.
        falling = each[slots.layer] * memory["values"]
        order = sorted_within(slots, own, is_open)
        return jnp.zeros_like(own).at[order].set(falling)

    def ready(self, memory: Memory) -> Bool[Array, ""]:
        return self.own.ready(memory["own"])

    def forget(self, slots: Slots, memory: Memory, born: Bool[Array, "..."]) -> Memory:
        # Sizes and values are of the layer: a component that says nothing adds nothing.
        return {**memory, "own": self.own.forget(slots, memory["own"], born)}


def importance_of(name: str, basis: str) -> Importance:
    """An importance by its name, in the basis "own" or "singular"."""
    own = IMPORTANCES[name]
    return Singular(own) if basis == "singular" else own
