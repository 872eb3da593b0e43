"""The walk: a model's jaxpr run equation by equation, with weights as views.

Targeted weights travel as `WeightView`s, or `Joined` where the program put several
side by side. A rule per primitive says what becomes of them; what has no rule needs
the dense weight, which is an error that names weight and primitive. Everything else
runs as it was traced.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from lowrank.adapt.call import DotCall
from lowrank.adapt.compat import Literal, context, evaluate, opened, stand_in
from lowrank.adapt.joined import Joined, views_in
from lowrank.adapt.views import WeightView
from lowrank.core.errors import BadInput
from lowrank.deltas.contraction import has_explicit_axes

#: (walk, equation, operands) -> results, or None where no factored form exists.
RewriteRule = Callable[["Walk", Any, list[Any]], Sequence[Any] | None]


@dataclasses.dataclass(frozen=True)
class Use:
    """One contraction that a weight feeds, in terms of the stored weight's axes.

    Attributes:
      path: The weight.
      kind: "dot", "gather", "conv", "ragged", or "dense": its primitive cannot be
        factored.
      primitive: Name of the JAX primitive.
      contracted, produced, batched: Axes of the stored weight.
      flops_per_rank: FLOPs of the correction per component, all trips included.
        Every branch of a conditional counts, a `while` loop counts as one trip.
      trips: How often the enclosing loops run this use.
    """

    path: str
    kind: str
    primitive: str
    contracted: tuple[int, ...] = ()
    produced: tuple[int, ...] = ()
    batched: tuple[int, ...] = ()
    flops_per_rank: float = 0
    trips: float = 1


@dataclasses.dataclass
class Walk:
    """What one walk collects and allows.

    Attributes:
      rules: What to do with a view, by name of the primitive.
      uses: Every use seen.
      allow_dense: Whether a weight may be formed where no factored rule exists.
      shapes_only: Run under `jax.eval_shape`, for uses, errors and shapes: what meets
        no weight is known from the trace, and one use of a kind stands for all.
      checked: Kinds of uses that were met by a walk for shapes.
      ordinals: Uses of each weight so far; part of a use's dropout key.
      lay: Says of what goes into a weight, and of what comes out, where it lies on a
        mesh, see `sharding.mesh.lay_rows`; None: nothing is said.
    """

    rules: Mapping[str, RewriteRule]
    uses: list[Use] = dataclasses.field(default_factory=list)
    allow_dense: bool = False
    shapes_only: bool = False
    checked: set[Hashable] = dataclasses.field(default_factory=set)
    ordinals: dict[str, int] = dataclasses.field(default_factory=dict)
    lay: Callable[[Array], Array] | None = None

    def ordinal(self, path: str) -> int:
        self.ordinals[path] = self.ordinals.get(path, -1) + 1
        return self.ordinals[path]

    def body(self, jaxpr: Any, held: Sequence[int] = ()) -> Callable[..., list[Any]]:
        """Runs a loop or remat body: the same ordinals however often it is traced.

        Results in `held` are weights that the loop hands on unchanged; they are left
        out of what the body returns.
        """
        before = dict(self.ordinals)

        def run(*args: Any) -> list[Any]:
            self.ordinals = dict(before)
            return [
                self.materialize(value, "output of a loop")
                for at, value in enumerate(self(jaxpr, args))
                if at not in held
            ]

        return run

    def materialize(self, value: Any, primitive: str) -> Any:
        """The plain array behind a view, where that is allowed."""
        if isinstance(value, Joined):
            parts = [self.materialize(part, primitive) for part in value.parts]
            return lax.concatenate(parts, value.axis)
        if not isinstance(value, WeightView):
            return value
        self.uses.append(Use(value.path, "dense", primitive, trips=value.trips))
        if value.delta is not None and not self.allow_dense:
            raise BadInput(
                f"weight {value.path!r} feeds the primitive {primitive!r}, where a "
                "delta can only act by forming the dense weight. Freeze this weight, "
                "adapt another one, or pass allow_dense=True (exact, slower, more "
                "memory)."
            )
        if value.delta is not None and not jnp.issubdtype(
            value.weight.dtype, jnp.floating
        ):
            raise BadInput(
                f"weight {value.path!r} is stored as {value.weight.dtype} and feeds "
                f"{primitive!r} as whole numbers, to which no correction can be added. "
                "It can be adapted where the model turns it into real numbers first "
                "(.astype), scales it, and multiplies. Freeze it, or give the model "
                "the weight in floating point."
            )
        return value.dense()

    def __call__(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Runs `jaxpr` on arrays and views."""
        jaxpr, consts, binders = opened(jaxpr)
        env = dict(zip(binders, [*consts, *args], strict=True))
        # Equations that meet no weight wait, to be run as one program.
        waiting: list[Any] = []

        def read(v: Any) -> Any:
            if isinstance(v, Literal):
                return v.val
            if v not in env and self.shapes_only:
                env[v] = stand_in(v.aval)
            return env[v]

        def settle() -> None:
            if waiting:
                env.update(evaluate(jaxpr, waiting, env))
                waiting.clear()

        seen = {v for v, value in env.items() if views_in([value])}
        for equation in jaxpr.eqns:
            inputs = [v for v in equation.invars if not isinstance(v, Literal)]
            if seen.isdisjoint(inputs):
                if not self.shapes_only:
                    waiting.append(equation)
                continue
            settle()
            operands = [read(v) for v in equation.invars]
            name = equation.primitive.name
            rule = self.rules.get(name)
            with context(equation):
                results = rule(self, equation, operands) if rule else None
            if results is None:
                arrays = [self.materialize(v, name) for v in operands]
                plain = {
                    v: array
                    for v, array in zip(equation.invars, arrays, strict=True)
                    if not isinstance(v, Literal)
                }
                done = evaluate(jaxpr, [equation], plain)
                results = [done[v] for v in equation.outvars]
            env.update(zip(equation.outvars, results, strict=True))
            seen |= {v for v in equation.outvars if views_in([env[v]])}
        settle()
        return [read(v) for v in jaxpr.outvars]

    def meet(self, call: DotCall, primitive: str, kind: str, flops: float) -> Any:
        """Records a use and lets the delta, if there is one, compute it."""
        view = call.view
        batched = call.batched
        dims = lambda ts: tuple(sorted({d for t in ts if t for d in t.dims}))
        rest = [t for t in view.labels if t not in call.contracted and t not in batched]
        self.uses.append(
            Use(
                view.path, kind, primitive, dims(call.contracted), dims(rest),
                dims(batched), flops * view.trips, view.trips,
            )
        )  # fmt: skip
        # A program with explicit axes has said itself where everything lies.
        if self.lay is not None and not has_explicit_axes():
            return self._laid(call)
        if view.delta is None or self._stands_for(call):
            return call.product()
        y = view.delta.use(view.factors, view.dials, call)
        if self.shapes_only:
            # What follows is known from the trace, and would not notice.
            call.check_answer(y)
        return y

    def _laid(self, call: DotCall) -> Any:
        """A use whose input and answer are told where they lie."""
        assert self.lay is not None
        view = call.view
        if call.x is not None:
            call.x = self.lay(call.x)
        if view.delta is None:
            return self.lay(call.product())
        y: Any = view.delta.use(view.factors, view.dials, call)
        return self.lay(y)

    def _stands_for(self, call: DotCall) -> bool:
        """Whether a use of this kind was checked before."""
        if not self.shapes_only or call.kind is None:
            return False
        known = call.kind in self.checked
        self.checked.add(call.kind)
        return known
