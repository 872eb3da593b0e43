"""One model under several sets of rules that differ in numbers only: a pack's trials.

Trials of a pack run one program, so they hold equally many components of every site;
what sets their rules apart (ranks, alpha, dropout) is in their dials. `pack` finds the
common shape of such trials, `Variants.dials` says each one's dials in that shape, and
`Variants.own` cuts a trial's factors back to what it would have had alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank.adapt.assign import assign, claim
from lowrank.adapt.attach import Adapted
from lowrank.adapt.rules import AnyRule, Rule
from lowrank.core.arrays import Dials, Trained
from lowrank.core.errors import BadInput
from lowrank.deltas.base import Delta


@dataclasses.dataclass(frozen=True)
class Variants:
    """Trials that one program can run.

    Attributes:
      together: The model with room for every trial's components.
      alone: The model as each trial's own rules have it.
    """

    together: Adapted
    alone: tuple[Adapted, ...]

    def dials(self) -> list[Dials]:
        """Every trial's dials: its ranks, scale and rates, in the common shape."""
        common = self.together.dials()

        def of(one: Adapted, path: str) -> dict[str, Array]:
            wide = dataclasses.replace(
                one.plans[path], max_rank=self.together.max_rank(path)
            )
            own = wide.dials(one.sites[path], one.ref_rank)
            # An option that only neighbors take: none of it.
            none = {n: jnp.zeros_like(v) for n, v in common[path].items()}
            return {**none, **own}

        return [{path: of(one, path) for path in one.sites} for one in self.alone]

    def own(self, trial: int, trained: Trained, dials: Dials) -> tuple[Trained, Dials]:
        """A trial's trees without the components that it only held for its neighbors.

        Args:
          trial: Its number.
          trained, dials: Its trees in the common shape, without the trials axis.
        """
        adapted = self.alone[trial]
        sites, known = adapted.sites, adapted.dials()
        cut = lambda path, parts: adapted.plans[path].cut(sites[path], parts)
        whole = {path: trained[path] for path in adapted.fully_trained}
        factors = {path: cut(path, trained[path]) for path in sites}
        kept = {path: {n: dials[path][n] for n in known[path]} for path in sites}
        return {**whole, **factors}, {path: cut(path, kept[path]) for path in sites}


def pack(
    adapted: Adapted,
    rules: Sequence[Sequence[AnyRule]],
    ref_ranks: Sequence[int | None],
) -> Variants:
    """The variants of a model under the rules of several trials.

    Args:
      adapted: From `attach`, under the rules of any of them.
      rules: Each trial's, as `attach` takes them.
      ref_ranks: Each trial's divisor of the scale, or None: its largest rank.

    Returns:
      The variants; those of a single trial are `adapted` itself.

    Raises:
      BadInput: The trials adapt different weights, or in a way that dials cannot tell
        apart: they cannot share a program.
    """
    alone = tuple(
        _variant(adapted, own, ref_rank)
        for own, ref_rank in zip(rules, ref_ranks, strict=True)
    )
    first = alone[0]
    for trial, one in enumerate(alone[1:], start=1):
        _check_alike(first, one, trial)
    plans = {
        path: dataclasses.replace(
            first.plans[path],
            delta=_joined([one.recipe(path) for one in alone]),
            max_rank=max(one.max_rank(path) for one in alone),
        )
        for path in first.sites
    }
    return Variants(first.with_plans(plans, first.rules, first.ref_rank), alone)


def _apart(path: str) -> BadInput:
    return BadInput(
        f"the trials do not adapt the same weights: {path!r} is one of some trials "
        "only; they cannot share a program"
    )


def _variant(
    adapted: Adapted, rules: Sequence[AnyRule], ref_rank: int | None
) -> Adapted:
    """The model under other rules; nothing is traced again."""
    claims = claim(rules, adapted.leaves)
    wanted = {p for p, own in claims.items() if any(isinstance(r, Rule) for r in own)}
    if unknown := sorted(wanted - {*adapted.sites}):
        raise _apart(unknown[0])
    plans, owners = assign(claims, adapted.sites, adapted.allow_dense)
    ranks = [rule.rank for rule in owners.values() if isinstance(rule, Rule)]
    return adapted.with_plans(plans, owners, ref_rank or max(ranks, default=1))


def _check_alike(first: Adapted, other: Adapted, trial: int) -> None:
    if odd := {*first.sites} ^ {*other.sites}:
        raise _apart(min(odd))
    if odd := {*first.fully_trained} ^ {*other.fully_trained}:
        raise _apart(min(odd))
    for path, plan in first.plans.items():
        one, two = plan.delta, other.plans[path].delta
        if static(one) != static(two):
            raise BadInput(
                f"trials 0 and {trial} correct {path!r} with {one} and {two}, which "
                "differ in more than dials; they cannot share a program"
            )


def _joined(deltas: Sequence[Delta]) -> Delta:
    """A delta that does whatever any of the trials asks for; how much is in dials."""
    first = deltas[0]
    values = {n: [getattr(one, n) for one in deltas] for n in first.dialled}
    numbers = {n: max(v) for n, v in values.items() if not isinstance(v[0], str)}
    return first.clone(**numbers)


def static(delta: Delta) -> tuple[Any, ...]:
    """What two deltas must share for one program to serve both."""
    fields = dataclasses.fields(delta)
    own = [f.name for f in fields if f.name not in ("parent", *delta.dialled)]
    return (type(delta), *((name, getattr(delta, name)) for name in own))
