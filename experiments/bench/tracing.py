"""What adapting costs before anything runs: python -m experiments.bench.tracing.

Times `jit(...).lower(...)` of a model and of the same model adapted, in turns, so
that whatever else the machine does meets both. Unrolled layers are the hard case:
every one of their maps is a site of its own, and nothing is traced once for all.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA


class Model(nn.Module):
    """Transformer layers of six maps each, unrolled."""

    num_layers: int
    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.num_layers):
            norm = nn.LayerNorm(name=f"norm_{layer}")
            attend = nn.MultiHeadDotProductAttention(4, name=f"attend_{layer}")
            x = x + attend(norm(x))
            up = nn.Dense(2 * self.width, name=f"up_{layer}")
            x = x + nn.Dense(self.width, name=f"down_{layer}")(nn.gelu(up(x)))
        return x


class Costs(NamedTuple):
    """Seconds of the processor, of every turn.

    Attributes:
      plain: Lowering the model.
      adapted: Lowering the adapted model.
      attach: Finding the sites and checking them; the model is traced there, and
        not again when the adapted model is lowered.
      num_sites: Maps that were adapted.
    """

    plain: list[float]
    adapted: list[float]
    attach: list[float]
    num_sites: int

    @property
    def ratios(self) -> list[float]:
        """adapted / plain of each turn."""
        pairs = zip(self.adapted, self.plain, strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def first(self) -> list[float]:
        """(attach + adapted) / plain of each turn: what the first program costs."""
        turns = zip(self.attach, self.adapted, self.plain, strict=True)
        return [(once + ours) / theirs for once, ours, theirs in turns]


def measure(num_layers: int = 32, rounds: int = 7, gradient: bool = False) -> Costs:
    """Lowers both programs in turns; needs no weights, only their shapes.

    Args:
      num_layers: Layers of the model.
      rounds: Turns. A first one, not counted, fills JAX's caches.
      gradient: Whether to lower the gradient: for the model that of all weights, for
        the adapted model that of the factors.
    """
    model = Model(num_layers)
    x = jnp.ones((2, 8, model.width))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rules = [Rule("**/kernel", LoRA(), rank=4)]

    def program(fn: Callable[..., Any]) -> Callable[..., Any]:
        if not gradient:
            return lambda *given: fn(*given)
        return jax.grad(lambda *given: jnp.sum(fn(*given)))

    def turn() -> tuple[float, float, float, int]:
        # Fresh functions each time: JAX remembers the trace of the ones it has seen.
        apply = lambda params, x: model.apply({"params": params}, x)
        fresh = lambda params, x: model.apply({"params": params}, x)
        plain, _ = _timed(lambda: jax.jit(program(apply)).lower(params, x))
        once, adapted = _timed(lambda: attach(fresh, params, x, rules=rules))
        trees = adapted.trained_shapes(), adapted.frozen(), adapted.dials()
        factored = program(lambda t, f, d, x: adapted.apply(f, t, x, dials=d))
        ours, _ = _timed(lambda: jax.jit(factored).lower(*trees, x))
        return plain, ours, once, len(adapted.sites)

    turns = [turn() for _ in range(rounds + 1)][1:]
    plain, ours, once, counts = (list(column) for column in zip(*turns, strict=True))
    return Costs(plain, ours, once, counts[0])


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, without the collection of garbage, as in `timeit`.

    Tracing has one thread, and whatever else the machine does must not count. A full
    collection costs by what the whole process holds and hits whoever is running.
    """
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        result = run()
        return time.process_time() - began, result
    finally:
        gc.enable()


def _spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints medians, and the ratio with its smallest and largest value."""
    parser = argparse.ArgumentParser(
        "python -m experiments.bench.tracing", description=__doc__
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="every turn, for programs")
    options = parser.parse_args(arguments)
    for gradient in (False, True):
        costs = measure(options.layers, options.rounds, gradient)
        if options.json:
            ratios = {"ratios": costs.ratios, "first": costs.first}
            print(json.dumps({**costs._asdict(), **ratios, "gradient": gradient}))
            continue
        print(
            f"{'gradient' if gradient else 'forward'}, {options.layers} layers, "
            f"{costs.num_sites} sites, {options.rounds} turns, seconds: plain "
            f"{_spread(costs.plain)}, adapted {_spread(costs.adapted)}, attach "
            f"{_spread(costs.attach)}; times the plain model: adapted "
            f"{_spread(costs.ratios)}, attached and adapted {_spread(costs.first)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
