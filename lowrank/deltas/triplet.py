"""Triplets: thin factors about a diagonal, P Lambda Q (Zhang et al. 2023)."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from lowrank.core.errors import BadInput
from lowrank.deltas import inits
from lowrank.deltas.base import Call, Delta, Site, View


class Triplet(Delta):
    """y = x W + s ((drop(x) a^T) * g l) b,  W' = W + s sum_r g_r l_r a_r b_r.

    AdaLoRA's correction (arXiv:2303.10512, eq. 3): a is its Q, b its P, ``l: (stack,
    max_rank)`` its Lambda, a singular value once `penalty.orthogonality` has made the
    rows of a and b orthonormal. ``a: (stack, max_rank, d_in)`` and ``b: (stack,
    max_rank, d_out)`` start from N(0, 0.02^2) as in its code, l at zero. ``g: (stack,
    max_rank)`` opens and shuts components; what an allocator with mode=revivable sets
    to zero is l, so that a component may come back by itself.

    Departs from the code in the divisor of the scale s = alpha / ref_rank: one number
    per run, where the code adds 1e-5 to the rank that it begins with.

    Attributes:
      alpha: Numerator of the scale.
      dropout: Rate in [0, 1) on the input of the correction. Zero draws nothing.
    """

    alpha: float = 16.0
    dropout: float = 0.0

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a": ("stack", "rank", "in"),
        "b": ("stack", "rank", "out"),
        "diagonal": ("stack", "rank"),
        "gate": ("stack", "rank"),
        "scale": (),
        "dropout": (),
        "gram": ("stack", "rank", "rank"),
    }
    linear: ClassVar[Mapping[str, str]] = {"in": "a", "out": "b"}
    silent: ClassVar[str] = "diagonal"
    dialled: ClassVar[frozenset[str]] = frozenset({"alpha", "dropout"})
    optional: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise BadInput(f"Triplet.dropout must be in [0, 1), not {self.dropout}")
        if not 0.0 < self.alpha < float("inf"):
            raise BadInput(
                f"Triplet.alpha must be positive and finite, not {self.alpha}"
            )

    @property
    def draws(self) -> bool:
        return self.dropout > 0

    def amplitude(
        self, dials: Mapping[str, Array], factors: Mapping[str, Array]
    ) -> Array:
        return dials["gate"] * dials["scale"] * factors["diagonal"]

    @nn.compact
    def factors(self, site: Site) -> Mapping[str, Array]:
        rows = inits.normal(0.02)
        a = self.factor("a", rows, site.shape("rank", "in"))
        b = self.factor("b", rows, site.shape("rank", "out"))
        diagonal = self.factor("diagonal", inits.zeros, site.shape("rank"))
        return {"a": a, "b": b, "diagonal": diagonal}

    def __call__(self, call: Call) -> Array:
        f = self.factors(call)
        gate = self.dial("gate") * self.dial("scale") * f["diagonal"]
        rate = self.dial("dropout") if self.dropout > 0 else None
        watched = self.has_variable("dials", "gram")
        more = {"gram": self.dial("gram")} if watched else {}
        return call.product() + call.lowrank(f["a"], f["b"], gate, rate, **more)

    def weight(self, view: View) -> Array:
        f = self.factors(view)
        gate = self.dial("gate") * self.dial("scale") * f["diagonal"]
        return view.weight + view.outer(f["a"], f["b"], gate)

    def dial_values(
        self, stack: tuple[int, ...], max_rank: int, rank: int, ref_rank: int
    ) -> dict[str, Array]:
        gate = (jnp.arange(max_rank) < rank).astype(jnp.float32)
        return {
            "gate": jnp.broadcast_to(gate, (*stack, max_rank)),
            "scale": jnp.float32(self.alpha / ref_rank),
            "dropout": jnp.float32(self.dropout),
        }
