"""A model with its corrections: three trees, one function, one oracle."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank.adapt import inject, start
from lowrank.adapt.assign import assign, claim
from lowrank.adapt.plan import Plan
from lowrank.adapt.programs import Programs
from lowrank.adapt.rules import AnyRule, Rule, Train
from lowrank.adapt.sites import Site, find, plain_view
from lowrank.adapt.state import refuse_state
from lowrank.adapt.verify import Verification, compare
from lowrank.adapt.walk import Walk
from lowrank.core.arrays import Dials, Frozen, Key, PyTree, Roles, Trained
from lowrank.core.errors import BadInput, LowrankError
from lowrank.core.trees import flatten
from lowrank.deltas.base import Delta
from lowrank.deltas.thin import Thin


class Adapted:
    """What `attach` returns: the model as a function of `frozen`, `trained`, `dials`.

    Attributes:
      sites: The adapted weights by path.
      rules: The rule that each corrected or trained weight falls under, by path; by
        the names of layers where rules take layers of a stack.
      ref_rank: The number every scale is divided by.
      plans: What the rules make of each site, by path.
      allow_dense: See `attach`.
    """

    def __init__(
        self,
        programs: Programs,
        sites: Mapping[str, Site],
        plans: Mapping[str, Plan],
        rules: Mapping[str, AnyRule],
        ref_rank: int,
        allow_dense: bool,
    ):
        self._programs = programs
        self.allow_dense = allow_dense
        self.plans = plans
        self.sites = sites
        self.rules = rules
        self.ref_rank = ref_rank

    @property
    def ranks(self) -> dict[str, int]:
        """Active components at the start, by path.

        Each layer of a stack counts by itself, as "encoder/layer[3]/query/kernel", so
        that the sum is the number of components in use; a frozen layer has rank 0.
        """
        return {
            name: rank
            for path, site in self.sites.items()
            for name, rank in zip(site.layer_paths, self.plans[path].ranks, strict=True)
        }

    @property
    def fully_trained(self) -> tuple[str, ...]:
        """Paths that are trained whole."""
        return tuple(p for p, rule in self.rules.items() if isinstance(rule, Train))

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers: some delta has dropout."""
        return any(plan.delta.draws for plan in self.plans.values())

    def with_plans(
        self, plans: Mapping[str, Plan], rules: Mapping[str, AnyRule], ref_rank: int
    ) -> "Adapted":
        """The same model under plans for some of its sites; nothing is traced again."""
        sites = {path: self.sites[path] for path in plans}
        return Adapted(self._programs, sites, plans, rules, ref_rank, self.allow_dense)

    def around(self, apply: Callable[..., Any], *inputs: Any) -> "Adapted":
        """The same corrections on another function of the same parameters.

        As a language model that is trained by its scores and then reads with a cache.

        Args:
          apply: Pure function (params, *inputs) -> outputs.
          *inputs: Example inputs, arrays or shapes.

        Raises:
          BadInput: It uses a corrected weight in a way that has no factored form.
        """
        first = self._programs
        programs = Programs(apply, first.structure.unflatten(first.leaves))
        sites = find(programs, inputs, among=self.sites)
        found = Adapted(
            programs, sites, self.plans, self.rules, self.ref_rank, self.allow_dense
        )
        found.check(*inputs)
        return found

    def recipe(self, path: str) -> Delta:
        """The delta of a site."""
        return self.plans[path].delta

    def max_rank(self, path: str) -> int:
        """Components held for a site, or for each layer of a stacked one."""
        return self.plans[path].max_rank

    def layer_ranks(self, path: str) -> tuple[int, ...]:
        """Active components at the start of each matrix stacked in a site."""
        return self.plans[path].ranks

    def init(self, key: Key) -> tuple[Frozen, Trained]:
        """The frozen tree, which shares the base's arrays, and a fresh trained tree."""
        return self.frozen(), self.init_trained(key)

    def frozen(self, params: PyTree | None = None) -> dict[str, Any]:
        """The leaves that are not trained whole: the base's own arrays, uncopied."""
        leaves = self.leaves if params is None else flatten(params)[0]
        whole = set(self.fully_trained)
        return {path: leaf for path, leaf in leaves.items() if path not in whole}

    @property
    def leaves(self) -> Mapping[str, Any]:
        """The base's own arrays by path, those that are trained whole included."""
        return self._programs.leaves

    def init_trained(
        self, key: Key, leaves: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Draws one trial's factors and fully trained weights; pure, may be vmapped.

        Every weight, layer and component has a key of its own, derived from its
        name, so that none depends on what else is adapted.

        Args:
          key: Root of the trial's start.
          leaves: `self.leaves` as an argument of the program that calls this: left
            out under `jax.jit`, they are constants of that program, a second base.
        """
        leaves = self.leaves if leaves is None else leaves
        return start.draw(key, leaves, self.sites, self.plans, self.rules)

    def trained_shapes(self) -> dict[str, Any]:
        """Shapes of what `init_trained` draws; needs no weights, only their shapes."""
        return start.shapes(self.leaves, self.sites, self.plans, self.rules)

    def dials(self) -> dict[str, dict[str, Array]]:
        """Default dials: gates open up to each layer's rank, scale, dropout rate."""
        return {
            path: self.plans[path].dials(site, self.ref_rank)
            for path, site in self.sites.items()
        }

    def active(self, dials: Dials) -> dict[str, dict[str, Array]]:
        """Which entries of the factors may move: those of components that are open.

        Returns:
          Path -> factor -> mask that broadcasts to the factor; training leaves the
          other entries, and the optimizer's moments of them, as they are.
        """
        return {
            path: self.plans[path].active(site, dials[path])
            for path, site in self.sites.items()
        }

    def roles(self) -> Roles:
        """What every axis of every factor is for, by path and factor."""
        return {path: self.plans[path].roles(site) for path, site in self.sites.items()}

    def thin(self) -> dict[str, Thin]:
        """How penalties read every correction; BadInput if one is no thin product."""
        return {path: self.plans[path].thin(site) for path, site in self.sites.items()}

    def padding(self, dials: Dials | None = None) -> dict[str, dict[str, int]]:
        """Path -> factor -> scalars in it that no open component owns.

        Args:
          dials: Whose gates count; those of the start by default.
        """
        shapes, dials = self.trained_shapes(), dials or self.dials()
        return {
            path: self.plans[path].padding(site, shapes[path], dials[path])
            for path, site in self.sites.items()
        }

    def apply(
        self,
        frozen: Frozen,
        trained: Trained,
        *inputs: Any,
        dials: Dials | None = None,
        key: Key | None = None,
        lay: Callable[[Array], Array] | None = None,
    ) -> Any:
        """The adapted model. Call it under `jax.jit`: the walk itself is slow.

        Args:
          frozen: From `init`; closed over by nothing, copied by nothing.
          trained: From `init`.
          *inputs: What the model takes.
          dials: From `dials`; None means the defaults.
          key: Random key for dropout on the corrections; None means evaluation.
          lay: Where activations beside weights lie; see `walk.Walk`.

        Returns:
          What the model returns.

        Raises:
          BadInput: A tree lacks a path, or the inputs have shapes for which a weight
            cannot be adapted.
        """
        dials = self.dials() if dials is None else dials
        self._check_trees(frozen, trained, dials)
        walk = inject.walk(self.allow_dense, lay=lay)
        return self._run(walk, frozen, trained, inputs, dials, key)

    def check(self, *inputs: Any) -> Any:
        """Shapes of the outputs; raises what `apply` would, without computing."""

        def run(frozen: Frozen, trained: Trained, inputs: tuple[Any, ...]) -> Any:
            walk = inject.walk(self.allow_dense, shapes_only=True)
            return self._run(walk, frozen, trained, inputs, self._alike(), None)

        return jax.eval_shape(run, self.frozen(), self.trained_shapes(), inputs)

    def _alike(self) -> Dials:
        """`dials` to look at: hundreds of unrolled layers share the arrays of one."""
        kinds = {
            path: (self.plans[path], site.stack_shape)
            for path, site in self.sites.items()
        }
        one_of = {kind: path for path, kind in kinds.items()}
        dials = {
            kind: self.plans[path].dials(self.sites[path], self.ref_rank)
            for kind, path in one_of.items()
        }
        return {path: dials[kind] for path, kind in kinds.items()}

    def _run(self, walk: Walk, frozen, trained, inputs, dials, key) -> Any:
        leaves = [
            self._operand(path, frozen, trained, dials, key)
            for path in self._programs.structure.paths
        ]
        if walk.lay is not None:
            # Uses of weights that nothing corrects are met, too.
            paths = self._programs.structure.paths
            leaves = list(map(plain_view, paths, leaves))
        jaxpr, consts, out = self._programs(inputs)
        results = walk(jaxpr, [*consts, *leaves, *jax.tree.leaves(inputs)])
        values = [walk.materialize(v, "output of the model") for v in results]
        return jax.tree.unflatten(out, values)

    def _check_trees(self, frozen: Frozen, trained: Trained, dials: Dials) -> None:
        whole = set(self.fully_trained)
        base = [path for path in self._programs.structure.paths if path not in whole]
        for name, tree, paths in (
            ("frozen", frozen, base),
            ("trained", trained, [*self.sites, *whole]),
            ("dials", dials, self.sites),
        ):
            if missing := [path for path in paths if path not in tree]:
                raise BadInput(
                    f"{name} lacks {missing[0]!r} ({len(missing)} of {len(paths)} "
                    "paths missing): it is the flat mapping from path to arrays that "
                    "`init` (frozen, trained) or `dials` of this model gives"
                )

    def _operand(self, path: str, frozen, trained, dials, key) -> Any:
        if path not in self.sites:
            return trained[path] if path in trained else frozen[path]
        site, plan = self.sites[path], self.plans[path]
        own, rng = plan.drawn(site, dials[path], key)
        return site.view(
            frozen[path], factors=trained[path], dials=own, rng=rng,
            delta=plan.delta, max_rank=plan.max_rank,
        )  # fmt: skip

    def base_apply(self, params: PyTree, *inputs: Any) -> Any:
        """The model as it was given."""
        return self._programs.apply(params, *inputs)

    def merge(
        self, frozen: Frozen, trained: Trained, dials: Dials | None = None
    ) -> PyTree:
        """The dense parameters W' of every site, in the structure of `params`.

        Raises:
          LowrankError: A merged weight is not finite.
        """
        params = self._merged(frozen, trained, self.dials() if dials is None else dials)
        changed = {*self.sites, *self.fully_trained}
        for path, leaf in flatten(params)[0].items():
            if path in changed and not bool(jnp.isfinite(leaf).all()):
                raise LowrankError(
                    f"merging {path!r} gives values that are not finite; the adapter "
                    "is damaged or its training diverged"
                )
        return params

    def _merged(self, frozen: Frozen, trained: Trained, dials: Dials) -> PyTree:
        leaves = {}
        for path in self._programs.structure.paths:
            operand = self._operand(path, frozen, trained, dials, None)
            leaves[path] = operand.dense() if path in self.sites else operand
        return self._programs.structure.unflatten(leaves)

    def verify(self, key: Key, *inputs: Any, tolerance: float = 1e-5) -> Verification:
        """Compares the factored program with the merged one on real inputs.

        Args:
          key: Decides the factors, none of them silent, and the weights of outputs.
          *inputs: What the model takes.
          tolerance: Largest relative error to accept.

        Raises:
          LowrankError: An error is above `tolerance`.
        """
        frozen, trained = self.init(key)
        dials = self.dials()
        return compare(
            lambda t, f: self.apply(f, t, *inputs, dials=dials),
            lambda t, f: self._programs.apply(self._merged(f, t, dials), *inputs),
            trained,
            frozen,
            key,
            tolerance,
        )


def attach(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    rules: Sequence[AnyRule],
    ref_rank: int | None = None,
    allow_dense: bool = False,
) -> Adapted:
    """Puts corrections on a model without touching it.

    Inputs are positional; what a model takes by keyword is bound first, and what
    changes from call to call becomes an input:

        attach(functools.partial(model.apply, train=False), params, x, rules=rules)
        attach(lambda p, x, given: model.apply(p, x, **given), params, x, given, ...)

    A weight stored in whole numbers (int8 and narrower) is corrected in its own
    units, before the model scales it: W' = (W + dW) * scale. Its factors are float32,
    and so is the merged weight.

    Args:
      apply: Pure function (params, *inputs) -> outputs, of any framework.
      params: Its parameters: arrays, or shapes for a preview.
      *inputs: Example inputs, arrays or shapes.
      rules: Tried in order for every weight and every layer of a stack; the first
        match wins.
      ref_rank: Divisor of every scale; the largest rank of the rules by default.
      allow_dense: Form the dense weight where a primitive has no factored rule.

    Returns:
      The adapted model.

    Raises:
      UnknownName: A pattern matches no weight.
      BadInput: A rule is shadowed, a rank does not fit, or a weight cannot be adapted;
        raised before anything is compiled.
    """
    if ref_rank is not None and (type(ref_rank) is not int or ref_rank < 1):
        raise BadInput(
            f"ref_rank divides every scale: it is a whole number of at least 1, not "
            f"{ref_rank!r}"
        )
    programs = Programs(apply, params)
    claims = claim(rules, programs.leaves)
    wanted = [p for p, own in claims.items() if any(isinstance(r, Rule) for r in own)]
    found = find(programs, inputs, among=wanted)
    plans, owners = assign(claims, found, allow_dense)
    ranks = [rule.rank for rule in owners.values() if isinstance(rule, Rule)]
    result = Adapted(
        programs,
        {path: found[path] for path in plans},
        plans,
        owners,
        ref_rank or max(ranks, default=1),
        allow_dense,
    )
    # What cannot be factored is said here, not in the first step.
    refuse_state(result.rules, result.check(*inputs))
    return result
