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
from lowrank.core.arrays import Key
from lowrank.core.errors import BadInput
from lowrank.core.keys import key_for, numbered_keys
from lowrank.deltas.base import Delta
from lowrank.deltas.thin import Thin


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

    def drawn(
        self, site: Site, dials: Mapping[str, Array], key: Key | None
    ) -> tuple[Mapping[str, Array], Array | None]:
        """What one training step draws for a site.

        Args:
          site: The weight.
          dials: Its dials.
          key: Of the step; None in evaluation.

        Returns:
          The dials of the step, and a key per layer for what every use draws itself.
        """
        if key is None or not self.delta.draws:
            return dials, None
        per_use, per_step = (
            _by_layer(key_for(key, name, site.path), site)
            for name in ("dropout", "rank_dropout")
        )
        return self.delta.drawn(dials, per_step), per_use

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
            if name in dials or name in self.delta.optional:
                continue
            mask = gate if "rank" in roles else gate.any(axis=-1)
            if "stack" not in roles:
                mask = mask.any(axis=tuple(range(len(site.stacks))))
            shape = [size for role in roles for size in sizes[role]]
            masks[name] = mask.reshape(shape)
        return masks

    def roles(self, site: Site) -> dict[str, tuple[str, ...]]:
        """The role of every axis of each factor, as many as the factor has axes."""
        counts = _axes_per_role(site)
        dials = {*self.delta.dial_values((), 1, 1, 1), *self.delta.optional}
        return {
            name: tuple(role for role in roles for _ in range(counts[role]))
            for name, roles in self.delta.axes.items()
            if name not in dials
        }

    def thin(self, site: Site) -> Thin:
        """How the correction is read as a sum of thin products.

        Raises:
          BadInput: The delta does not say that it is one.
        """
        delta, names = self.delta, self.delta.linear
        along = {"in": ("stack", "rank", "in"), "out": ("stack", "rank", "out")}
        if (
            type(delta).amplitude is Delta.amplitude
            or {role: delta.axes[name] for role, name in names.items()} != along
        ):
            raise BadInput(
                "penalties and ranks by the size of a correction are for sums of thin "
                f"products, and that of {site.path!r} by {type(delta).__name__} is "
                "none: it has no `amplitude`. Leave frobenius, orthogonality and "
                "norm_cap at zero and choose ranks by another importance, as fisher; "
                "or correct the weight with LoRA"
            )
        silent = delta.silent or names["out"]
        return Thin(names["in"], names["out"], site.stacks, delta.amplitude, silent)

    def padding(
        self, site: Site, shapes: Mapping[str, Any], dials: Mapping[str, Array]
    ) -> dict[str, int]:
        """Scalars of each factor that belong to closed components."""
        masks = self.active(site, dials)
        return {
            name: int(np.broadcast_to(~np.asarray(mask), shapes[name].shape).sum())
            for name, mask in masks.items()
        }

    def cut(self, site: Site, parts: Mapping[str, Array]) -> dict[str, Array]:
        """Factors or dials of a wider plan, without what this one does not hold.

        Components are drawn one by one and open from the first on, so what is left is
        what this plan by itself would have.
        """
        counts = _axes_per_role(site)

        def cut(name: str, part: Array) -> Array:
            roles = self.delta.axes[name]
            if "rank" not in roles:
                return part
            axis = sum(counts[role] for role in roles[: roles.index("rank")])
            return jax.lax.slice_in_dim(part, 0, self.max_rank, axis=axis)

        return {name: cut(name, part) for name, part in parts.items()}


def _axes_per_role(site: Site) -> dict[str, int]:
    return {
        "stack": len(site.stacks),
        "rank": 1,
        "in": len(site.ins),
        "out": len(site.outs),
    }


def _by_layer(key: Key, site: Site) -> Array:
    """A key per stacked layer, which does not depend on their number."""
    if not site.stacks:
        return key
    return numbered_keys(key, site.num_layers).reshape(site.stack_shape)
