"""The few places where the walk touches JAX internals that differ by version.

Between jax 0.10 and 0.12 `ClosedJaxpr` was merged into `Jaxpr` and `scan` renamed
its parameters. Everything else in this room uses public functions only.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AxisType

Jaxpr = Any
Literal = jex_core.Literal


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any], list[Any]]:
    """Splits a jaxpr, closed or open, into itself, constants and all binders."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    is_closed = inner is not jaxpr and hasattr(jaxpr, "consts")
    consts = list(jaxpr.consts) if is_closed else list(getattr(jaxpr, "consts", ()))
    inner = inner if is_closed else jaxpr
    return inner, consts, [*inner.constvars, *inner.invars]


def scan_operands(params: dict[str, Any], operands: Sequence[Any]):
    """Splits the operands of a scan into constants, carries and scanned arrays."""
    if "num_consts" in params:
        first, second = params["num_consts"], params["num_carry"]
        second += first
        return operands[:first], operands[first:second], operands[second:]
    return [list(part.vals) for part in params["ft_in"].update(operands).unpack()]


def evaluate(
    jaxpr: Jaxpr, equations: Sequence[Any], env: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Runs some equations of `jaxpr` as the program that they are.

    Contexts, effects and custom derivative rules stay as they were, without asking
    a primitive how its parameters are bound, which changes between versions.

    Args:
      jaxpr: Where the equations stand.
      equations: In order.
      env: Values of all variables that they read and do not make.

    Returns:
      The values of the variables they make.
    """
    made = {v: None for eqn in equations for v in eqn.outvars}
    given = {
        v: env[v]
        for eqn in equations
        for v in eqn.invars
        if not isinstance(v, Literal) and v not in made
    }
    changes: dict[str, Any] = {
        "invars": list(given),
        "outvars": list(made),
        "eqns": list(equations),
        "effects": set().union(*(eqn.effects for eqn in equations)),
        "debug_info": jaxpr.debug_info.with_unknown_names(),
    }
    if hasattr(jaxpr, "all_invars"):
        jaxpr = _unbound(jaxpr)
    else:
        changes["constvars"] = []
    done = jax.core.eval_jaxpr(jaxpr.replace(**changes), (), *given.values())
    return dict(zip(made, done, strict=True))


def context(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """The mesh of an equation where its axes are explicit, else what there is.

    A part of a program may be explicit about a mesh whose axes are automatic around it
    (`jax.sharding.explicit_axes`).
    """
    mesh = equation.ctx.cur_abstract_mesh
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext()


#: A value of which only the kind is known; it can be traced and not run.
_STAND_IN = jex_core.Primitive("stand_in")
_STAND_IN.def_abstract_eval(lambda *, kind: kind)


def stand_in(kind: Any) -> Any:
    """An array of this kind, for a trace that is never run (`jax.eval_shape`)."""
    return _STAND_IN.bind(kind=kind)


def _unbound(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with its constants as leading arguments, where it held them itself."""
    return jaxpr.with_consts(()) if getattr(jaxpr, "num_consts", 0) else jaxpr


def _varying(kind: Any) -> frozenset[str]:
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())


def vary_alike(*arrays: Any) -> list[Any]:
    """Makes arrays vary over the same axes of an enclosing `shard_map`.

    A hand-written derivative is checked for it: the gradient of a factor that is the
    same on every device must be summed over devices, which this leaves to JAX.
    """
    kinds = [_varying(jax.typeof(x)) for x in arrays]
    everywhere = frozenset().union(*kinds)
    return [
        lax.pcast(x, tuple(everywhere - own), to="varying") if everywhere - own else x
        for x, own in zip(arrays, kinds, strict=True)
    ]


def trace(fn: Callable, *args: Any) -> tuple[Jaxpr, list[Any], Any]:
    """Traces `fn` and removes what its outputs do not need.

    Dead code matters: a scan that hands its weights back would otherwise show every
    weight as used whole.

    Returns:
      The open jaxpr, the values of its leading constants, the output structure.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts, binders = opened(closed)
    if getattr(closed, "jaxpr", closed) is not closed:
        jaxpr = jaxpr.replace(constvars=[], invars=binders)
    cleaned, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _unbound(cleaned), consts, jax.tree.structure(shapes)
