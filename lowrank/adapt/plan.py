"""What the rules make of one corrected weight: its delta and the rank of each layer.

The layers of a stack share one compiled body, so they share the delta and hold as
many components; their ranks differ by which gates are open. A layer that no rule
corrects has none open: its product is the base's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lowrank.adapt.sites import Site
from lowrank.deltas.base import Delta


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one weight is corrected.

    Attributes:
      delta: The recipe of all layers.
      ranks: Active components at the start, one number per layer in C order; zero
        where a layer is frozen.
      max_rank: Components held for every layer.
    """

    delta: Delta
    ranks: tuple[int, ...]
    max_rank: int

    def dials(self, site: Site, ref_rank: int) -> dict[str, Array]:
        """Default dials: the gates of each layer open up to its own rank."""
        if len({*self.ranks}) == 1:
            return self.delta.dial_values(
                site.stack_shape, self.max_rank, self.ranks[0], ref_rank
            )
        layers = [
            self.delta.dial_values((), self.max_rank, rank, ref_rank)
            for rank in self.ranks
        ]
        stacked = lambda name: jnp.stack([one[name] for one in layers])
        return {
            name: stacked(name).reshape(*site.stack_shape, *value.shape)
            if "stack" in self.delta.axes[name]
            else value
            for name, value in layers[0].items()
        }

    def active(
        self, site: Site, dials: Mapping[str, Array]
    ) -> dict[str, Bool[Array, "..."]]:
        """Which entries of each factor may move, as masks that broadcast to it.

        An entry moves with its component; a factor without a rank axis, layer by
        layer, where the layer has an open gate. Empty for a delta without gates.
        """
        if "gate" not in dials:
            return {}
        gate = dials["gate"] != 0
        sizes: dict[str, tuple[int, ...]] = {
            "stack": site.stack_shape,
            "rank": gate.shape[-1:],
            "in": (1,) * len(site.ins),
            "out": (1,) * len(site.outs),
        }
        masks = {}
        for name, roles in self.delta.axes.items():
            if name in dials:
                continue
            mask = gate if "rank" in roles else gate.any(axis=-1)
            if "stack" not in roles:
                mask = mask.any(axis=tuple(range(len(site.stacks))))
            shape = [size for role in roles for size in sizes[role]]
            masks[name] = mask.reshape(shape)
        return masks

    def padding(self, site: Site, shapes: Mapping[str, Any]) -> dict[str, int]:
        """Scalars of each factor that belong to closed components at the start."""
        masks = self.active(site, self.dials(site, 1))
        return {
            name: int(np.broadcast_to(~np.asarray(mask), shapes[name].shape).sum())
            for name, mask in masks.items()
        }

    def cut(self, site: Site, parts: Mapping[str, Array]) -> dict[str, Array]:
        """Factors or dials of a wider plan, without what this one does not hold.

        Components are drawn one by one and open from the first on, so what is left is
        what this plan by itself would have.
        """
        counts = {
            "stack": len(site.stacks),
            "rank": 1,
            "in": len(site.ins),
            "out": len(site.outs),
        }

        def cut(name: str, part: Array) -> Array:
            roles = self.delta.axes[name]
            if "rank" not in roles:
                return part
            axis = sum(counts[role] for role in roles[: roles.index("rank")])
            return jax.lax.slice_in_dim(part, 0, self.max_rank, axis=axis)

        return {name: cut(name, part) for name, part in parts.items()}
