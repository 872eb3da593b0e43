"""The border to Flax NNX: a model as a pure function of a plain tree."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lowrank.core.arrays import PyTree


def from_nnx(model: nnx.Module) -> tuple[Callable[..., Any], PyTree]:
    """Splits an NNX model into `apply(params, *inputs)` and its variables.

    All variables (parameters, statistics, random state) are leaves of the tree, so
    none is baked into a compiled program. Updates that the call makes to them are
    dropped: call `model.eval()` first where dropout or batch statistics matter.

    Args:
      model: Any NNX module; it is not changed.

    Returns:
      The pure function and a nested dict of arrays, as `attach` takes them.
    """
    graph, state = nnx.split(model)

    def apply(params: PyTree, *inputs: Any, **options: Any) -> Any:
        # A copy of the containers: `replace_by_pure_dict` writes into its argument.
        fresh = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(fresh, params)
        return nnx.merge(graph, fresh)(*inputs, **options)

    return apply, nnx.to_pure_dict(state)
