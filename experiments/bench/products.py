"""Where the time of a step goes: python -m experiments.bench.products

Every matrix product of the compiled step is timed in a program of its own, as often as
the step runs it, in turns with the step. What the step takes beyond their sum goes to
everything between products: softmax, GELU, LayerNorm, the optimizer, reading and
writing activations. A sum above the step's time would say that products run slower
alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from experiments.bench import ours
from experiments.bench.report import median_interval
from experiments.bench.setting import SHAPES, Setting
from lowrank.cost.count import Product
from lowrank.io import hub


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints both shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of everything")
    parser.add_argument("--base", default="minilm", help="weights, as elsewhere")
    options = parser.parse_args(arguments)
    console = Console(width=100)
    for batch, seq in SHAPES:
        setting = Setting(base=options.base, batch=batch, seq=seq)
        show(measure(setting, options.rounds), console)
    return 0


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Seconds of the step, and of each of its products, in turns."""
    arm = ours.lora(setting, hub.load(setting.base, num_classes=setting.num_classes))
    counts = arm.products()
    calls = {product: alone(product) for product in counts}
    for call in (arm.step, *calls.values()):
        call()
    steps: list[float] = []
    times: dict[Product, list[float]] = {product: [] for product in counts}
    for _ in range(rounds):
        steps.append(seconds(arm.step))
        for product, call in calls.items():
            # Once for the caches, which another product has filled.
            call()
            times[product].append(seconds(call))
    turns = zip(*(times[product] for product in counts), strict=True)
    sums = [
        sum(n * one for n, one in zip(counts.values(), row, strict=True))
        for row in turns
    ]
    return {
        "shape": setting.shape,
        "step": statistics.median(steps),
        "products": [
            (product, number, statistics.median(times[product]))
            for product, number in counts.items()
        ],
        "share": median_interval([a / b for a, b in zip(sums, steps, strict=True)]),
    }


def alone(product: Product) -> Callable[[], Any]:
    """The product as a program of its own, on numbers of its own."""
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype))
    lhs, rhs = draw(product.lhs), draw(product.rhs)
    run = jax.jit(lambda x, y: lax.dot_general(x, y, product.dimension_numbers))
    return lambda: jax.block_until_ready(run(lhs, rhs))


def seconds(call: Callable[[], Any]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def show(found: dict[str, Any], console: Console) -> None:
    """Prints products by what they cost, and what is left."""
    table = Table(title=f"batch {found['shape']}")
    for heading in ("product", "times", "GFLOP", "ms", "GFLOP/s", "of the step"):
        table.add_column(heading, justify="left" if heading == "product" else "right")
    by_cost = sorted(found["products"], key=lambda row: -row[1] * row[2])
    totals = [0.0, 0.0]
    for product, number, each in by_cost:
        work, spent = number * product.flops / 1e9, number * each
        totals = [totals[0] + work, totals[1] + spent]
        if spent < 0.01 * found["step"]:
            continue
        shapes = " x ".join(str(list(x.shape)) for x in (product.lhs, product.rhs))
        table.add_row(
            shapes, str(number), f"{work:.1f}", f"{1e3 * spent:.0f}",
            f"{work / spent:.0f}", f"{spent / found['step']:.0%}",
        )  # fmt: skip
    work, spent = totals
    table.add_row(
        "all", "", f"{work:.1f}", f"{1e3 * spent:.0f}", f"{work / spent:.0f}",
        f"{spent / found['step']:.0%}", end_section=True,
    )  # fmt: skip
    table.add_row("the step", "", "", f"{1e3 * found['step']:.0f}", "", "")
    console.print(table)
    share = found["share"]
    console.print(
        f"products take {share['median']:.2f} ({share['low']:.2f} to "
        f"{share['high']:.2f}) of the step"
    )


if __name__ == "__main__":
    sys.exit(main())
