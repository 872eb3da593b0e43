"""Allocators on a small layout, and runs of them without training."""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.allocate.catalogue import CATALOGUE
from lowrank.allocate.signals import SIGNALS
from lowrank.core.spec import build

STEPS = 40
LAYERS = 4
D_IN, D_OUT = 5, 3
NAMED = {f"l{i}": rank for i, rank in enumerate((4, 1, 2, 1))}
#: Fields without which an allocator cannot be, and short windows.
WINDOW = {"begin": 4, "end": 26, "every": 5, "measure_every": 2}
FIELDS = {
    "uniform": {},
    "given": {"ranks": NAMED},
    "ramp": {},
    "shuffled": {"ranks": NAMED},
    "eva": {},
    "adalora": {**WINDOW, "measure_every": 1},
}
ADAPTIVE = [n for n in CATALOGUE if n not in ("uniform", "given", "ramp", "shuffled")]
KEY = jax.random.key(0)


def allocator(name, **fields):
    return build(
        {"name": name, **FIELDS.get(name, WINDOW), **fields}, CATALOGUE, "ranks"
    )


def factors_of(slots, rng):
    return {
        one.path: {
            "a": jnp.asarray(rng.normal(size=(one.max_rank, D_IN)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(one.max_rank, D_OUT)), jnp.float32),
        }
        for one in slots.competitors
    }


def signals_of(slots, rng, needs, gates):
    """Drawn at random, but what is shut has no norm, and singular values fall."""
    flat = lambda: jnp.asarray(rng.gamma(1.0, size=slots.num_components), jnp.float32)
    given = {name: flat() for name in SIGNALS}
    given |= {"factors": factors_of(slots, rng), "gradients": factors_of(slots, rng)}
    given["norms"] = given["norms"] * gates
    falling = jnp.lexsort((-given["spectrum"], jnp.asarray(slots.layer)))
    within = slots.position < slots.open_ranks(gates)[slots.layer]
    given["spectrum"] = given["spectrum"][falling] * within
    return {name: given[name] for name in needs}


def simulate(allocation, seed=0, check=lambda *_: None):
    """A run without training: signals are random, ranks move as they would."""
    rng = np.random.default_rng(seed)
    slots, constants = allocation.slots, allocation.constants
    memory = allocation.init(factors_of(slots, rng))
    gates = allocation.gates(constants)
    if not allocation.measure_every:
        given = signals_of(slots, rng, allocation.needs, gates)
        memory = allocation.observe(memory, given, 0, constants)
    event, observe = jax.jit(allocation.event), jax.jit(allocation.observe)
    for step in range(STEPS):
        if allocation.due(step, constants):
            before = gates
            gates, memory = event(memory, gates, step, KEY, constants)
            check(step, before, gates, memory)
        if allocation.measures(step, constants):
            given = signals_of(slots, rng, allocation.needs, gates)
            memory = observe(memory, given, step, constants)
        yield step, gates, memory
