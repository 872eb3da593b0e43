"""What is said of a finished training: misplaced ranks, and budgets three ways."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import stats

from lowrank.adapt.attach import Adapted
from lowrank.allocate.adaptive import Adaptive, Allocator
from lowrank.allocate.slots import Slots, Unit
from lowrank.cost.count import lora_flops
from lowrank.run.fit import Fit
from lowrank.run.ranks import final, over_time

#: A pass forward and one back, in passes forward: through low-rank pairs the gradients
#: of both factors and of the activations on both sides, through the base the latter.
_PAIRS, _BASE = 3, 2


def misallocation(
    ranks: Mapping[str, int],
    truth: Mapping[str, int],
    price: Mapping[str, int] | None = None,
) -> float:
    """sum_l c_l |r_l - r*_l| / (2 sum_l c_l r*_l): the share of a budget misplaced.

    With equal budgets it is 0 for the truth and 1 where nothing is in its place; each
    misplaced component counts once where it lacks and once where it should not be,
    hence the 2. The page of the protocol (sec. 7.1) has it with c = 1.

    Args:
      ranks: Layer -> rank.
      truth: Layer -> the right one.
      price: Layer -> what a component counts in the budget; 1 each if None.
    """
    cost = price or dict.fromkeys(truth, 1)
    off = sum(cost[name] * abs(ranks[name] - truth[name]) for name in truth)
    return off / (2 * sum(cost[name] * truth[name] for name in truth))


def rank_correlation(
    ranks: Mapping[str, int], truth: Mapping[str, int]
) -> float | None:
    """Spearman's correlation over layers; None where either has equal ranks only."""
    pairs = np.array([[ranks[name], truth[name]] for name in truth])
    if (np.ptp(pairs, axis=0) == 0).any():
        return None
    found: Any = stats.spearmanr(pairs[:, 0], pairs[:, 1])
    return float(found.statistic)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What a training had of ranks.

    Attributes:
      final_components, final_parameters: Open at the end.
      average_components: Kept in a step, on average over all steps; where losers may
        come back, more are open than are kept.
      open_flops: Matrix FLOPs of the corrected weights in the training, if only kept
        components are computed. What the base does between them counts in no arm.
      held_flops: As they are computed: shut components too, without what measurements
        take, which `experiments.bench.ranks` times.
    """

    final_components: int
    final_parameters: int
    average_components: float
    open_flops: float
    held_flops: float


def trajectory(
    fitted: Fit, trial: int, slots: Slots, num_steps: int
) -> Int[np.ndarray, "steps layers"]:
    """The open components of every layer in every step."""
    last = slots.from_names(final(fitted.adapted, fitted.dials(trial)))
    if fitted.events is None:
        return np.tile(last, (num_steps, 1))
    told = over_time(fitted.events, fitted.state, trial)
    rows = np.concatenate(
        [told[path].reshape(len(told["steps"]), -1) for path in slots.paths], axis=1
    )
    place = np.searchsorted(told["steps"], np.arange(num_steps), side="right") - 1
    return rows[place]


def budgets(
    ranks: Int[np.ndarray, "steps layers"],
    adapted: Adapted,
    allocator: Allocator,
    rows: int,
) -> Budgets:
    """Counts a training.

    Args:
      ranks: Open components by step, as from `trajectory`.
      adapted: The model.
      allocator: What moved them: if it is adaptive, all components are held.
      rows: Rows of a batch.
    """
    sites = list(adapted.sites.items())
    pair = np.concatenate(
        [[lora_flops(s.d_in, s.d_out)] * s.num_layers for _, s in sites]
    )
    held = np.concatenate(
        [[adapted.max_rank(path)] * site.num_layers for path, site in sites]
    )
    base = sum(2 * s.d_in * s.d_out * s.num_layers for _, s in sites)
    steps = len(ranks)
    opened = _PAIRS * float((ranks @ pair).sum())
    # A rank that never moves is a run that holds no more.
    closed = _PAIRS * float(steps * (held @ pair)) if _moves(allocator) else opened
    return Budgets(
        final_components=int(ranks[-1].sum()),
        # A pair costs two FLOPs per parameter.
        final_parameters=int(ranks[-1] @ pair) // 2,
        average_components=float(ranks.sum(axis=1).mean()),
        open_flops=rows * (steps * _BASE * base + opened),
        held_flops=rows * (steps * _BASE * base + closed),
    )


def price(slots: Slots, unit: Unit) -> dict[str, int]:
    """Layer -> what one of its components counts."""
    each = slots.cost.tolist() if unit == "parameters" else [1] * slots.num_layers
    return dict(zip(slots.names, each, strict=True))


def told(budget: Budgets) -> dict[str, Any]:
    """The budgets as JSON types."""
    return dataclasses.asdict(budget)


def _moves(allocator: Allocator) -> bool:
    return isinstance(allocator, Adaptive)
