"""The rewriting interpreter: which rule follows a weight through which primitive."""

from collections.abc import Callable, Mapping

from jaxtyping import Array

from lowrank.adapt import contractions, control, rearrange
from lowrank.adapt.walk import RewriteRule, Walk

RULES: Mapping[str, RewriteRule] = {
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "name", "reduce_precision",
         "sharding_constraint", "pvary", "pcast"),
        rearrange.unary,
    ),
    **dict.fromkeys(("reshard", "mesh_cast"), rearrange.place),
    "optimization_barrier": rearrange.barrier,
    "transpose": rearrange.transpose,
    "reshape": rearrange.reshape,
    "broadcast_in_dim": rearrange.broadcast,
    "squeeze": rearrange.squeeze,
    "slice": rearrange.cut_static,
    "split": rearrange.split,
    "dynamic_slice": rearrange.cut_dynamic,
    "rev": rearrange.reverse,
    "concatenate": rearrange.concatenate,
    "stack": rearrange.stack,
    **dict.fromkeys(("mul", "div", "neg"), rearrange.scale),
    "dot_general": contractions.dot,
    "gather": contractions.gather,
    "conv_general_dilated": contractions.conv,
    "ragged_dot_general": contractions.ragged_dot,
    **dict.fromkeys(
        ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call",
         "custom_vjp_call"),
        control.inline,
    ),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), control.remat),
    "scan": control.scan,
    "while": control.while_loop,
    "cond": control.cond,
    "shard_map": control.shard_map,
}  # fmt: skip


def walk(
    allow_dense: bool = False,
    shapes_only: bool = False,
    lay: Callable[[Array], Array] | None = None,
) -> Walk:
    """A walk by these rules.

    Args:
      allow_dense: Form the dense weight where no rule has a factored form.
      shapes_only, lay: See `Walk`.
    """
    return Walk(RULES, allow_dense=allow_dense, shapes_only=shapes_only, lay=lay)
