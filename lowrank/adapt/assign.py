"""Which rule every weight falls under, and every layer of a stacked one.

In two halves, for what is a layer is known only after discovery, and discovery wants to
know which weights are meant: `claim` goes by paths, `assign` by layers.
"""

from collections.abc import Iterable, Mapping, Sequence

from lowrank.adapt.plan import Plan
from lowrank.adapt.rules import AnyRule, Freeze, Rule, Train
from lowrank.adapt.sites import Site
from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.paths import layers_of, matches, select
from lowrank.core.spec import fields_of

_UNROLL = "or unroll the model (base.scan=false), where every layer is a weight itself"


def claim(
    rules: Sequence[AnyRule], paths: Iterable[str]
) -> dict[str, tuple[AnyRule, ...]]:
    """The rules that may own a weight or layers of it, in order.

    A rule that takes layers leaves the others to the rules after it; the first one
    without a bracket takes the rest. Weights under no rule are left out.

    Raises:
      UnknownName: A pattern covers no path at all.
      BadInput: Every path that a pattern covers was taken by earlier rules, or there
        is nothing to train.
    """
    paths = tuple(paths)
    claims: dict[str, tuple[AnyRule, ...]] = {}
    closed: dict[str, AnyRule] = {}
    for number, rule in enumerate(rules):
        if not isinstance(rule, AnyRule):
            raise BadInput(f"a rule is a Rule, Train or Freeze, not {rule!r}")
        if rule in rules[:number]:
            raise _shadowed(rule, [rule.pattern])
        found = _covered(rule, paths)
        new = [path for path in found if path not in closed]
        if not new and not _may_be_shadowed(rule):
            raise _shadowed(rule, {closed[path].pattern for path in found}, len(found))
        claims |= {path: (*claims.get(path, ()), rule) for path in new}
        if layers_of(rule.pattern) is None:
            closed |= dict.fromkeys(new, rule)
    taken = (rule for own in claims.values() for rule in own)
    if not any(isinstance(rule, Rule | Train) for rule in taken):
        raise BadInput("no rule trains anything: give a Rule or a Train")
    return claims


def assign(
    claims: Mapping[str, tuple[AnyRule, ...]],
    sites: Mapping[str, Site],
    allow_dense: bool,
) -> tuple[dict[str, Plan], dict[str, AnyRule]]:
    """Settles which layer falls under which rule: the first one that takes it.

    Args:
      claims: From `claim`.
      sites: From `discover`, for the weights that a `Rule` claims.
      allow_dense: See `attach`.

    Returns:
      The plan of every corrected weight, and the rule that every corrected or trained
      weight falls under: by path, or by the name of a layer where rules take layers.

    Raises:
      BadInput: A weight cannot be corrected, has no such layers, or has layers that
        cannot share a loop; or earlier rules took every layer that a rule selects.
    """
    plans: dict[str, Plan] = {}
    owners: dict[str, AnyRule] = {}
    idle: dict[int, tuple[AnyRule, set[str]]] = {}
    used: set[int] = set()
    for path, own in claims.items():
        if any(isinstance(rule, Train) for rule in own):
            _check_whole(path, own)
            owners[path] = own[0]
            continue
        if not any(isinstance(rule, Rule) for rule in own):
            for rule in own:
                if layers_of(rule.pattern) is None:
                    used.add(id(rule))
                else:
                    idle.setdefault(id(rule), (rule, set()))
            continue
        first = next(rule for rule in own if isinstance(rule, Rule))
        site = _checked(path, first, sites.get(path), allow_dense)
        taken: dict[int, AnyRule] = {}
        for rule in own:
            layers = _layers(rule, site)
            if not {*layers} - {*taken}:
                earlier = {taken[layer].pattern for layer in layers}
                idle.setdefault(id(rule), (rule, set()))[1].update(earlier)
                continue
            used.add(id(rule))
            taken = {**dict.fromkeys(layers, rule), **taken}
        mine = {n: rule for n, rule in sorted(taken.items()) if isinstance(rule, Rule)}
        if not mine:
            continue
        for rule in mine.values():
            _check_rank(path, rule, site)
        plans[path] = _plan(path, mine, site)
        head, *others = own
        split = bool(others) or layers_of(head.pattern) is not None
        names = {site.layer_paths[n]: rule for n, rule in mine.items()}
        owners |= names if split else {path: head}
    for number, (rule, earlier) in idle.items():
        if number not in used and not _may_be_shadowed(rule):
            raise _shadowed(rule, earlier) if earlier else _pointless(rule)
    asked = any(isinstance(rule, Rule) for own in claims.values() for rule in own)
    if asked and not plans:
        raise BadInput(
            "nothing is corrected: earlier rules took all that every Rule selects. "
            "Freeze less, or leave the rules out (delta=head)"
        )
    return plans, owners


def _covered(rule: AnyRule, paths: Sequence[str]) -> tuple[str, ...]:
    found = select(rule.pattern, paths)
    if not (isinstance(rule, Rule) and rule.among):
        return found
    both = tuple(p for p in found if any(matches(one, p) for one in rule.among))
    if not both:
        raise UnknownName(
            f"pattern {rule.pattern!r} covers {found[0]!r} and {len(found) - 1} more, "
            f"but none that {' or '.join(map(repr, rule.among))} covers as well"
        )
    return both


def _layers(rule: AnyRule, site: Site) -> tuple[int, ...]:
    """The layers of a site, by number, that a rule takes."""
    layers = layers_of(rule.pattern)
    if layers is None:
        return tuple(range(site.num_layers))
    where = f"pattern {rule.pattern!r}, for {site.path!r}"
    if not site.stacks:
        raise BadInput(
            f"{where}: this weight is no stack; its axes {site.shape} are inputs and "
            "outputs of one matrix. Leave the bracket out; the layers of an unrolled "
            "model are named by their paths."
        )
    if len(site.stacks) > 1:
        raise BadInput(
            f"{where}: this weight is stacked along {len(site.stacks)} axes, "
            f"{' x '.join(map(str, site.stack_shape))}, and a bracket does not say "
            "which it counts along; leave the bracket out and correct all layers alike"
        )
    try:
        return layers.of(site.num_layers)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _plan(path: str, rules: Mapping[int, Rule], site: Site) -> Plan:
    """The plan of a weight from the rule of each corrected layer."""
    first = next(iter(rules.values()))
    for rule in rules.values():
        if rule.delta != first.delta:
            raise BadInput(
                f"layers of {path!r} fall under {first.pattern!r} with {_told(first)} "
                f"and under {rule.pattern!r} with {_told(rule)}: the layers of a stack "
                "run in one loop and may differ in rank only. Give both rules one "
                f"delta, {_UNROLL}."
            )
    ranks = tuple(
        rules[layer].rank if layer in rules else 0 for layer in range(site.num_layers)
    )
    if len({*ranks}) > 1 and "gate" not in first.delta.axes:
        raise BadInput(
            f"layers of {path!r} have the ranks {ranks}, but {_told(first)} has no "
            f"gates that could tell them apart: correct all layers alike, {_UNROLL}"
        )
    most = max(rule.max_rank or rule.rank for rule in rules.values())
    return Plan(first.delta, ranks, most)


def _told(rule: Rule) -> str:
    """A delta as its user writes it."""
    delta = type(rule.delta)
    fields = (f"{name}={getattr(rule.delta, name)!r}" for name in fields_of(delta))
    return f"{delta.__name__}({', '.join(fields)})"


def _checked(path: str, rule: Rule, site: Site | None, allow_dense: bool) -> Site:
    """The site, where it can be corrected."""
    hint = f"Rule {rule.pattern!r} selects it: narrow the pattern or Freeze it first."
    if site is None:
        raise BadInput(
            f"weight {path!r} cannot be corrected by a low-rank delta: it is not an "
            "array of two or more axes that holds real numbers, or quantised ones of "
            f"at most 8 bits. {hint}"
        )
    if site.obstacle and not (site.ins and site.outs):
        raise BadInput(f"weight {path!r} {site.obstacle}. {hint}")
    if site.obstacle and not allow_dense:
        raise BadInput(
            f"weight {path!r} {site.obstacle}. {hint} Or pass allow_dense=True (exact, "
            "slower, more memory)."
        )
    return site


def _check_rank(path: str, rule: Rule, site: Site) -> None:
    rank = rule.max_rank or rule.rank
    if rank > site.largest_rank:
        raise BadInput(
            f"rank {rank} for {path!r} is above min(d_in, d_out) = {site.largest_rank} "
            f"({site.d_in} x {site.d_out}); a correction of that rank is already any "
            "matrix: lower the rank, or the largest one that it is given while "
            "ranks move (max_rank)"
        )


def _check_whole(path: str, own: Sequence[AnyRule]) -> None:
    """A weight is trained whole or not at all."""
    for rule in own:
        if layers_of(rule.pattern) is not None:
            kind = type(rule).__name__
            raise BadInput(
                f"{kind}({rule.pattern!r}) takes layers of {path!r}, which is trained "
                "whole: training in full is for all layers of a stack or none. Leave "
                f"the bracket out, correct the weight with a Rule, {_UNROLL}."
            )


def _may_be_shadowed(rule: AnyRule) -> bool:
    return isinstance(rule, Rule) and rule.optional


def _shadowed(rule: AnyRule, earlier: Iterable[str], count: int = 0) -> BadInput:
    what = f"{'all ' if count > 1 else ''}{count} of its weights"
    return BadInput(
        f"pattern {rule.pattern!r} is shadowed: earlier rules {sorted(earlier)} took "
        f"{what if count else 'all that it selects'}. Put the narrower rule first, "
        "or delete this one."
    )


def _pointless(rule: AnyRule) -> BadInput:
    assert isinstance(rule, Freeze)
    return BadInput(
        f"Freeze({rule.pattern!r}) takes layers of weights that no later rule "
        "corrects, so they are frozen already; delete it, or put it before the rule "
        "that it is meant to narrow"
    )
