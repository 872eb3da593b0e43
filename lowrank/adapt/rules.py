"""What to do with which weight: rules over paths, tried in order, first match wins."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank.core.arrays import Key
from lowrank.core.errors import BadInput
from lowrank.deltas.base import Delta


@dataclasses.dataclass(frozen=True)
class Rule:
    """Corrects the weights that `pattern` selects with a delta of the given rank.

    Attributes:
      pattern: Glob over paths (see `core.paths`); a bracket takes layers of a stack.
      delta: The recipe; one for all layers of a stack.
      rank: Active components at the start, 1 <= rank <= min(d_in, d_out).
      max_rank: Components held in memory; `rank` unless an allocator may add some. Of
        a stack, every layer holds as many as the largest of its rules asks for.
      among: Globs of which one has to cover a weight as well; all weights if empty.
      optional: Whether earlier rules may have taken everything that this one selects.
    """

    pattern: str
    delta: Delta
    rank: int
    max_rank: int | None = None
    among: tuple[str, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.delta, Delta):
            raise BadInput(
                f"Rule({self.pattern!r}).delta must be a Delta, such as LoRA(), not "
                f"{self.delta!r}"
            )
        for name in ("rank", "max_rank"):
            value = getattr(self, name)
            if name == "max_rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(
                    f"Rule({self.pattern!r}).{name} must be a whole number of at least "
                    f"1, not {value!r}"
                )
        if self.max_rank is not None and self.max_rank < self.rank:
            raise BadInput(
                f"Rule({self.pattern!r}): rank {self.rank} is above max_rank "
                f"{self.max_rank}"
            )


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains the selected weights in full, beside the corrections; a stack, whole.

    Attributes:
      pattern: Glob over paths.
      init: Where they start, drawn anew for every trial: "keep" the given values,
        "zeros", or "dense": matrices from N(0, 1/d_in) truncated at two standard
        deviations (LeCun), vectors at zero.
    """

    pattern: str
    init: Literal["keep", "zeros", "dense"] = "keep"

    def __post_init__(self) -> None:
        if self.init not in ("keep", "zeros", "dense"):
            raise BadInput(
                f"Train({self.pattern!r}).init is 'keep', 'zeros' or 'dense', not "
                f"{self.init!r}"
            )

    def draw(self, key: Key, leaf: Array | jax.ShapeDtypeStruct) -> Array:
        """The starting value of one weight."""
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise BadInput(
                f"Train({self.pattern!r}) selects an array of {leaf.dtype}, which has "
                "no gradient: narrow the pattern or Freeze that array first"
            )
        if self.init == "keep":
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise BadInput(
                    f"Train({self.pattern!r}, init='keep') needs the weights "
                    "themselves, not their shapes; give init='dense' or 'zeros'"
                )
            # A copy: the step donates what it trains, and the base is never donated.
            return jnp.array(leaf, copy=True)
        if self.init == "zeros" or len(leaf.shape) < 2:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) > 2:
            raise BadInput(
                f"Train({self.pattern!r}, init='dense') selects an array of shape "
                f"{leaf.shape}, which does not tell its inputs from its outputs: it is "
                "defined for matrices; use init='keep'"
            )
        return jax.nn.initializers.lecun_normal()(key, leaf.shape, leaf.dtype)


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Leaves weights, or layers of a stack, alone, whatever later rules say."""

    pattern: str


AnyRule = Rule | Train | Freeze
