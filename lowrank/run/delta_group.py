"""The delta group of a config, turned into rules: what is corrected, and how."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank.adapt.rules import AnyRule, Freeze, Rule, Train
from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build
from lowrank.deltas.catalogue import CATALOGUE as DELTAS
from lowrank.run.ranks_group import Ranks


def make_rules(
    delta: Mapping[str, Any], head: str | None, moved: Ranks = Ranks()
) -> list[AnyRule]:
    """Rules for a delta group: `lora` and its kin, `full` or `head`.

    Args:
      delta: name, rank, targets (a pattern or several), ranks, start (see `run.warm`),
        and the delta's own fields. `ranks` maps patterns, of weights or of layers of
        a stack, to the rank that they have instead, the first match first; 0 leaves
        them frozen. It changes ranks only of what `targets` cover, and no scale.
      head: Pattern of the weights trained in full beside the corrections; None: none
        are.
      moved: Says how many components are held where ranks move.

    Raises:
      BadInput: A field is unknown, missing or out of range.
    """
    fields = {key: value for key, value in delta.items() if key != "start"}
    name = fields.get("name")
    heads = [] if head is None else [Train(head, init="dense")]
    if name == "head":
        _no_more(fields, {"name"}, "delta=head")
        if not heads:
            raise BadInput(
                "delta=head trains a new head, and a language model has its own: "
                "choose another delta"
            )
        return [*heads]
    if name == "full":
        _no_more(fields, {"name"}, "delta=full")
        return [*heads, Train("**", init="keep")]
    rank, targets = fields.pop("rank", None), fields.pop("targets", None)
    ranks = fields.pop("ranks", None)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise BadInput(f"delta.rank must be a whole number, not {rank!r}")
    patterns = [targets] if isinstance(targets, str) else targets
    if not isinstance(patterns, Sequence) or not patterns:
        raise BadInput(f"delta.targets must be one pattern or several, not {targets!r}")
    recipe = build(fields, DELTAS, "delta")
    rule = lambda pattern, own, **more: Rule(
        pattern, recipe, own, moved.held(own), **more
    )
    rest = [rule(p, rank, optional=bool(ranks)) for p in patterns]
    among = lambda pattern, own: rule(pattern, own, among=tuple(patterns))
    chosen = [] if ranks is None else _ranks(ranks, among)
    return [*heads, *chosen, *rest]


def _ranks(ranks: Any, rule: Callable[[str, int], Rule]) -> list[Rule | Freeze]:
    """The rules that `delta.ranks` stands for."""
    if not isinstance(ranks, Mapping):
        raise BadInput(
            'delta.ranks maps patterns to ranks, as {"**/layer[0:3]/**": 4}, not '
            f"{ranks!r}"
        )
    found: list[Rule | Freeze] = []
    for pattern, rank in ranks.items():
        if type(rank) is not int or rank < 0 or not isinstance(pattern, str):
            raise BadInput(
                f"delta.ranks[{pattern!r}] must be a whole number of at least 0, where "
                f"0 leaves the layers frozen, not {rank!r}"
            )
        found.append(rule(pattern, rank) if rank else Freeze(pattern))
    return found


def _no_more(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    if extra := set(fields) - known:
        raise UnknownName(f"{where} takes no {', '.join(sorted(extra))}")
