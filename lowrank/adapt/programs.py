"""The model as a program: traced once for inputs of the same kind."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank.adapt.compat import trace
from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten


class Programs:
    """A model's cleaned jaxprs, one per kind of input.

    What else decides the trace is part of the key: a program traced with another
    matmul precision, dtype width or mesh computes something else.

    Attributes:
      apply: Pure function (params, *inputs) -> outputs.
      leaves, structure: Its parameters, by path.
    """

    def __init__(self, apply: Callable[..., Any], params: PyTree):
        self.apply = apply
        self.leaves, self.structure = flatten(params)
        for path, leaf in self.leaves.items():
            if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                raise BadInput(
                    f"params[{path!r}] must be an array or its shape, not {leaf!r}: a "
                    "model is a function of arrays; keep settings out of its "
                    "parameters"
                )
        self._traced: dict[Any, tuple[Any, list[Any], Any]] = {}

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Any, list[Any], Any]:
        """The open jaxpr, its leading constants, and the structure of its outputs."""
        leaves, structure = jax.tree.flatten(inputs)
        kinds = [_kind(x) for x in leaves]
        ambient = (
            # Stubs of JAX do not know the flags.
            jax.config.jax_default_matmul_precision,  # pyright: ignore
            jax.config.jax_enable_x64,  # pyright: ignore
            jax.sharding.get_abstract_mesh(),
        )
        key = (
            structure,
            tuple((k.shape, k.dtype, k.weak_type) for k in kinds),
            ambient,
        )
        if key not in self._traced:
            shapes = {path: _kind(leaf) for path, leaf in self.leaves.items()}
            params = self.structure.unflatten(shapes)
            abstract = jax.tree.unflatten(structure, kinds)
            self._traced[key] = trace(self.apply, params, *abstract)
        return self._traced[key]


def _kind(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weakness of an input: Python's 0.5 must not widen bfloat16."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
