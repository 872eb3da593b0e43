"""What ranks that move cost a step: python -m experiments.bench.ranks

Each arm trains the same model: fixed with all components that the others hold, choosing
by an importance, and fixed with as many as they end with. A turn is a number of steps
that holds as many events and measurements as its share, so that their cost is spread
over the steps as in a run. In a turn arms take their steps one by one, in one process:
what a machine does meanwhile slows neighboring steps alike.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench import ours
from experiments.bench.__main__ import describe
from experiments.bench.report import median_interval
from experiments.bench.setting import SHAPES, Setting
from lowrank.allocate.catalogue import CATALOGUE
from lowrank.core.errors import LowrankError, exit_code
from lowrank.io import hub
from lowrank.io.files import write_json_atomically

RECIPES = ("norm", "fisher", "adalora", "growth")
#: Steps of a turn: one event, and all measurements before it.
STEPS = 20
FULL, FINAL = "fixed, all held", "fixed, at the end"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every arm")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of them")
    parser.add_argument("--base", default="minilm", help="weights, as elsewhere")
    parser.add_argument("--out", help="JSON with all times")
    parser.add_argument(
        "--most",
        type=float,
        help="end with 1 unless every recipe is shown to take at most that much of a "
        "fixed run with all components held: the interval's upper end",
    )
    options = parser.parse_args(arguments)
    recipes = options.recipes.split(",")
    if unknown := {*recipes} - {*CATALOGUE}:
        parser.error(f"unknown recipes {sorted(unknown)}")
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    batch, seq = SHAPES[-1]
    setting = Setting(base=options.base, batch=batch, seq=seq)
    machine = describe(os.cpu_count() or 1)
    try:
        base = hub.load(setting.base, num_classes=setting.num_classes)
    except LowrankError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    found = measure(setting, base, recipes, options.rounds)
    machine["load_after"] = os.getloadavg()[0]
    found = {"machine": machine, **found}
    show(found, Console(width=100))
    if options.out:
        write_json_atomically(Path(options.out), json.loads(json.dumps(found)))
    if options.most is None:
        return 0
    slow = [name for name in recipes if beside(found, name)["high"] > options.most]
    for name in slow:
        print(f"{name}: not shown to be at most {options.most:g}", file=sys.stderr)
    return 1 if slow else 0


def measure(
    setting: Setting, base: hub.Base, recipes: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Seconds per step of every arm, turn by turn."""
    rank = setting.rank // 2
    arms = {FULL: ours.lora(setting, base)}
    for name in recipes:
        recipe: Any = CATALOGUE[name]
        # Due throughout: the window spans the run, and the turns are its beginning.
        every = {"every": STEPS, "begin": 0, "end": ours.NUM_STEPS - 1}
        arms[name] = ours.choosing(setting, base, rank, recipe(**every))
    arms[FINAL] = ours.lora(dataclasses.replace(setting, rank=rank), base)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        for _ in range(STEPS):
            arm.step()
    for turn in range(rounds):
        taken = dict.fromkeys(arms, 0.0)
        for step in range(STEPS):
            for name in list(arms)[:: -1 if (turn + step) % 2 else 1]:
                began = time.perf_counter()
                arms[name].step()
                taken[name] += time.perf_counter() - began
        for name, seconds in taken.items():
            times[name].append(seconds / STEPS)
    return {"shape": setting.shape, "held": setting.rank, "end": rank, "times": times}


def beside(found: dict[str, Any], name: str, other: str = FULL) -> dict[str, float]:
    """The median ratio of an arm's time and another's, turn by turn, and interval."""
    pairs = zip(found["times"][name], found["times"][other], strict=True)
    return median_interval([own / rival for own, rival in pairs])


def show(found: dict[str, Any], console: Console) -> None:
    """Prints each arm beside both fixed ones."""
    console.print(
        f"batch {found['shape']}, {found['held']} components held per layer, "
        f"{found['end']} at the end"
    )
    table = Table()
    for heading in ("arm", "ms", f"of {FULL}", f"of {FINAL}"):
        table.add_column(heading)
    times = found["times"]
    for name, own in times.items():
        cells = []
        for other in (FULL, FINAL):
            ratio = beside(found, name, other)
            cells.append(
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            )
        table.add_row(name, f"{1e3 * statistics.median(own):.0f}", *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
