"""Discovery: which weights a program contracts, over which axes, at what cost.

The walk of `inject` with views that carry no delta. Nothing is computed: it runs
under `jax.eval_shape`, so shapes are enough.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.adapt import inject
from lowrank.adapt.programs import Programs
from lowrank.adapt.views import Label, WeightView
from lowrank.adapt.walk import Use
from lowrank.core.arrays import PyTree
from lowrank.core.paths import layer_path


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight and the uses it has.

    Attributes:
      path: Name of the weight.
      shape, dtype: Of the stored array.
      ins, outs, stacks: Axes of the stored array that are contracted, produced, and
        stacked (scanned or batched) by its uses.
      uses: The contractions it feeds.
      obstacle: Why it cannot be adapted in factored form; empty if it can.
      segment: Number of the path's segment that names the stack: the first one below
        which every array has as many entries on the axis of layers. A scanned Flax
        module is such a segment.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    stacks: tuple[int, ...]
    uses: tuple[Use, ...]
    obstacle: str = ""
    segment: int = 0

    @property
    def d_in(self) -> int:
        return math.prod(self.shape[d] for d in self.ins)

    @property
    def d_out(self) -> int:
        return math.prod(self.shape[d] for d in self.outs)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.stacks)

    @property
    def num_layers(self) -> int:
        """Matrices stacked in this weight."""
        return math.prod(self.stack_shape)

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """A name per stacked matrix, "encoder/layer[3]/query/kernel", in C order."""
        if not self.stacks:
            return (self.path,)
        layers = itertools.product(*map(range, self.stack_shape))
        return tuple(layer_path(self.path, self.segment, one) for one in layers)

    @property
    def largest_rank(self) -> int:
        """min(d_in, d_out): a correction of this rank can be any matrix."""
        return min(self.d_in, self.d_out)

    @property
    def parameters_per_rank(self) -> int:
        """Scalars that one more component adds, over all layers."""
        return self.num_layers * (self.d_in + self.d_out)

    @property
    def flops_per_rank(self) -> float:
        """Forward FLOPs of the correction per component, over all uses."""
        return sum(use.flops_per_rank for use in self.uses)

    @property
    def fan_in(self) -> int:
        """Inputs that reach one output: d_in, or 1 where rows are looked up."""
        return 1 if any(use.kind == "gather" for use in self.uses) else self.d_in

    def of_one_layer(self) -> "Site":
        """The site as it would be if its layers were weights of their own."""
        kept = [d for d in range(len(self.shape)) if d not in self.stacks]
        renumber = lambda dims: tuple(kept.index(d) for d in dims)
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[d] for d in kept),
            ins=renumber(self.ins),
            outs=renumber(self.outs),
            stacks=(),
        )

    def view(self, weight: Any, **parts: Any) -> WeightView:
        """The stored weight as a view with this site's labels."""
        labels = tuple(Label((d,), f"d{d}") for d in range(len(self.shape)))
        pick = lambda dims: tuple(labels[d] for d in dims)
        if not isinstance(weight, jax.ShapeDtypeStruct):
            weight = jnp.asarray(weight)
        return WeightView(
            weight=weight,
            labels=labels,
            ins=pick(self.ins),
            outs=pick(self.outs),
            stacks=pick(self.stacks),
            path=self.path,
            fan_in=self.fan_in,
            **parts,
        )


def discover(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    among: Collection[str] | None = None,
) -> Mapping[str, Site]:
    """Finds every weight of two or more axes and how it is used.

    Weights are floating-point arrays, and whole numbers of at most 8 bits: quantised
    weights, which the model turns into real ones itself.

    Args:
      apply: Pure function (params, *inputs) -> outputs.
      params: Tree of arrays or of `jax.ShapeDtypeStruct`.
      *inputs: Example inputs, arrays or shapes.
      among: Paths to look at; all by default. A weight that meets another one in a
        product can be adapted only if the other one is not.

    Returns:
      A site per weight, in tree order; `obstacle` tells which cannot be adapted.

    Raises:
      BadInput: A leaf of `params` is not an array.
    """
    return find(Programs(apply, params), inputs, among)


def find(
    programs: Programs, inputs: tuple[Any, ...], among: Collection[str] | None = None
) -> Mapping[str, Site]:
    """`discover` in a model whose trace is kept for later use."""
    jaxpr, consts, _ = programs(inputs)
    flat = programs.leaves
    candidates = {
        path
        for path, leaf in flat.items()
        if (among is None or path in among) and _is_weight(leaf)
    }
    walk = inject.walk(allow_dense=True, shapes_only=True)

    def run(leaves: dict[str, Any], others: list[Any]) -> None:
        given = [
            _unlabelled(path, leaves[path]) if path in candidates else leaves[path]
            for path in flat
        ]
        for value in walk(jaxpr, [*consts, *given, *others]):
            walk.materialize(value, "output of the model")

    jax.eval_shape(run, flat, jax.tree.leaves(inputs))
    uses: dict[str, list[Use]] = {path: [] for path in flat if path in candidates}
    for use in walk.uses:
        uses[use.path].append(use)
    return {path: _site(path, flat, tuple(found)) for path, found in uses.items()}


def plain_view(path: str, leaf: Any) -> Any:
    """A weight that nothing corrects, as a view whose uses are met; else the leaf."""
    is_view = isinstance(leaf, WeightView)
    return leaf if is_view or not _is_weight(leaf) else _unlabelled(path, leaf)


def _is_weight(leaf: Any) -> bool:
    """Whether an array may be a weight: of two axes or more, real or quantised."""
    dtype = leaf.dtype
    whole = jnp.issubdtype(dtype, jnp.integer)
    real = jnp.issubdtype(dtype, jnp.floating)
    return len(leaf.shape) >= 2 and (real or (whole and jnp.iinfo(dtype).bits <= 8))


def _unlabelled(path: str, leaf: Any) -> WeightView:
    labels = tuple(Label((d,), f"d{d}") for d in range(len(leaf.shape)))
    return WeightView(
        weight=leaf, factors={}, dials={}, rng=None, labels=labels, ins=(), outs=(),
        stacks=(), path=path, delta=None,
    )  # fmt: skip


def _site(path: str, flat: Mapping[str, Any], uses: tuple[Use, ...]) -> Site:
    """Orients the weight: by its lookup where it has one, else by its first product."""
    leaf = flat[path]
    factored = [use for use in uses if use.kind != "dense"]
    dense = sorted({use.primitive for use in uses if use.kind == "dense"})
    lookups = [use for use in factored if use.kind == "gather"]
    first = (lookups or factored or [None])[0]
    ins = first.contracted if first else ()
    outs = first.produced if first else ()
    stacks = tuple(d for d in range(len(leaf.shape)) if d not in (*ins, *outs))
    obstacle = ""
    if dense:
        obstacle = f"feeds {', '.join(dense)}, which would need the dense weight"
    elif not factored:
        obstacle = "is not used by the model for these inputs"
    elif {*ins} & {*outs}:
        obstacle = "has an axis of which one part is contracted and another is not"
        outs = ()
    elif not outs:
        obstacle = "has no output axis: every axis is contracted or stacked"
    elif any({*use.contracted} not in ({*ins}, {*outs}) for use in factored):
        obstacle = "is contracted over different axes by different uses"
    segment = _segment(path, flat, stacks[0]) if stacks and first else 0
    return Site(
        path, tuple(leaf.shape), str(leaf.dtype), ins, outs, stacks, uses, obstacle,
        segment,
    )  # fmt: skip


def _segment(path: str, flat: Mapping[str, Any], axis: int) -> int:
    """The first segment below which every array has this axis, and as long a one."""
    count, parts = flat[path].shape[axis], path.split("/")
    for segment in range(len(parts) - 1):
        above = "/".join(parts[: segment + 1]) + "/"
        below = (leaf.shape for name, leaf in flat.items() if name.startswith(above))
        if all(len(shape) > axis and shape[axis] == count for shape in below):
            return segment
    return len(parts) - 1
