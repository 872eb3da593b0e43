"""Everything that competes for the budget, as one flat vector of components.

A layer is one matrix: a weight that is not stacked is a single one, a stacked weight
has as many as it stacks, and each gets a rank of its own. The components of all layers
of all sites stand in one vector, site by site, layer by layer in C order, which is what
the gates of shape (*stack, max_rank) are when they are flattened and joined.

What is here is fixed before anything is compiled. Trials of a pack have the same
layout; their ranks and bounds may differ, and reach the program as data.

Axis names beside those of `core.arrays`:
  components    entries of the flat vector
  layers        matrices, in the order of the vector
  groups        layers that must have equal ranks; most layers are one alone
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowrank.core.errors import BadInput, UnknownName, nearest

#: What a budget counts: open components, or the scalars that they consist of.
Unit = Literal["components", "parameters"]
#: Budgets and costs are counted in int32 inside the program.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Competitor:
    """One site that takes part.

    Attributes:
      path: Its name.
      max_rank: Components held for each of its layers; none competes if it is 0.
      cost: Parameters of one component of one layer; of LoRA, d_in + d_out.
      ranks: Rank of every layer under the rules, or one number for all of them.
      stack: Shape of the stack; () for a single layer.
      names: A name per layer, as `adapt.Site.layer_paths` gives them; by default the
        path with the layer's number.
      least, most: Smallest and largest rank, of all layers or layer by layer; `most`
        is `max_rank` by default.
      group: Layers of equal place in sites of one group get equal ranks.
    """

    path: str
    max_rank: int
    cost: int
    ranks: int | tuple[int, ...]
    stack: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    least: int | tuple[int, ...] = 0
    most: int | tuple[int, ...] | None = None
    group: str | None = None

    @property
    def num_layers(self) -> int:
        return math.prod(self.stack)

    @property
    def layer_names(self) -> tuple[str, ...]:
        if self.names or not self.stack:
            return self.names or (self.path,)
        places = itertools.product(*map(range, self.stack))
        return tuple(f"{self.path}[{','.join(map(str, one))}]" for one in places)

    def by_layer(self, field: str) -> tuple[int, ...]:
        """`ranks`, `least` or `most`, one number per layer."""
        value = getattr(self, field)
        value = self.max_rank if value is None else value
        return value if isinstance(value, tuple) else (value,) * self.num_layers


class Slots:
    """The layout of the flat vector, with the bounds and ranks of one trial.

    Attributes:
      competitors: The sites, in the order of the vector.
      names: A name per layer.
      layer, position: Of each component: its layer, and its number within it.
      cost: Of one component of each layer.
      ranks, least, most: Of each layer.
      group: Of each layer.
      seat_group, seat_position: A seat is the p-th best component of every layer of a
        group; they win or lose together. Of each seat: its group, and p.
      seat: Of each place in a vector that is sorted layer by layer: its seat.
    """

    def __init__(self, competitors: Sequence[Competitor]):
        """Lays out the vector.

        Raises:
          BadInput: Two sites or layers share a name, a number is out of range, a
            minimum is above a maximum, or tied layers cannot have equal ranks.
        """
        self.competitors = tuple(competitors)
        for one in self.competitors:
            _check(one)
        join = lambda field: np.array(
            [n for one in self.competitors for n in one.by_layer(field)], np.int32
        )
        repeat = lambda values: np.repeat(
            values, [one.num_layers for one in self.competitors]
        )
        self.names = tuple(n for one in self.competitors for n in one.layer_names)
        if twice := sorted({n for n in self.names if self.names.count(n) > 1}):
            raise BadInput(
                f"two layers that compete are called {twice[0]!r}; every layer needs a "
                "name of its own"
            )
        self.ranks, self.least, self.most = map(join, ("ranks", "least", "most"))
        self.cost = repeat(np.array([one.cost for one in self.competitors], np.int64))
        self.held = repeat(np.array([one.max_rank for one in self.competitors], int))
        layers = np.arange(len(self.names), dtype=np.int32)
        self.layer = np.repeat(layers, self.held)
        self.starts = np.cumsum(self.held) - self.held
        places = np.arange(len(self.layer)) - self.starts[self.layer]
        self.position = places.astype(np.int32)
        self.group = self._groups()
        self._seats()

    def _groups(self) -> np.ndarray:
        keys: list[Any] = []
        for one in self.competitors:
            own = one.path if one.group is None else ("", one.group)
            keys += [(own, place) for place in range(one.num_layers)]
        order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return np.array([order[key] for key in keys], np.int32)

    def _seats(self) -> None:
        depth = self.by_group(self.held, np.minimum)
        starts = np.cumsum(depth) - depth
        groups = np.arange(len(depth), dtype=np.int32)
        self.seat_group = np.repeat(groups, depth)
        places = np.arange(len(self.seat_group)) - starts[self.seat_group]
        self.seat_position = places.astype(np.int32)
        own = self.group[self.layer]
        # A component that no seat has room for goes to one behind the last.
        within = self.position < depth[own]
        self.seat = np.where(within, starts[own] + self.position, len(self.seat_group))
        self.members = np.bincount(self.group, minlength=self.num_groups)
        least, most = self.group_bounds(self.least, self.most)
        for group in np.flatnonzero(least > most):
            tied = [self.names[i] for i in np.flatnonzero(self.group == group)]
            raise BadInput(
                f"tied layers get equal ranks, but {', '.join(tied)} cannot: the "
                f"largest minimum is {least[group]}, the smallest maximum "
                f"{most[group]}. Change ranks.bounds or ranks.max_rank, or untie them"
            )

    @property
    def told(self) -> list[dict[str, Any]]:
        """All that the layout and its bounds follow from, in plain values."""
        return [dataclasses.asdict(one) for one in self.competitors]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(one.path for one in self.competitors)

    @property
    def num_components(self) -> int:
        return len(self.layer)

    @property
    def num_layers(self) -> int:
        return len(self.names)

    @functools.cached_property
    def num_groups(self) -> int:
        return int(self.group.max(initial=-1)) + 1

    def by_group(self, values: np.ndarray, join: np.ufunc) -> np.ndarray:
        """One number per group from one per layer."""
        order = np.argsort(self.group, kind="stable")
        first = np.searchsorted(self.group[order], np.arange(self.num_groups))
        return join.reduceat(values[order], first) if len(values) else values

    def group_bounds(
        self, least: np.ndarray, most: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds that suit every layer of a group, from those of layers."""
        return self.by_group(least, np.maximum), self.by_group(most, np.minimum)

    def price(self, unit: Unit) -> np.ndarray:
        """What one more component in every layer of a group counts."""
        each = np.ones_like(self.cost) if unit == "components" else self.cost
        return self.by_group(each, np.add)

    def each(self, unit: Unit) -> np.ndarray:
        """What a component counts, the mean over the layers of each group.

        The counterpart of a seat's value, which is a mean too: their quotient is what a
        group gains over what it counts, however many layers it ties.
        """
        return self.price(unit) / self.members

    def spent(self, ranks: np.ndarray, unit: Unit) -> int:
        """What ranks, one per layer, count."""
        return int((ranks * (1 if unit == "components" else self.cost)).sum())

    def flat(self, parts: Mapping[str, Array]) -> Float[Array, " components"]:
        """Joins arrays of shape (*stack, max_rank), as the gates are, to one vector."""
        if missing := [path for path in self.paths if path not in parts]:
            raise BadInput(
                f"{missing[0]!r} competes for the budget and is not among the arrays "
                f"given ({len(missing)} of {len(self.paths)} paths missing)"
            )
        for one in self.competitors:
            if parts[one.path].shape != (*one.stack, one.max_rank):
                raise BadInput(
                    f"{one.path!r} has {one.max_rank} components in each layer of a "
                    f"stack {one.stack}, and the array given for it has shape "
                    f"{parts[one.path].shape}"
                )
        whole = [jnp.asarray(parts[path]).reshape(-1) for path in self.paths]
        return jnp.concatenate([jnp.zeros(0), *whole]).astype(jnp.float32)

    def parts(self, flat: Float[Array, " components"]) -> dict[str, Array]:
        """The inverse of `flat`."""
        found, start = {}, 0
        for one in self.competitors:
            size = one.num_layers * one.max_rank
            part = jax.lax.slice_in_dim(flat, start, start + size)
            found[one.path] = part.reshape(*one.stack, one.max_rank)
            start += size
        return found

    def per_layer(self, values: Array) -> Array:
        """Sums over the components of each layer."""
        return jax.ops.segment_sum(
            values, self.layer, self.num_layers, indices_are_sorted=True
        )

    def open_ranks(self, gates: Float[Array, " components"]) -> Int[Array, " layers"]:
        """Open components of each layer."""
        return self.per_layer((gates != 0).astype(jnp.int32))

    def prefix(
        self, ranks: Int[Array | np.ndarray, " layers"]
    ) -> Float[Array, " components"]:
        """Gates of which the first ones of each layer are open."""
        is_open = jnp.asarray(self.position) < jnp.asarray(ranks)[self.layer]
        return is_open.astype(jnp.float32)

    def named(self, ranks: Sequence[int] | np.ndarray) -> dict[str, int]:
        """Ranks by the name of the layer."""
        return {n: int(r) for n, r in zip(self.names, ranks, strict=True)}

    def from_names(self, ranks: Mapping[str, int]) -> np.ndarray:
        """Ranks of all layers from ranks by name; a path names all its layers.

        Raises:
          UnknownName: A name is neither a layer's nor a site's.
          BadInput: A layer has no rank or two, or one that is out of its bounds.
        """
        sites = {one.path: one.layer_names for one in self.competitors}
        found: dict[str, int] = {}
        for name, rank in ranks.items():
            if name not in self.names and name not in sites:
                raise UnknownName(
                    f"ranks are given for {name!r}, which is not among the "
                    f"{self.num_layers} layers that compete. Nearest: "
                    f"{nearest(name, {*self.names, *sites})}"
                )
            whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
            if not whole or rank < 0:
                raise BadInput(
                    f"the rank of {name!r} is {rank!r}: give a whole number of at "
                    "least 0"
                )
            for layer in sites.get(name, (name,)):
                if layer in found:
                    raise BadInput(
                        f"the rank of {layer!r} is given twice, by its own name and "
                        "by its site's; keep one of them"
                    )
                found[layer] = rank
        if missing := [name for name in self.names if name not in found]:
            raise BadInput(
                f"no rank is given for {missing[0]!r} ({len(missing)} of "
                f"{self.num_layers} layers have none); write 0 for a layer that is "
                "not to be corrected"
            )
        values = np.array([found[name] for name in self.names], np.int32)
        self.check_ranks(values, "given ranks")
        return values

    def check_ranks(self, ranks: np.ndarray, where: str) -> None:
        """Raises BadInput if a rank is out of bounds or tied layers differ."""
        for name, rank, low, high in zip(
            self.names, ranks, self.least, self.most, strict=True
        ):
            if not low <= rank <= high:
                raise BadInput(
                    f"{where}: {name!r} has rank {rank}, which is not between its "
                    f"minimum {low} and its maximum {high}; change the rank or, where "
                    "ranks move, ranks.bounds and ranks.max_rank"
                )
        low, high = (self.by_group(ranks, f) for f in (np.minimum, np.maximum))
        for group in np.flatnonzero(low != high):
            tied = [self.names[i] for i in np.flatnonzero(self.group == group)]
            raise BadInput(
                f"{where}: {', '.join(tied)} are tied and have ranks {low[group]} to "
                f"{high[group]}; tied layers have equal ranks"
            )

    def check_budget(
        self,
        budget: int,
        unit: Unit,
        where: str,
        most: np.ndarray | None = None,
        remedy: str = "ranks.budget, ranks.bounds or ranks.max_rank",
    ) -> None:
        """Raises BadInput if no ranks within the bounds suit a budget."""
        least, top = self.group_bounds(self.least, self.most if most is None else most)
        price = self.price(unit)
        low, high = int((least * price).sum()), int((top * price).sum())
        if not low <= budget <= high or budget > LARGEST:
            raise BadInput(
                f"{where} = {budget} {unit} is out of reach: the minimum ranks of "
                f"{self.num_layers} layers take {low}, the maximum ranks {high}. "
                f"Change {remedy}"
            )


def _check(one: Competitor) -> None:
    """Raises BadInput if the numbers of a site make no sense."""
    where = f"the competitor {one.path!r}"
    if one.max_rank < 0 or one.cost < 1 or any(n < 1 for n in one.stack):
        raise BadInput(
            f"{where} has max_rank {one.max_rank}, cost {one.cost}, stack {one.stack}: "
            "a cost and a stack are positive, a max_rank not negative"
        )
    if len(one.layer_names) != one.num_layers:
        raise BadInput(
            f"{where} has {one.num_layers} layers and {len(one.layer_names)} names"
        )
    for field in ("ranks", "least", "most"):
        if len(one.by_layer(field)) != one.num_layers:
            raise BadInput(
                f"{where} has {one.num_layers} layers, and {field} holds "
                f"{len(one.by_layer(field))} numbers; give one, or one per layer"
            )
    rows = zip(
        one.layer_names, *(one.by_layer(f) for f in ("least", "most")), strict=True
    )
    for name, least, most in rows:
        if not 0 <= least <= most <= one.max_rank:
            raise BadInput(
                f"{name!r} has minimum {least}, maximum {most} and max_rank "
                f"{one.max_rank}, and needs 0 <= minimum <= maximum <= max_rank; lower "
                "the minimum, raise the maximum, or raise max_rank"
            )
    for name, rank in zip(one.layer_names, one.by_layer("ranks"), strict=True):
        if not 0 <= rank <= one.max_rank:
            raise BadInput(
                f"{name!r} has rank {rank} under the rules, and max_rank is "
                f"{one.max_rank}; raise max_rank or lower the rank"
            )
