"""What the raw times say: medians, paired ratios with intervals, and the bounds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SCHEMA = 1
#: What each arm is, as the table says it: (a) and (d) are this project, (b) and (b')
#: hand-written JAX, (c) is PEFT on torch, (c') the same with the setting of the
#: allocator that our commands, and so the arms in JAX, give themselves.
TITLES = {
    "lora": "(a) LoRA",
    "by_hand": "(b) by hand",
    "by_autodiff": "(b') autodiff",
    "peft": "(c) PEFT",
    "peft_huge": "(c') PEFT, huge pages",
    "full": "(d) full",
}
#: (quantity, numerator, denominator, largest ratio wanted, what for)
BOUNDS = (
    ("seconds", "lora", "by_hand", 1.03, "required"),
    ("seconds", "lora", "peft", 1.0, "required"),
    ("seconds", "lora", "peft", 0.75, "aim"),
    ("seconds", "lora", "peft_huge", 1.0, "aim"),
    ("flops", "lora", "by_hand", 1.01, "required"),
    ("peak_bytes", "lora", "peft", 1.0, "required"),
)
#: Losses of the same step may differ by this much, relative, between LoRA arms; in the
#: first steps, since differences of rounding grow with training.
SAME_LOSS = 1e-4
SAME_STEPS = 32
COVERAGE = 0.95


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median and the order statistics that enclose the true one.

    For n independent values the k-th smallest and the k-th largest enclose the median
    of what they were drawn from with probability 1 - 2 P(Binomial(n, 1/2) < k),
    whatever the distribution. The largest k that covers 95 % is taken; where none
    does, the extremes, and "coverage" says how little that is.

    Returns:
      "median", "low", "high", "coverage".
    """
    ordered = sorted(values)
    count = len(ordered)
    covered = lambda k: 1 - 2 * sum(math.comb(count, i) for i in range(k)) / 2**count
    k = 1
    while k < count // 2 and covered(k + 1) >= COVERAGE:
        k += 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[k - 1],
        "high": ordered[count - k],
        "coverage": max(covered(k), 0.0),
    }


def summarize(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Medians per arm, ratios and verdicts for one batch shape.

    Args:
      shape: "arms" -> arm -> "rounds" (a list of lists of seconds), "losses",
        "peak_bytes", "flops".

    Returns:
      "arms" -> arm -> "median_seconds", "spread"; "ratios", "bounds", and
      "loss_gap", the largest relative gap between losses of the LoRA arms.
    """
    arms = shape["arms"]
    rounds = {
        name: [statistics.median(seconds) for seconds in arm["rounds"]]
        for name, arm in arms.items()
    }
    ratios = {}
    for top, bottom in (("lora", other) for other in arms if other != "lora"):
        if top in arms:
            pairs = zip(rounds[top], rounds[bottom], strict=True)
            ratios[f"{top}/{bottom}"] = median_interval([a / b for a, b in pairs])
    return {
        "arms": {
            name: {
                "median_seconds": statistics.median(values),
                # How restless the machine was: 0.02 is quiet, 0.2 is useless.
                "spread": (max(values) - min(values)) / statistics.median(values),
            }
            for name, values in rounds.items()
        },
        "ratios": ratios,
        "bounds": [found for b in BOUNDS if (found := _judge(b, arms, ratios))],
        "loss_gap": loss_gap(arms),
    }


def _judge(bound: tuple, arms: Mapping[str, Any], ratios: Mapping[str, Any]):
    """A bound with its value and verdict; None if an arm did not run."""
    quantity, top, bottom, limit, kind = bound
    if top not in arms or bottom not in arms:
        return None
    if quantity == "seconds":
        found = ratios[f"{top}/{bottom}"]
        value, low, high = found["median"], found["low"], found["high"]
    else:
        above, below = arms[top][quantity], arms[bottom][quantity]
        if not above or not below:
            return None
        value = low = high = above / below
    verdict = "open" if low <= limit < high else "met" if high <= limit else "missed"
    return {
        "quantity": quantity,
        "ratio": f"{top}/{bottom}",
        "limit": limit,
        "kind": kind,
        "value": value,
        "low": low,
        "high": high,
        "verdict": verdict,
    }


def loss_gap(arms: Mapping[str, Any]) -> float:
    """Largest relative difference of a step's loss among the LoRA arms, early on."""
    series = [
        arm["losses"][:SAME_STEPS] for name, arm in arms.items() if name != "full"
    ]
    gaps = [
        (max(step) - min(step)) / max(abs(max(step)), 1e-9)
        for step in zip(*series, strict=False)
    ]
    return max(gaps, default=0.0)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the report; one table of arms and one of bounds per batch shape."""
    machine = report["machine"]
    console.print(
        f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cpus']} cores; "
        f"load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after"
    )
    for name, shape in report["shapes"].items():
        summary = shape["summary"]
        _arms(name, shape["arms"], summary, console)
        _bounds(summary["bounds"], console)
        gap = summary["loss_gap"]
        console.print(f"losses of the LoRA arms differ by at most {gap:.1e} early on")
        if gap > SAME_LOSS:
            console.print(
                f"above {SAME_LOSS:.0e}: the arms do not compute the same thing, and "
                "their times cannot be compared",
                style="bold red",
            )
    starts = report["starts"]
    if starts:
        table = Table("command to first step", "cold", "cached", title="seconds")
        for arm, seconds in starts.items():
            cached = seconds.get("cached")
            table.add_row(
                TITLES[arm],
                f"{seconds['cold']:.1f}",
                "" if cached is None else f"{cached:.1f}",
            )
        console.print(table)


def _arms(
    name: str, arms: Mapping[str, Any], summary: Mapping[str, Any], console: Console
) -> None:
    heads = ("arm", "ms", "spread", "(a) takes x", "GFLOP", "peak MiB", "compile s")
    table = Table(*heads, title=f"batch {name}")
    for arm, raw in arms.items():
        found = summary["arms"][arm]
        ratio = summary["ratios"].get(f"lora/{arm}")
        compile_seconds = raw["facts"]["compile_seconds"]
        table.add_row(
            TITLES[arm],
            f"{1e3 * found['median_seconds']:.0f}",
            f"{found['spread']:.0%}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            if ratio
            else "",
            f"{raw['flops'] / 1e9:.1f}" if raw["flops"] else "",
            f"{raw['peak_bytes'] / 2**20:.0f}" if raw["peak_bytes"] else "",
            f"{compile_seconds:.1f}" if compile_seconds else "",
        )
    console.print(table)


def _bounds(bounds: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table("bound", "kind", "found", "interval", "verdict")
    colors = {"met": "green", "missed": "red", "open": "yellow"}
    for bound in bounds:
        color = colors[bound["verdict"]]
        table.add_row(
            f"{bound['quantity']} {bound['ratio']} <= {bound['limit']}",
            bound["kind"],
            f"{bound['value']:.3f}",
            f"{bound['low']:.3f} to {bound['high']:.3f}",
            f"[{color}]{bound['verdict']}[/{color}]",
        )
    console.print(table)
