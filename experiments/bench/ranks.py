"""What ranks that move cost a step: python -m experiments.bench.ranks

Each arm trains the same model: fixed with all components that the others hold, choosing
by an importance, and fixed with as many as they end with. A turn is a number of steps
that holds as many events and measurements as its share, so that their cost is spread
over the steps as in a run. In a turn arms take their steps one by one, in one process:
what a machine does meanwhile slows neighboring steps alike. How a process lies in
memory slows an arm as long as it lives: with `--processes`, intervals are over those.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of every arm, in each process"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="processes, one after the other"
    )
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of them")
    parser.add_argument("--base", default="minilm", help="weights, as elsewhere")
    shapes = [f"{batch}x{seq}" for batch, seq in SHAPES]
    parser.add_argument(
        "--shape", default=shapes[-1], choices=shapes, help="rows x tokens of a batch"
    )
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
    for name in ("rounds", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is at least 1")
    machine = describe(os.cpu_count() or 1)
    try:
        found = _one(options) if options.processes == 1 else _several(options)
    except LowrankError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    except subprocess.CalledProcessError as error:
        return error.returncode
    machine["load_after"] = os.getloadavg()[0]
    found["machine"] = machine
    show(found, Console(width=100))
    if options.out:
        write_json_atomically(Path(options.out), json.loads(json.dumps(found)))
    if options.most is None:
        return 0
    slow = [name for name in recipes if beside(found, name)["high"] > options.most]
    for name in slow:
        print(f"{name}: not shown to be at most {options.most:g}", file=sys.stderr)
    return 1 if slow else 0


def _one(options: argparse.Namespace) -> dict[str, Any]:
    batch, seq = map(int, options.shape.split("x"))
    setting = Setting(base=options.base, batch=batch, seq=seq)
    base = hub.load(setting.base, num_classes=setting.num_classes)
    return measure(setting, base, options.recipes.split(","), options.rounds)


def _several(options: argparse.Namespace) -> dict[str, Any]:
    """What each process measures, the turns of one behind those of another."""
    command = [sys.executable, "-m", "experiments.bench.ranks"]
    for name in ("rounds", "recipes", "base", "shape"):
        command += [f"--{name}", str(getattr(options, name))]
    every = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        for _ in range(options.processes):
            subprocess.run([*command, "--out", str(out)], check=True)
            every.append(json.loads(out.read_text()))
    arms = every[0]["times"]
    times = {arm: [t for one in every for t in one["times"][arm]] for arm in arms}
    return every[0] | {"processes": options.processes, "times": times}


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
            for name in _in_order(list(arms), turn + step):
                began = time.perf_counter()
                arms[name].step()
                taken[name] += time.perf_counter() - began
        for name, seconds in taken.items():
            times[name].append(seconds / STEPS)
    return {"shape": setting.shape, "held": setting.rank, "end": rank, "times": times}


def _in_order(arms: Sequence[str], number: int) -> list[str]:
    """The arms, each the first one in its turn.

    Never is one behind itself, as the ends are where the order goes to and fro: what it
    has just written is then still in the caches, and it seems faster.
    """
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def beside(found: dict[str, Any], name: str, other: str = FULL) -> dict[str, float]:
    """The median ratio of an arm's time and another's, turn by turn, and interval.

    Of several processes, each one's median is a value.
    """
    pairs = zip(found["times"][name], found["times"][other], strict=True)
    ratios = [own / rival for own, rival in pairs]
    if (processes := found.get("processes", 1)) > 1:
        turns = len(ratios) // processes
        ratios = [
            statistics.median(ratios[turns * n : turns * (n + 1)])
            for n in range(processes)
        ]
    return median_interval(ratios)


def show(found: dict[str, Any], console: Console) -> None:
    """Prints each arm beside both fixed ones."""
    console.print(
        f"batch {found['shape']}, {found['held']} components held per layer, "
        f"{found['end']} at the end, {found.get('processes', 1)} process(es)"
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
