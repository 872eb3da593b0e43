"""LoRA: a gated product of two thin factors (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from lowrank.core.errors import BadInput
from lowrank.deltas import inits
from lowrank.deltas.base import Call, Delta, Site, View


class LoRA(Delta):
    """y = x W + s ((drop(x) a^T) * g) b,  W' = W + s sum_r g_r a_r b_r.

    ``a: (stack, max_rank, d_in)`` starts uniform in +-1/sqrt(d_in), ``b: (stack,
    max_rank, d_out)`` at zero; ``g: (stack, max_rank)`` opens and shuts components.
    The scale is s = alpha / ref_rank ("linear", sec. 4.1 of the paper) or alpha /
    sqrt(ref_rank) ("rsqrt", Kalajdzievski 2023, arXiv:2312.03732).

    Departs from the paper in two points. The divisor is `ref_rank`, one number per
    run, so that a layer's scale does not jump when its rank changes. And `a` is
    drawn as in PEFT, uniform instead of Gaussian. Dropout acts on the input of the
    correction, as in the paper's code; for a table lookup, whose input is an index,
    it acts on the looked-up row in rank space.

    Attributes:
      alpha: Numerator of the scale.
      scaling: "linear" or "rsqrt".
      dropout: Rate in [0, 1). Zero draws no random numbers at all.
    """

    alpha: float = 16.0
    scaling: Literal["linear", "rsqrt"] = "linear"
    dropout: float = 0.0

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a": ("stack", "rank", "in"),
        "b": ("stack", "rank", "out"),
        "gate": ("stack", "rank"),
        "scale": (),
        "dropout": (),
    }
    linear: ClassVar[Mapping[str, str]] = {"in": "a", "out": "b"}
    dialled: ClassVar[frozenset[str]] = frozenset({"alpha", "scaling", "dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise BadInput(f"LoRA.dropout must be in [0, 1), not {self.dropout}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadInput(f"LoRA.alpha must be positive and finite, not {self.alpha}")

    @property
    def draws(self) -> bool:
        return self.dropout > 0

    @nn.compact
    def factors(self, site: Site) -> Mapping[str, Array]:
        a = self.factor("a", inits.uniform(site.fan_in), site.shape("rank", "in"))
        b = self.factor("b", inits.zeros, site.shape("rank", "out"))
        return {"a": a, "b": b}

    def __call__(self, call: Call) -> Array:
        f = self.factors(call)
        gate = self.dial("gate") * self.dial("scale")
        rate = self.dial("dropout") if self.draws else None
        return call.product() + call.lowrank(f["a"], f["b"], gate, rate)

    def weight(self, view: View) -> Array:
        f = self.factors(view)
        gate = self.dial("gate") * self.dial("scale")
        return view.weight + view.outer(f["a"], f["b"], gate)

    def dial_values(
        self, stack: tuple[int, ...], max_rank: int, rank: int, ref_rank: int
    ) -> dict[str, Array]:
        divisor = ref_rank if self.scaling == "linear" else math.sqrt(ref_rank)
        gate = (jnp.arange(max_rank) < rank).astype(jnp.float32)
        return {
            "gate": jnp.broadcast_to(
                gate.reshape((1,) * len(stack) + (max_rank,)), (*stack, max_rank)
            ),
            "scale": jnp.float32(self.alpha / divisor),
            "dropout": jnp.float32(self.dropout),
        }
