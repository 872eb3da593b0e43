"""Models that nobody here wrote: every weight that can be adapted is, and is exact.

For each, the factored program with a correction on every adaptable weight equals the
model with dense weights, outputs and gradients, in float32.
"""

import importlib.metadata
import re
from collections import Counter

import catalogue as _  # noqa: F401  Both fill the catalogue.
import jax
import keras_catalogue as __  # noqa: F401
import oracle
import pytest
from pure import CATALOGUE

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.adapt.sites import discover
from lowrank.deltas.lora import LoRA

pytestmark = pytest.mark.foreign

#: Float32, through networks of up to fifty layers: its rounding, times their depth.
TOLERANCE = 1e-4
#: What is left alone: names of state that models carry beside their weights.
STATE = re.compile(r"^state/|batch_stats")


def primitives(obstacle):
    """The primitives an obstacle names; nothing for a weight without a use."""
    found = re.match(r"feeds (.*?), which", obstacle)
    return found[1] if found else "unused"


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_adaptable_weight_is_exact(name, models):
    entry = CATALOGUE[name]
    apply, params, inputs = entry.build()
    found = discover(apply, params, *inputs)
    sites = {path: site for path, site in found.items() if not STATE.search(path)}
    fit = {path: site for path, site in sites.items() if not site.obstacle}
    assert fit, sites
    # A name may hold brackets, which patterns keep for layers.
    pattern = lambda path: re.sub(r"[\[\]*?]", "?", path)
    rules = [
        Rule(pattern(path), LoRA(alpha=4.0), rank=min(2, site.largest_rank))
        for path, site in fit.items()
    ]
    adapted = attach(apply, params, *inputs, rules=rules)
    trained, dials = oracle.loud(adapted, 1, 0.1)
    ours, dense = oracle.both(adapted, apply, params, inputs, trained, dials)
    error = oracle.leafwise(ours, dense)
    models(
        package=entry.package,
        version=importlib.metadata.version(entry.package),
        name=entry.name,
        framework=entry.framework,
        weights=len(sites),
        adapted=len(fit),
        kinds=sorted({use.kind for site in fit.values() for use in site.uses}),
        refused=Counter(primitives(s.obstacle) for s in sites.values() if s.obstacle),
        error=error,
    )
    assert error <= TOLERANCE
    base = jax.jit(apply)(params, *inputs)
    assert oracle.leafwise(ours[0], base) > 1e-3, "the corrections are silent"


def test_a_rule_with_its_own_derivative_around_a_loop_is_refused():
    """diffrax by default: only its own rule can derive it, which needs the weight."""
    import diffrax
    import equinox as eqx

    net = eqx.nn.MLP(3, 3, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)

    def apply(params, y):
        term = diffrax.ODETerm(lambda t, y, args: eqx.combine(params, static)(y))
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y).ys

    sites = discover(apply, params, jax.numpy.ones(3))
    matrices = [site for path, site in sites.items() if path.endswith("weight")]
    assert {site.obstacle for site in matrices} == {
        "feeds custom_vjp_call, which would need the dense weight"
    }
