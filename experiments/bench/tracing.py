"""What adapting costs before anything runs: python -m experiments.bench.tracing.

Times `jit(...).lower(...)` of a model and of the same model adapted, in turns, so
that whatever else the machine does meets both. Unrolled layers are the hard case:
every one of their maps is a site of its own, and nothing is traced once for all.
"""

import argparse
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
    """Seconds of every turn.

    Attributes:
      plain: Lowering the model.
      adapted: Lowering the adapted model.
      attach: Finding the sites and checking them, once; the model is traced there.
      num_sites: Maps that were adapted.
    """

    plain: list[float]
    adapted: list[float]
    attach: float
    num_sites: int

    @property
    def ratios(self) -> list[float]:
        """adapted / plain of each turn."""
        pairs = zip(self.adapted, self.plain, strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def first(self) -> float:
        """What the first program costs, attach included, over the plain model."""
        adapted = statistics.median(self.adapted)
        return (self.attach + adapted) / statistics.median(self.plain)


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
    apply = lambda params, x: model.apply({"params": params}, x)
    began = time.perf_counter()
    rules = [Rule("**/kernel", LoRA(), rank=4)]
    adapted = attach(apply, params, x, rules=rules)
    attached = time.perf_counter() - began
    trees = adapted.trained_shapes(), adapted.frozen(), jax.eval_shape(adapted.dials)

    def program(fn: Callable[..., Any]) -> Callable[..., Any]:
        if not gradient:
            return lambda *given: fn(*given)
        return jax.grad(lambda *given: jnp.sum(fn(*given)))

    def factored(trained: Any, frozen: Any, dials: Any, x: Any) -> Any:
        return adapted.apply(frozen, trained, x, dials=dials)

    plain, ours = [], []
    for _ in range(rounds + 1):
        # Fresh functions each time: JAX remembers the trace of the ones it has seen.
        plain.append(_seconds(lambda: jax.jit(program(apply)).lower(params, x)))
        ours.append(_seconds(lambda: jax.jit(program(factored)).lower(*trees, x)))
    return Costs(plain[1:], ours[1:], attached, len(adapted.sites))


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints medians, and the ratio with its smallest and largest value."""
    parser = argparse.ArgumentParser(
        "python -m experiments.bench.tracing", description=__doc__
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    for gradient in (False, True):
        costs = measure(options.layers, options.rounds, gradient)
        middle = statistics.median
        print(
            f"{'gradient' if gradient else 'forward'}, {options.layers} layers, "
            f"{costs.num_sites} sites: plain {middle(costs.plain):.2f} s, adapted "
            f"{middle(costs.adapted):.2f} s, ratio {middle(costs.ratios):.2f} "
            f"({min(costs.ratios):.2f} to {max(costs.ratios):.2f}, {options.rounds} "
            f"turns); attach {costs.attach:.2f} s, once; attached and lowered for the "
            f"first time {costs.first:.2f} times the plain model"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
