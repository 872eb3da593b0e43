"""Rules for what runs programs of its own: jit, remat, loops, branches, shard_map.

Each is rebuilt with the public function of JAX around the walk of its body.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lowrank.adapt import views
from lowrank.adapt.compat import opened, scan_operands
from lowrank.adapt.joined import Joined, views_in
from lowrank.adapt.views import WeightView
from lowrank.adapt.walk import Walk

logger = logging.getLogger(__name__)


def inline(walk: Walk, eqn: Any, operands: list[Any]):
    """Calls: their body becomes part of the walk."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    corrected = any(view.delta is not None for view in views_in(operands))
    if eqn.primitive.name == "custom_vjp_call":
        # Weights that nothing corrects are arrays to it, and its own rule holds.
        plain = not corrected and not walk.shapes_only
        # Nothing else can derive a loop of unknown length, and that needs the weight.
        if plain or _has_while(jaxpr):
            return None
    if corrected and eqn.primitive.name.startswith("custom_"):
        logger.warning(
            "weights %s enter a function with its own derivative rule (%s); the rule "
            "is replaced by the derivative of its body",
            sorted({v.path for v in views_in(operands)}),
            eqn.primitive.name,
        )
    name = eqn.params.get("name")
    if not name:
        return walk(jaxpr, operands)
    with jax.named_scope(str(name)):
        return walk(jaxpr, operands)


def _has_while(jaxpr: Any) -> bool:
    """Whether a loop of unknown length is somewhere inside."""
    for eqn in opened(jaxpr)[0].eqns:
        if eqn.primitive.name == "while":
            return True
        for value in eqn.params.values():
            parts = value if isinstance(value, tuple | list) else [value]
            inner = [p for p in parts if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
            if any(map(_has_while, inner)):
                return True
    return False


def remat(walk: Walk, eqn: Any, operands: list[Any]):
    """`jax.checkpoint`, with the policy it had."""
    body = walk.body(eqn.params["jaxpr"])
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(*operands)


def cond(walk: Walk, eqn: Any, operands: list[Any]):
    """`lax.cond` and `lax.switch`; a weight may be used, not chosen, by a branch."""
    index, *given = operands
    if views_in([index]):
        return None
    before = dict(walk.ordinals)
    highest = dict(before)

    def branch(jaxpr: Any):
        def run(*args: Any) -> list[Any]:
            walk.ordinals = dict(before)
            results = [
                walk.materialize(value, "output of a branch of cond")
                for value in walk(jaxpr, args)
            ]
            for path, ordinal in walk.ordinals.items():
                highest[path] = max(highest.get(path, -1), ordinal)
            return results

        return run

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    results = lax.switch(index, branches, *given)
    walk.ordinals = highest
    return results


def while_loop(walk: Walk, eqn: Any, operands: list[Any]):
    """A loop of unknown length; weights are constants, or carried as they are."""
    params = eqn.params
    first, count = params["cond_nconsts"], params["body_nconsts"]
    asked, fixed = operands[:first], operands[first : first + count]
    carries = operands[first + count :]
    held = _held(params["body_jaxpr"], len(fixed), carries)
    moving = [c for d, c in enumerate(carries) if d not in held]
    if views_in(moving):
        return None
    test, body = walk.body(params["cond_jaxpr"]), walk.body(params["body_jaxpr"], held)
    state = lambda carry: _weave(carries, held, carry)

    def one_trip(carry: tuple[Any, list[Any]]):
        trip, values = carry
        own = [_trip(v, trip, 1) for v in [*fixed, *state(values)]]
        return trip + 1, body(*own)

    _, out = lax.while_loop(
        lambda carry: test(*asked, *state(carry[1]))[0],
        one_trip,
        (jnp.int32(0), moving),
    )
    return _weave(carries, held, out)


def scan(walk: Walk, eqn: Any, operands: list[Any]):
    """A loop over slices of weights, with others constant or carried as they are."""
    params = eqn.params
    consts, carries, scanned = scan_operands(params, operands)
    length = params["length"]
    held = _held(params["jaxpr"], len(consts), carries)
    moving = [c for d, c in enumerate(carries) if d not in held]
    sliced = [_unstack(v) for v in scanned]
    parts = [part for part in sliced if part is not None]
    if views_in(moving) or len(parts) < len(sliced):
        return None
    body = walk.body(params["jaxpr"], held)

    def one_trip(carry: list[Any], inputs: tuple[Any, Any]):
        trip, slices = inputs
        state = _weave(carries, held, carry)
        fixed = [_trip(value, trip, length) for value in [*consts, *state]]
        layers = [
            _counted(rebuild(piece), length)
            for piece, (_, rebuild) in zip(slices, parts, strict=True)
        ]
        results = body(*fixed, *layers)
        return results[: len(moving)], results[len(moving) :]

    xs = (jnp.arange(length), [piece for piece, _ in parts])
    out, ys = lax.scan(
        one_trip, moving, xs, length=length, reverse=params["reverse"],
        unroll=params["unroll"],
    )  # fmt: skip
    return [*_weave(carries, held, out), *ys]


def _unstack(value: Any) -> Any:
    """(arrays to scan over, slice -> value of one trip), or None; see `views`."""
    if isinstance(value, WeightView):
        return views.unstack(value)
    if not isinstance(value, Joined):
        return value, lambda one: one
    if value.axis == 0:
        return None
    parts = [_unstack(part) for part in value.parts]
    if any(part is None for part in parts):
        return None

    def rebuild(pieces: Any) -> Joined:
        made = tuple(own(piece) for piece, (_, own) in zip(pieces, parts, strict=True))
        return Joined(made, value.axis - 1)

    return [piece for piece, _ in parts], rebuild


def _weave(carries: Sequence[Any], held: Sequence[int], moving: Sequence[Any]):
    """All carries in order: held weights as they are, the others from `moving`."""
    rest = iter(moving)
    return [c if d in held else next(rest) for d, c in enumerate(carries)]


def _held(jaxpr: Any, num_consts: int, carries: Sequence[Any]) -> list[int]:
    """Which carries are weights that every trip hands on as they came."""
    jaxpr, consts, binders = opened(jaxpr)
    binders = binders[len(consts) + num_consts :]
    return [
        d
        for d, carry in enumerate(carries)
        if views_in([carry]) and jaxpr.outvars[d] is binders[d]
    ]


def _counted(value: Any, length: int) -> Any:
    if isinstance(value, Joined):
        return value.map(lambda part: _counted(part, length))
    if not isinstance(value, WeightView):
        return value
    return value.replace(trips=value.trips * length)


def _trip(value: Any, trip: Any, length: int) -> Any:
    """A weight used in every trip: counted `length` times, a fresh key for each."""
    if isinstance(value, Joined):
        return value.map(lambda part: _trip(part, trip, length))
    if not isinstance(value, WeightView):
        return value
    rng = value.rng
    if rng is not None:
        fold = lambda key: jax.random.fold_in(key, trip)
        for _ in range(rng.ndim):
            fold = jax.vmap(fold)
        rng = fold(rng)
    return _counted(value.replace(rng=rng), length)


def shard_map(walk: Walk, eqn: Any, operands: list[Any]):
    """Factors are cut the way their weight is: along the same axes of the mesh."""
    params = eqn.params
    specs = []
    for value, spec in zip(operands, params["in_specs"], strict=True):
        if isinstance(value, Joined):
            return None
        if isinstance(value, WeightView):
            spec = _specs(value, spec)
        if spec is None:
            return None
        specs.append(spec)
    body = walk.body(params["jaxpr"])
    manual = params.get("manual_axes", params.get("newly_manual_axes"))
    return jax.shard_map(
        lambda *args: tuple(body(*args)),
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        axis_names=frozenset(manual or params["mesh"].axis_names),
        check_vma=params["check_vma"],
    )(*operands)


def _specs(view: WeightView, spec: Any) -> WeightView | None:
    padded = [*spec, *[None] * (view.weight.ndim - len(spec))]
    axes = dict(zip(view.labels, padded, strict=True))
    along = {t for t, names in axes.items() if names is not None}
    if view.trained_whole and along & {*view.ins, *view.outs}:
        return None
    parts = view.map_parts(
        lambda _, own: PartitionSpec(*(axes.get(t) for t in own))  # pyright: ignore
    )
    return view.replace(weight=spec, **parts)
