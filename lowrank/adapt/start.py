"""How the trained tree of a trial begins: every factor drawn under its own name."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank.adapt.plan import Plan
from lowrank.adapt.rules import AnyRule, Train
from lowrank.adapt.sites import Site
from lowrank.core.arrays import Key
from lowrank.core.keys import key_for, name_hash


def draw(
    key: Key,
    leaves: Mapping[str, Any],
    sites: Mapping[str, Site],
    plans: Mapping[str, Plan],
    rules: Mapping[str, AnyRule],
) -> dict[str, Any]:
    """Draws the weights that are trained whole, and the factors of every site.

    The key of a weight is folded from its path, which is data to the program: sites of
    one kind are drawn by one piece of it, under `vmap`. Drawn one by one, the sites of
    a deep unrolled model take longer to compile than its training step.

    Args:
      key: Root of the trial's start.
      leaves: The base's weights, or their shapes, by path.
      sites, plans: The corrected weights.
      rules: Of all weights that are corrected or trained, by path.
    """
    trained: dict[str, Any] = {
        path: rule.draw(key_for(key, path), leaves[path])
        for path, rule in rules.items()
        if isinstance(rule, Train)
    }
    for paths in _kinds(leaves, sites, plans):
        first = paths[0]
        start = lambda own, first=first: _start(
            own, sites[first], plans[first], leaves[first]
        )
        if len(paths) == 1:
            trained[first] = start(key_for(key, first))
            continue
        hashes = jnp.array([name_hash(path) for path in paths])
        keys = jax.vmap(lambda name: key_for(key, name))(hashes)
        drawn = jax.vmap(start)(keys)
        for number, path in enumerate(paths):
            trained[path] = jax.tree.map(lambda x, n=number: x[n], drawn)
    return {path: trained[path] for path in (*_whole(rules), *plans)}


def shapes(
    leaves: Mapping[str, Any],
    sites: Mapping[str, Site],
    plans: Mapping[str, Plan],
    rules: Mapping[str, AnyRule],
) -> dict[str, Any]:
    """Shapes of what `draw` draws: of like sites, one is traced."""
    kinds = _kinds(leaves, sites, plans)
    firsts = {first: plans[first] for first, *_ in kinds}
    # The weights are an argument: what reads them must not compute on them here.
    run = lambda key, leaves: draw(key, leaves, sites, firsts, rules)
    found = jax.eval_shape(run, jax.random.key(0), leaves)
    found |= {path: dict(found[paths[0]]) for paths in kinds for path in paths}
    return {path: found[path] for path in (*_whole(rules), *plans)}


def _kinds(
    leaves: Mapping[str, Any], sites: Mapping[str, Site], plans: Mapping[str, Plan]
) -> list[list[str]]:
    """Sites whose starts differ by their keys alone, side by side."""
    kinds: dict[Hashable, list[str]] = {}
    for path, plan in plans.items():
        kind = _kind(sites[path], plan, leaves[path])
        # What reads the weight is drawn alone: a stack of weights would be a copy.
        own = path if plan.delta.reads_weight else None
        kinds.setdefault((kind, own), []).append(path)
    return list(kinds.values())


def _whole(rules: Mapping[str, AnyRule]) -> tuple[str, ...]:
    return tuple(path for path, rule in rules.items() if isinstance(rule, Train))


def _kind(site: Site, plan: Plan, leaf: Any) -> Hashable:
    """What the start of a site depends on beside its key and its weight."""
    axes = (site.ins, site.outs, site.stacks, site.fan_in)
    return (plan.delta, plan.max_rank, site.shape, leaf.dtype, axes)


def _start(key: Key, site: Site, plan: Plan, leaf: Any) -> dict[str, Array]:
    """The factors of one site, layer by layer."""
    layer = site.of_one_layer()

    def one(own: Key, weight: Any) -> dict[str, Array]:
        view = layer.view(
            weight, factors={}, dials={}, rng=None, delta=plan.delta,
            max_rank=plan.max_rank,
        )  # fmt: skip
        return plan.delta.start(own, view)

    if not site.stacks:
        return one(key, leaf)
    count = site.num_layers
    keys = jax.vmap(lambda number: key_for(key, "layer", number))(jnp.arange(count))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        weight = jax.ShapeDtypeStruct(layer.shape, leaf.dtype)
        drawn = jax.vmap(lambda own: one(own, weight))(keys)
    else:
        weights = jnp.moveaxis(leaf, site.stacks, range(len(site.stacks)))
        drawn = jax.vmap(one)(keys, weights.reshape(count, *layer.shape))
    return jax.tree.map(lambda x: x.reshape(*site.stack_shape, *x.shape[1:]), drawn)
