"""What a model may be asked for, whatever its family: dtypes, precision, remat."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.core.errors import BadInput

Remat = Literal["none", "full", "dots"]
Dtype = Literal["float32", "bfloat16", "float64"]
Precision = Literal["highest", None]
#: How weights are split over devices: patterns, and the mesh axes for each of the last
#: axes of a weight; the first that matches holds, and what none matches is whole. These
#: maps come in pairs: what the first one of a pair computes stays split along hidden
#: units (or heads) until the second sums over them.
PAIRED: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("**/attention/{query,key,value,qkv}/kernel", ("fsdp", "tensor")),
    ("**/attention/{query,key,value,qkv}/bias", ("tensor",)),
    ("**/attention/output/kernel", ("tensor", "fsdp")),
    ("**/mlp/**/{gate,up}/kernel", ("fsdp", "tensor")),
    ("**/mlp/**/{gate,up}/bias", ("tensor",)),
    ("**/mlp/**/down/kernel", ("tensor", "fsdp")),
)


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype called `name`.

    Raises:
      BadInput: Not a dtype we compute in, or float64 while JAX has it switched off.
    """
    check_choice("dtype", name, Dtype)
    enabled = jax.config.jax_enable_x64  # pyright: ignore
    if name == "float64" and not enabled:
        raise BadInput(
            "dtype 'float64' needs JAX_ENABLE_X64=1; without it JAX computes in "
            "float32. Set the variable, or use dtype 'float32'."
        )
    return jnp.dtype(name)


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Refuses what is none of a Literal's values.

    Raises:
      BadInput: Says field, values and what was given.
    """
    if value not in get_args(choices):
        raise BadInput(f"{field} must be one of {get_args(choices)}, not {value!r}")


def rematerialized(
    layer: type[nn.Module], remat: str, scanned: bool
) -> type[nn.Module]:
    """A layer whose backward pass computes again what `remat` says.

    Args:
      layer: A layer's class.
      remat: "none"; "full", a layer keeps only its input; or "dots", products with
        weights are kept, the rest is computed again.
      scanned: Whether layers are scanned: then nothing can be merged across the
        barrier anyway.
    """
    check_choice("remat", remat, Remat)
    if remat == "none":
        return layer
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(layer, policy=policy, prevent_cse=not scanned)
