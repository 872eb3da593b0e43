"""What every delta promises, and what it may ask of the place it is put in.

A delta is a Flax Linen module. `factors` creates its parameters, its dials are a
second collection, and `__call__(call)` *replaces* one use of a weight. It speaks to
the use only through the verbs of `Call`, which mean the same for a matrix product
and for a table lookup, whatever axes the weight has; so a delta is written once.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank.core.keys import numbered_keys
from lowrank.core.spec import check_fields, fields_of


@runtime_checkable
class Site(Protocol):
    """The weight being adapted, as a delta sees it."""

    @property
    def fan_in(self) -> int:
        """Inputs that reach one output: d_in, or 1 for a table lookup."""
        ...

    def shape(self, *roles: str) -> tuple[int, ...]:
        """Sizes of the axes of the given roles: "rank", "in", "out"."""
        ...


@runtime_checkable
class View(Site, Protocol):
    """The weight itself: what `Delta.weight` works on."""

    @property
    def weight(self) -> Array:
        """The frozen weight, in its present layout."""
        ...

    def outer(self, a: Array, b: Array, gate: Array) -> Array:
        """sum_r gate_r a_r b_r, laid out and cast like `weight`."""
        ...


@runtime_checkable
class Call(Site, Protocol):
    """One use of the weight W on an input: what `Delta.__call__` works on."""

    @property
    def x(self) -> Array | None:
        """The input; None for a table lookup, whose input is an index."""
        ...

    @property
    def transposed(self) -> bool:
        """Whether what meets the input are the weight's outputs, as in x W^T."""
        ...

    def product(self, x: Array | None = None) -> Array:
        """x @ W, exactly as the model computes it."""
        ...

    def lowrank(
        self,
        a: Array,
        b: Array,
        gate: Array,
        rate: Any = None,
        x: Array | None = None,
        gram: Array | None = None,
    ) -> Array:
        """((drop(x) a^T) * gate) b, or its transpose where W is used transposed.

        What is called its derivative by `gram`, (stack, max_rank, max_rank), are the
        second moments of drop(x) a^T: see `deltas.product.lowrank`.
        """
        ...

    def onto_x(self, vector: Array) -> Array:
        """A vector over the input axes, broadcastable against `x`."""
        ...

    def onto_y(self, vector: Array) -> Array:
        """A vector over the output axes, broadcastable against the output."""
        ...

    def key(self) -> Array | None:
        """A random key of this use, or None in evaluation."""
        ...


class Delta(nn.Module, abc.ABC):
    """A recipe for a trainable change to one frozen weight.

    Implementations keep these promises, checked for every entry of the catalogue in
    `tests/contracts/test_delta_contract.py`:

    1. Silent at initialization: the adapted use equals the base's.
    2. `__call__` equals the product with `weight(view)`, outputs and gradients.
    3. A component whose gate is zero gets no gradient and changes nothing.
    4. The base dtype comes out, whatever dtype the factors have.

    Attributes:
      axes: For each factor and dial, the roles of its axes in order: "stack" (the
        stacked layers of the weight), "rank", "in", "out". No axes: a scalar.
      linear: For a delta whose change W' - W does not depend on W: a factor with an
        "in" and one with an "out" axis in which the change is linear. A slice of
        such a weight is adapted by slicing the factors, a scaled one by scaling one
        of them. Empty for every other delta, which is then refused there.
      silent: The factor that is zero in a component which says nothing, with axes that
        begin with "stack" and "rank"; empty: the linear one along the outputs.
      dialled: Fields that act through `dial_values` and `draws` alone: trials that
        differ in them may share a program.
      reads_weight: Whether the factors' start depends on the frozen weight.
      optional: Dials that are there with some options only.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]]
    linear: ClassVar[Mapping[str, str]] = {}
    silent: ClassVar[str] = ""
    dialled: ClassVar[frozenset[str]] = frozenset()
    reads_weight: ClassVar[bool] = False
    optional: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        fields = fields_of(type(self))
        check_fields(type(self), {name: getattr(self, name) for name in fields})
        super().__post_init__()

    @abc.abstractmethod
    def factors(self, site: Site) -> Mapping[str, Array]:
        """Creates or reads the factors; decorated with `nn.compact`."""

    @abc.abstractmethod
    def __call__(self, call: Call) -> Array:
        """The output of the adapted use."""

    @abc.abstractmethod
    def weight(self, view: View) -> Array:
        """The adapted weight in dense form: for merging, and the oracle."""

    @abc.abstractmethod
    def dial_values(
        self, stack: tuple[int, ...], max_rank: int, rank: int, ref_rank: int
    ) -> dict[str, Array]:
        """Default dials of a site: arrays, so that trials may differ in them."""

    @property
    def draws(self) -> bool:
        """Whether the delta draws random numbers in training (a static fact)."""
        return False

    def drawn(self, dials: Mapping[str, Array], keys: Array) -> Mapping[str, Array]:
        """The dials of one training step, of those that are drawn anew in each.

        Args:
          dials: Of a site.
          keys: One per stacked layer; the same for all uses of the weight.
        """
        del keys
        return dials

    def amplitude(
        self, dials: Mapping[str, Array], factors: Mapping[str, Array]
    ) -> Array | None:
        """c of shape (stack, max_rank), if W' - W = sum_r c_r a_r b_r; else None.

        There a and b are the factors that `linear` names. What is known of such a sum
        (`deltas.thin`) needs no dense matrix. `Plan.thin` refuses deltas that leave
        this method as it is.
        """
        del dials, factors
        return None

    def factor(self, name: str, init: Any, shape: tuple[int, ...]) -> Array:
        """Creates a factor with `init`, or reads it.

        As `param`, which however traces `init` at every read to learn the shape: most
        of what tracing an adapted model would cost.
        """
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape)

    def dial(self, name: str) -> Array:
        """The value of one dial at this use."""
        return self.get_variable("dials", name)

    def start(self, key: Array, view: View) -> dict[str, Float[Array, "..."]]:
        """Draws the factors of one layer of a site."""
        drawn: Any = self.init({"params": key}, view, method="factors")["params"]
        return dict(drawn)

    def use(self, factors: Mapping[str, Array], dials: Mapping[str, Array], call: Call):
        """`__call__` with factors and dials given."""
        return self.apply({"params": dict(factors), "dials": dict(dials)}, call)

    def dense(
        self, factors: Mapping[str, Array], dials: Mapping[str, Array], view: View
    ):
        """`weight` with factors and dials given."""
        variables = {"params": dict(factors), "dials": dict(dials)}
        return self.apply(variables, view, method="weight")


def drop_components(gate: Array, rate: Array, keys: Array) -> Array:
    """Inverted dropout of whole components: E[drop_components(gate)] = gate.

    Every component is drawn from a key of its own, so that its fate depends neither on
    `max_rank` nor on its neighbours; a closed one stays closed.

    Args:
      gate: (stack, max_rank).
      rate: A number in [0, 1]; a rate of zero keeps every component.
      keys: One per stacked layer.
    """
    one = jax.vmap(drop, in_axes=(0, None, 0))
    layer = lambda own, key: one(own, rate, numbered_keys(key, own.shape[0]))
    for _ in range(keys.ndim):
        layer = jax.vmap(layer)
    return layer(gate, keys)


def drop(x: Array, rate: Array, key: Array) -> Array:
    """Inverted dropout with a rate that is data: E[drop(x)] = x.

    A rate of zero keeps every entry; a rate of one zeroes all of them, and their
    gradients with them.
    """
    kept = 1.0 - rate
    # Divided only where it is not zero: a division masked later still gives NaN
    # gradients.
    boost = jnp.where(kept > 0, 1.0 / jnp.where(kept > 0, kept, 1.0), 0.0)
    keep = jax.random.bernoulli(key, kept, x.shape)
    return jnp.where(keep, x * boost.astype(x.dtype), 0).astype(x.dtype)
