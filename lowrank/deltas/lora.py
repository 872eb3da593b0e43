"""LoRA: a gated product of two thin factors (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from lowrank.core.errors import BadInput
from lowrank.deltas import inits
from lowrank.deltas.base import Call, Delta, Site, View, drop_components


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

    Rank dropout (LyCORIS, Yeh et al. 2023, arXiv:2309.14859, an option of its code)
    replaces g in training by g m / (1 - p), m_r from Bernoulli(1 - p): whole components
    are left out. Every step draws one mask per site and layer, which all uses of the
    weight share; unlike LyCORIS it is always scaled, so that its mean is g. In a step
    that measures gates example by example, every example draws one (`train.probes`).

    Attributes:
      alpha: Numerator of the scale.
      scaling: "linear" or "rsqrt".
      dropout: Rate in [0, 1). Zero draws no random numbers at all.
      rank_dropout: Rate p in [0, 1). Zero draws nothing, and there is no such dial.
    """

    alpha: float = 16.0
    scaling: Literal["linear", "rsqrt"] = "linear"
    dropout: float = 0.0
    rank_dropout: float = 0.0

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a": ("stack", "rank", "in"),
        "b": ("stack", "rank", "out"),
        "gate": ("stack", "rank"),
        "scale": (),
        "dropout": (),
        "rank_dropout": (),
        "gram": ("stack", "rank", "rank"),
    }
    linear: ClassVar[Mapping[str, str]] = {"in": "a", "out": "b"}
    dialled: ClassVar[frozenset[str]] = frozenset(
        {"alpha", "scaling", "dropout", "rank_dropout"}
    )
    optional: ClassVar[frozenset[str]] = frozenset({"rank_dropout", "gram"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dropout", "rank_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise BadInput(
                    f"LoRA.{name} must be in [0, 1), not {getattr(self, name)}"
                )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadInput(f"LoRA.alpha must be positive and finite, not {self.alpha}")

    @property
    def draws(self) -> bool:
        return self.dropout > 0 or self.rank_dropout > 0

    def drawn(self, dials: Mapping[str, Array], keys: Array) -> Mapping[str, Array]:
        if not self.rank_dropout:
            return dials
        gate = drop_components(dials["gate"], dials["rank_dropout"], keys)
        return {**dials, "gate": gate}

    def amplitude(
        self, dials: Mapping[str, Array], factors: Mapping[str, Array]
    ) -> Array:
        del factors
        return dials["gate"] * dials["scale"]

    @nn.compact
    def factors(self, site: Site) -> Mapping[str, Array]:
        a = self.factor("a", inits.uniform(site.fan_in), site.shape("rank", "in"))
        b = self.factor("b", inits.zeros, site.shape("rank", "out"))
        return {"a": a, "b": b}

    def __call__(self, call: Call) -> Array:
        f = self.factors(call)
        gate = self.dial("gate") * self.dial("scale")
        rate = self.dial("dropout") if self.dropout > 0 else None
        # There where the second moments of x a^T are asked for: its derivative.
        watched = self.has_variable("dials", "gram")
        more = {"gram": self.dial("gram")} if watched else {}
        return call.product() + call.lowrank(f["a"], f["b"], gate, rate, **more)

    def weight(self, view: View) -> Array:
        f = self.factors(view)
        gate = self.dial("gate") * self.dial("scale")
        return view.weight + view.outer(f["a"], f["b"], gate)

    def dial_values(
        self, stack: tuple[int, ...], max_rank: int, rank: int, ref_rank: int
    ) -> dict[str, Array]:
        rate = self.rank_dropout
        divisor = ref_rank if self.scaling == "linear" else math.sqrt(ref_rank)
        gate = (jnp.arange(max_rank) < rank).astype(jnp.float32)
        return {
            "gate": jnp.broadcast_to(
                gate.reshape((1,) * len(stack) + (max_rank,)), (*stack, max_rank)
            ),
            "scale": jnp.float32(self.alpha / divisor),
            "dropout": jnp.float32(self.dropout),
            # Without it a run holds, stores and compiles what it did before.
            **({"rank_dropout": jnp.float32(rate)} if rate else {}),
        }
