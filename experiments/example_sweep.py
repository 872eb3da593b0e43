"""A made-up sweep to read: python -m experiments.example_sweep DIRECTORY

No model is trained: a formula with noise gives the numbers, and every config says so
(`base.name: made-up`). The records are written by the class that writes real ones, so
what reads this sweep reads real sweeps.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.spec import digest
from lowrank.io.record import METRICS, Record
from lowrank.track.jsonl import JsonlTracker

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
RANKS = (2, 4, 8, 16)
DECAYS = (0.0, 0.01, 0.1)
STEPS = 60
#: Rows of the validation split that the accuracies are shares of.
ROWS = 400


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is swept.

    Attributes:
      ranks, rates, seeds: All combined.
      decays: Other weight decays, tried at the second largest rank and the middle rate.
      test: Whether the records have scores on the test split, as no sealed sweep has.
    """

    ranks: tuple[int, ...] = RANKS
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = (0, 1, 2)
    decays: tuple[float, ...] = DECAYS
    test: bool = False

    def configs(self) -> Iterator[dict[str, Any]]:
        """The configs, shaped like those of real trials."""
        for rank, rate, seed in itertools.product(self.ranks, self.rates, self.seeds):
            yield make_config(rank, rate, self.decays[0], seed)
        rank, rate = self.ranks[-2:][0], self.rates[len(self.rates) // 2]
        for decay, seed in itertools.product(self.decays[1:], self.seeds):
            yield make_config(rank, rate, decay, seed)


def write_example(directory: Path, grid: Grid = Grid()) -> Path:
    """Writes the records of a finished sweep, except for one trial that diverges.

    That one has the largest rate, the largest rank and the last seed.
    """
    for config in grid.configs():
        trial = digest(config, 12)
        with Record.open(
            directory / trial, config=config, identity={"config": trial}
        ) as record:
            diverges = (
                config["optim"]["lr"] == grid.rates[-1]
                and config["delta"]["rank"] == grid.ranks[-1]
                and config["seed"] == grid.seeds[-1]
            )
            write_trial(record, config, diverges=diverges, test=grid.test)
    return directory


def make_config(rank: int, rate: float, decay: float, seed: int) -> dict[str, Any]:
    """The settings of a trial that matter here."""
    return {
        "base": {"name": "made-up", "source": "python:experiments.example_sweep:none"},
        "data": {"name": "made-up", "batching": {"batch_size": 32, "buckets": [32]}},
        "delta": {"name": "lora", "rank": rank, "ranks": None, "alpha": 16.0},
        "optim": {"name": "adamw", "lr": rate, "weight_decay": decay, "epochs": 2},
        "loop": {"log_every": 10, "select": "accuracy"},
        "evaluate": {"test": False, "level": 0.95},
        "seed": seed,
        "run": {"directory": None},
    }


def write_trial(
    record: Record, config: Mapping[str, Any], *, diverges: bool = False, test=False
) -> None:
    """Writes the log and, unless it diverges, costs and result of a made-up trial."""
    curve = accuracies(config)
    jsonl = JsonlTracker(record.path(METRICS))
    for step, accuracy in curve.items():
        loss = float("nan") if diverges and step > 20 else 2 * (1 - accuracy)
        jsonl.log(step, {"train/loss": loss, "train/grad_norm": 1 + loss})
        if diverges and step > 20:
            record.set_status("failed", f"NonFinite: the loss is nan at step {step}")
            jsonl.close("failed")
            return
        if step % 20 == 0:
            numbers = {"accuracy": accuracy, "log_loss": 2.5 * (1 - accuracy)}
            jsonl.log(step, {f"validation/{n}": v for n, v in numbers.items()})
    jsonl.close("done")
    record.write_json("costs.json", costs(config))
    seen = {step: value for step, value in curve.items() if step % 20 == 0}
    best_step = max(seen, key=lambda step: np.float32(seen[step]))
    scores = {"validation": judged(seen[best_step])}
    if test:
        scores["test"] = judged(seen[best_step] - 0.02)
    record.result(
        {
            "trial": digest(config, 12),
            "scores": scores,
            "steps": STEPS,
            "best_step": best_step,
            "costs": costs(config),
        }
    )


def accuracies(config: Mapping[str, Any]) -> dict[int, float]:
    """step -> accuracy: best near one rate, growing with rank ever more slowly."""
    rank, rate = config["delta"]["rank"], config["optim"]["lr"]
    decay, seed = config["optim"]["weight_decay"], config["seed"]
    # Seeds differ alike in all arms, as runs over the same data do, and a little apart.
    shared = np.random.default_rng(seed).normal(0, 0.012)
    own = np.random.default_rng([seed, rank, round(1e6 * rate)]).normal(0, 0.006)
    top = 0.86 - 0.12 / rank - 0.25 * (decay - 0.01)
    top -= 0.05 * (np.log10(rate) - np.log10(1.2e-3)) ** 2 * (1 + np.log2(rank) / 4)
    final = top + shared + own
    curve = {
        step: final * (1 - np.exp(-step / 12)) for step in range(10, STEPS + 1, 10)
    }
    return {step: round(ROWS * float(a)) / ROWS for step, a in curve.items()}


def judged(accuracy: float) -> dict[str, Any]:
    """A split's scores as a result has them; intervals by the normal formula."""
    error = 1.96 * (accuracy * (1 - accuracy) / ROWS) ** 0.5
    interval = lambda value, reach: {
        "estimate": value, "low": value - reach, "high": value + reach,
        "level": 0.95, "num_groups": ROWS, "method": "normal",
    }  # fmt: skip
    return {
        "num_rows": ROWS,
        "metrics": {
            "accuracy": interval(accuracy, error),
            "log_loss": interval(2.5 * (1 - accuracy), 2.5 * error),
        },
    }


def costs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Costs as of a base with 64 adapted matrices of 384 x 384, four trials a pack."""
    rank = config["delta"]["rank"]
    return {
        "version": 1,
        "device": "made-up x 1",
        "num_trials": 4,
        "trained_parameters": 64 * 2 * 384 * rank + 4620,
        "step_flops": 4 * (6.1e9 + 2.4e7 * rank),
        "step_median_seconds": 4 * (0.041 + 0.0007 * rank),
        "parameters_per_site": {"head/kernel": 4620},
    }


def main() -> None:
    """Writes the sweep to the directory that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.example_sweep DIRECTORY")
    directory = write_example(Path(sys.argv[1]))
    print(json.dumps({"directory": str(directory)}))


if __name__ == "__main__":
    main()
