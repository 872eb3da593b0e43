"""Ranks in a run: what competes, how trials share an allocator, what is left of it.

`allocate` knows layouts and `adapt` knows sites; here the one becomes the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.adapt.attach import Adapted
from lowrank.adapt.rules import AnyRule, Rule, Train
from lowrank.allocate import allocation as allocations
from lowrank.allocate.adaptive import Adaptive, Allocator
from lowrank.allocate.fixed import Uniform
from lowrank.allocate.slots import Competitor, Slots
from lowrank.core.arrays import Dials
from lowrank.core.errors import BadInput, NonFinite
from lowrank.io.history import MOVES_SCHEMA
from lowrank.run.bounds import Bounds
from lowrank.train.ablation import ablation
from lowrank.train.losses import Loss
from lowrank.train.probes import OF_INPUTS
from lowrank.train.ranks import Gauge, RankEvents
from lowrank.train.state import TrainState

#: Signals that a step can measure of corrections which are sums of thin products.
_OF_SIZE = frozenset({"norms", "spectrum"}) | OF_INPUTS
#: Signals for which the model runs once more.
_APART = frozenset({"ablation"})


def slots_of(
    adapted: Adapted,
    dials: Dials | None = None,
    most: Callable[[str], int] | None = None,
    held: Callable[[str], int] | None = None,
    bounds: Bounds = Bounds(),
) -> Slots:
    """What competes in a model: every layer of every corrected weight.

    A layer that the rules freeze stays frozen: its largest rank is zero.

    Args:
      adapted: The model.
      dials: A trial's, whose open gates are its ranks; the model's own by default.
      most: Path -> the largest rank of a layer; by default what is held.
      held: Path -> components held; by default those of the model.
      bounds: Of single layers, and ties.

    Raises:
      BadInput: A correction has no gates, or bounds and layers do not go together.
    """
    dials = adapted.dials() if dials is None else dials
    held = adapted.max_rank if held is None else held
    most = held if most is None else most
    found = []
    for path, site in adapted.sites.items():
        if "gate" not in dials[path]:
            raise BadInput(
                f"ranks are gates that open and shut, and the correction of {path!r} "
                f"by {type(adapted.recipe(path)).__name__} has none: set ranks=uniform"
            )
        gate = np.asarray(dials[path]["gate"])
        ranks = tuple(int(n) for n in (gate != 0).sum(axis=-1).reshape(-1))
        top = min(most(path), held(path))
        found.append(
            Competitor(
                path=path,
                max_rank=held(path),
                cost=_cost(adapted, path),
                ranks=ranks,
                stack=site.stack_shape,
                names=site.layer_paths,
                most=tuple(top if rank else 0 for rank in ranks),
            )
        )
    return Slots(bounds.on(found))


def _cost(adapted: Adapted, path: str) -> int:
    """Parameters of one component of one layer."""
    site = adapted.sites[path]
    sizes = {"rank": 1, "stack": 1, "in": site.d_in, "out": site.d_out}
    return sum(
        math.prod(sizes[role] for role in dict.fromkeys(roles))
        for roles in adapted.roles()[path].values()
        if "rank" in roles
    )


def gauges(model: Callable[..., Any], loss: Loss) -> dict[str, Gauge]:
    """What measures the signals for which the model runs once more, by their names.

    Args:
      model: The adapted model, which takes whole batches.
      loss: What is minimized.
    """
    return {"ablation": ablation(model, loss)}


def rank_events(
    adapted: Adapted,
    allocators: Sequence[Allocator],
    slots: Sequence[Slots],
    num_steps: int,
    gauges: Mapping[str, Gauge],
) -> RankEvents:
    """What allocators do to a pack.

    Args:
      adapted: The model in the common shape.
      allocators, slots: One per trial.
      num_steps: Of the whole training.
      gauges: From `gauges`, for signals that need one.

    Raises:
      BadInput: Budget, bounds, window and ranks do not go together, a signal cannot be
        measured, or the trials cannot share a program.
    """
    each = [one.on(own, num_steps) for one, own in zip(allocators, slots, strict=True)]
    whole, constants = allocations.pack(each)
    if whole.needs & OF_INPUTS:
        _check_watched(adapted)
    if whole.program.squeezed:
        _check_squeezable(adapted)
    return RankEvents(
        allocation=whole,
        constants=constants,
        zeroed={path: _zeroed(adapted, path) for path in adapted.sites},
        thin=adapted.thin() if whole.needs & _OF_SIZE else {},
        roles=adapted.roles(),
        gauge=next((gauges[name] for name in sorted(whole.needs & _APART)), None),
    )


def begun(
    adapted: Adapted,
    allocators: Sequence[Allocator],
    slots: Sequence[Slots] | None,
    dials: Sequence[Dials] | None,
    num_steps: int,
    gauges: Mapping[str, Gauge],
) -> tuple[RankEvents | None, Sequence[Dials] | None]:
    """How ranks of a pack move, and the dials that its trials begin with.

    Where all ranks are those of the rules, and where they are others that stay, there
    are no events: such a pack runs the program, and holds the state, of any other.

    Raises:
      BadInput: See `rank_events`; or there is not one layout per trial.
    """
    if all(one == Uniform() for one in allocators):
        return None, dials
    given = [adapted.dials()] * len(allocators) if dials is None else dials
    own = [slots_of(adapted, one) for one in given] if slots is None else slots
    if len(own) != len(allocators):
        raise BadInput(
            f"{len(allocators)} trials have {len(own)} layouts of what competes; give "
            "one each"
        )
    events = rank_events(adapted, allocators, own, num_steps, gauges)
    moves = events.allocation.program.importance is not None
    return events if moves else None, events.opened(given)


def check_settled(
    events: RankEvents | None, state: TrainState, ended: Sequence[Any]
) -> None:
    """Refuses a run that was over before its ranks were final.

    Raises:
      NonFinite: So many batches were skipped by rollbacks.
    """
    if events is None:
        return
    for trial, why in enumerate(ended):
        last = int(events.constants["end"][trial])
        if why is None and int(state.step) <= last:
            raise NonFinite(
                f"trial {trial} took {int(state.step)} steps, since rollbacks skipped "
                f"batches, and its ranks are final at step {last}: set an earlier "
                "ranks.end, or cure what is not finite (optim.lr, optim.clip)"
            )


def over_time(events: RankEvents, state: TrainState, trial: int) -> dict[str, Any]:
    """The ranks that a trial kept: "steps", and path -> (steps, *stack).

    The first row is what the first step began with; then one row per event.
    """
    slots, history = events.allocation.slots, state.ranks["history"]
    steps = _event_steps(events, state, trial)
    rows = np.asarray(history["ranks"][trial, : len(steps) - 1])
    rows = np.concatenate([events.constants["ranks"][trial][None], rows])
    found: dict[str, Any] = {"steps": steps}
    start = 0
    for one in slots.competitors:
        stop = start + one.num_layers
        found[one.path] = rows[:, start:stop].reshape(len(rows), *one.stack)
        start = stop
    return found


def moves(events: RankEvents, state: TrainState, trial: int) -> dict[str, Any]:
    """What `over_time` does not say, as `io.history` reads it: budgets and exchanges.

    Returns:
      "sites", path -> how many layers it has and the parameters of a component of one;
      "unit" of budgets; whether losers were "revivable", and until which step, "end";
      "target", the budget at each row of `over_time`; "gained", layer -> components
      that each event added, which the change of its rank does not tell where others
      went.
    """
    program, slots = events.allocation.program, events.allocation.slots
    steps = _event_steps(events, state, trial)
    gained = np.asarray(state.ranks["history"]["gained"][trial, : len(steps) - 1])
    return {
        "schema": MOVES_SCHEMA,
        "unit": program.unit,
        "revivable": program.revivable,
        "end": int(events.constants["end"][trial]),
        "target": events.constants["budget"][trial][steps].tolist(),
        "sites": {
            one.path: {"layers": one.num_layers, "cost": one.cost}
            for one in slots.competitors
        },
        "gained": dict(zip(slots.names, gained.T.tolist(), strict=True)),
    }


def _event_steps(events: RankEvents, state: TrainState, trial: int) -> np.ndarray:
    """0, then the step that followed each event that was."""
    count = int(state.ranks["history"]["count"][trial])
    due = np.flatnonzero(events.constants["due"][trial])[:count]
    return np.array([0, *due], np.int32)


def final(adapted: Adapted, dials: Dials) -> dict[str, int]:
    """Open components of every layer, by its name."""
    found = {}
    for path, site in adapted.sites.items():
        if "gate" in dials[path]:
            ranks = (np.asarray(dials[path]["gate"]) != 0).sum(axis=-1).reshape(-1)
            named = zip(site.layer_paths, ranks, strict=True)
            found |= {name: int(rank) for name, rank in named}
    return found


def settled_rules(
    allocator: Allocator, alone: Adapted, rules: Sequence[AnyRule]
) -> list[AnyRule]:
    """Rules that give the ranks of an allocator which never moves them.

    So a run with other ranks is a run with other rules: it holds as many components as
    it has, and a layer of rank 0 costs nothing. The scale stays, see `ref_rank`.

    Args:
      allocator: Not an adaptive one.
      alone: The trial's model under its own rules.
      rules: These.

    Raises:
      BadInput: The ranks do not fit the model.
    """
    if allocator == Uniform() or isinstance(allocator, Adaptive):
        return list(rules)
    slots = slots_of(alone, held=lambda path: alone.sites[path].largest_rank)
    ranks = slots.named(allocator.on(slots, 1).constants["ranks"])
    whole: list[AnyRule] = [rule for rule in rules if isinstance(rule, Train)]
    return whole + [
        Rule(name, alone.recipe(path), ranks[name])
        for path, site in alone.sites.items()
        for name in site.layer_paths
        if ranks[name]
    ]


def _check_watched(adapted: Adapted) -> None:
    for path in adapted.sites:
        recipe = adapted.recipe(path)
        if "gram" not in recipe.axes:
            raise BadInput(
                f"the correction of {path!r} by {type(recipe).__name__} has no dial "
                "'gram', by which its inputs in rank space are measured: set another "
                "ranks.importance, or correct the weight with LoRA"
            )
        site = adapted.sites[path]
        odd = [use.primitive for use in site.uses if use.kind != "dot"]
        if odd or {use.contracted for use in site.uses} != {site.ins}:
            how = ", ".join(odd) or "products on both of its sides"
            raise BadInput(
                f"{path!r} is used by {how}, of which the inputs in rank space cannot "
                "be measured: leave it out (delta.targets), or set another "
                "ranks.importance"
            )


def _check_squeezable(adapted: Adapted) -> None:
    for path in adapted.sites:
        recipe = adapted.recipe(path)
        if recipe.silent:
            raise BadInput(
                f"the correction of {path!r} by {type(recipe).__name__} has a factor "
                f"{recipe.silent!r} beside two thin ones, and ranks.mode=squeezed "
                "writes it by two: set another ranks.mode, or delta=lora"
            )


def _zeroed(adapted: Adapted, path: str) -> str:
    """The factor that is zero in a component which says nothing."""
    linear, silent = adapted.recipe(path).linear, adapted.recipe(path).silent
    if silent:
        return silent
    if "out" not in linear:
        raise BadInput(
            f"the correction of {path!r} by {type(adapted.recipe(path)).__name__} is "
            "not linear in a factor along the outputs, which a birth would set to "
            "zero: set ranks=uniform, or correct the weight with LoRA"
        )
    return linear["out"]
