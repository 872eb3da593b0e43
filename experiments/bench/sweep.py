"""Many short trials, five ways: python -m experiments.bench.sweep [--steps 100] ...

A: one process per trial. B: one process and one compiled step, reused trial after
trial. C: packed, as `-m hydra/launcher=packed`. D: packed, with successive halving. E:
the same trials in one process of PEFT and torch. Makespans are of whole commands, from
their start to their end; A is measured on some trials and multiplied.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import peers
from experiments.bench.__main__ import describe, export
from experiments.bench.curve import curve
from experiments.bench.ending import reported
from experiments.bench.grid import Grid, validation_numbers
from experiments.bench.peft_grid import ARRAYS
from experiments.bench.reused import export as export_batches
from experiments.bench.setting import Setting
from experiments.bench.sweep_table import TITLES, table
from lowrank.core.errors import BadInput
from lowrank.io import hub
from lowrank.sweeps.load import load_sweep

ARMS = ("alone", "reused", "packed", "halved", "peft")
WIDTHS = (1, 4, 8, 16)
#: (batch, seq) of 256 and of 2048 tokens, and the limit of C over B per trial-step.
TOKENS = (((32, 8), 1.0), ((32, 64), 1.1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit code says whether it could."""
    options = parse(arguments)
    return reported(lambda: compare(options), table, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m experiments.bench.sweep", description=__doc__
    )
    parser.add_argument("--steps", type=int, default=100, help="of every trial")
    parser.add_argument("--trials", type=int, default=24, help="of the grid")
    parser.add_argument("--alone", type=int, default=6, help="trials of A to measure")
    parser.add_argument("--rounds", type=int, default=1, help="makespans of every arm")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms")
    parser.add_argument("--threads", type=int, default=2, help="cores of torch")
    parser.add_argument("--curve", type=int, default=20, help="timed steps; 0: none")
    parser.add_argument("--turns", type=int, default=5, help="that widths take with it")
    parser.add_argument(
        "--tokens",
        default=",".join(str(b * s) for (b, s), _ in TOKENS),
        help="of a step of the curve, some",
    )
    parser.add_argument("--out", help="JSON with everything; a table beside it")
    options = parser.parse_args(arguments)
    options.arms = tuple(filter(None, options.arms.split(",")))
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    least = ("steps", "trials", "alone", "rounds", "turns")
    if min(getattr(options, name) for name in least) < 1:
        parser.error(f"--{', --'.join(least)} are at least 1")
    known = {str(b * s): ((b, s), limit) for (b, s), limit in TOKENS}
    if unknown := {*options.tokens.split(",")} - {*known}:
        parser.error(f"--tokens {sorted(unknown)}; there are {', '.join(known)}")
    options.tokens = [known[one] for one in options.tokens.split(",")]
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all arms, turn about, and the curve.

    Raises:
      BadInput: An arm's packages are missing, or an arm failed.
    """
    if "peft" in options.arms:
        peers.require()
    machine = describe(options.threads)
    base = hub.load("minilm", num_classes=Setting().num_classes)
    spans: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        grid = Grid(folder=scratch, steps=options.steps, trials=options.trials)
        grid.write_data()
        np.savez(folder / ARRAYS, **export_batches(grid))
        export(base, folder / "base")
        classes = len(set(_labels(folder / "data" / "train.csv")))
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "alone": lambda: alone(grid, min(options.alone, options.trials)),
            "reused": lambda: in_one_process("reused", json.dumps(_spec(grid))),
            "packed": lambda: packed(grid, "packed"),
            "halved": lambda: packed(grid, "halved", *grid.halving()),
            "peft": lambda: in_one_process(
                "peft_grid",
                json.dumps(_spec(grid)),
                str(folder / "base"),
                str(options.threads),
                str(classes),
            ),
        }
        for number in range(options.rounds):
            for arm in list(options.arms)[:: -1 if number % 2 else 1]:
                print(f"round {number + 1}: {TITLES[arm]}", file=sys.stderr, flush=True)
                spans[arm].append(runs[arm]())
                print(f"{spans[arm][-1]}", file=sys.stderr, flush=True)
    curves = {}
    for (batch, seq), limit in options.tokens if options.curve else ():
        setting = Setting(batch=batch, seq=seq)
        print(f"curve at {setting.shape}", file=sys.stderr, flush=True)
        turns = min(options.turns, options.curve)
        curves[setting.shape] = {
            "limit": limit,
            "widths": curve(setting, base, WIDTHS, options.curve, turns),
        }
    machine["load_after"] = os.getloadavg()[0]
    return {
        "schema": 1,
        "machine": machine,
        "steps": options.steps,
        "trials": options.trials,
        "spans": spans,
        "curves": curves,
    }


def _labels(path: Path) -> list[str]:
    return [line.rsplit(",", 1)[-1] for line in path.read_text().splitlines()[1:]]


def _spec(grid: Grid) -> dict[str, Any]:
    return {"folder": grid.folder, "steps": grid.steps, "trials": grid.trials}


def _command(*arguments: str) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise BadInput(f"{' '.join(arguments[:3])} failed: {done.stderr[-2000:]}")
    return seconds, done.stdout


def alone(grid: Grid, count: int) -> dict[str, Any]:
    """A: the first trials as commands of their own; the others would cost the same."""
    each = []
    for cell in grid.cells[:count]:
        seconds, _ = _command(
            "experiments.train", *grid.common("alone"), *grid.own(cell)
        )
        each.append(seconds)
    found = _results(Path(grid.folder) / "alone")
    shutil.rmtree(Path(grid.folder) / "alone")
    seconds = float(np.mean(each)) * grid.trials
    return {"seconds": seconds, "each": each, **found}


def packed(grid: Grid, name: str, *more: str) -> dict[str, Any]:
    """C and D: the multirun; the grid as lists would be the same trials."""
    where = Path(grid.folder) / name
    lists = {
        "delta.rank": sorted({int(c["rank"]) for c in grid.cells}),
        "optim.lr": sorted({c["lr"] for c in grid.cells}),
        "seed": sorted({int(c["seed"]) for c in grid.cells}),
    }
    if np.prod([len(v) for v in lists.values()]) != grid.trials:
        raise BadInput("bench: a packed sweep needs the whole grid: leave --trials out")
    swept = [f"{key}={','.join(map(str, v))}" for key, v in lists.items()]
    seconds, _ = _command(
        "experiments.train", "-m", "hydra/launcher=packed", f"hydra.sweep.dir={where}",
        *grid.common(name), *swept, *more,
    )  # fmt: skip
    found = _results(where)
    shutil.rmtree(where)
    return {"seconds": seconds, **found}


def in_one_process(module: str, *arguments: str) -> dict[str, Any]:
    """B and E: a process that trains the whole grid."""
    seconds, said = _command(f"experiments.bench.{module}", *arguments)
    found = json.loads(said.splitlines()[-1])
    return {"seconds": seconds, "validation": validation_numbers(found["results"])}


def _results(directory: Path) -> dict[str, Any]:
    """Mean validation numbers of the trials that went the whole way."""
    trials = load_sweep(directory).trials
    done = trials.loc[trials["status"] == "done"]
    return {
        "validation": {
            name: float(np.nanmean(np.asarray(done[f"best.{name}"], float)))
            for name in ("accuracy", "log_loss")
        },
        "finished": len(done),
    }


if __name__ == "__main__":
    sys.exit(main())
