"""LoRA against the frozen probe: python -m experiments.quality [intents|trec6|digits]

The learning rate is chosen from a grid by validation log loss on one seed, with the
test split sealed; then each seed is trained once more on train and validation rows
together and judged on the test split. The probe's constant is chosen and refitted
on the same rows. Writes `experiments/results/quality_<task>.{json,md}`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from experiments.bench.ending import reported
from lowrank.evaluate.stats import over_seeds
from lowrank.run.door import CONF, resolve
from lowrank.run.prepare import prepare
from lowrank.run.probe import run_probe
from lowrank.run.settings import read
from lowrank.run.trial import run_trial

RESULTS = Path(__file__).parent / "results"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
TASKS = ("intents", "trec6", "digits")
#: Metrics of the table: key, heading, scale.
SHOWN = (
    ("accuracy", "accuracy, %", 100),
    ("macro_f1", "macro F1, %", 100),
    ("log_loss", "log loss", 1),
    ("calibration_error", "calibration error, %", 100),
)


def trial(task: str, *overrides: str) -> dict[str, Any]:
    """The config of one trial of a task."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [f"experiment=quality_{task}", *overrides]
        return dict(resolve(compose("config", chosen)))


def study(task: str) -> dict[str, Any]:
    """Chooses the rate, refits every seed, fits the probe."""
    sealed = ["evaluate=sealed", f"seed={SEEDS[0]}"]
    losses = {}
    for rate in RATES:
        run = run_trial(trial(task, *sealed, f"optim.lr={rate}"))
        found = run["scores"]["validation"]["metrics"]
        losses[rate] = found["log_loss"]["estimate"]
    best = min(losses, key=losses.__getitem__)
    whole = ("data.train_on_validation=true", f"optim.lr={best}")
    runs = [run_trial(trial(task, *whole, f"seed={seed}")) for seed in SEEDS]
    return {
        "task": task,
        "validation_log_loss": {str(rate): loss for rate, loss in losses.items()},
        "chosen_lr": best,
        "seeds": list(SEEDS),
        "probe": run_probe(prepare(read(trial(task))))["scores"]["test"]["metrics"],
        "lora": [run["scores"]["test"]["metrics"] for run in runs],
        "rows": runs[0]["data"]["rows"],
        "step_median_seconds": [run["costs"]["step_median_seconds"] for run in runs],
    }


def table(found: Mapping[str, Any]) -> str:
    """The study as Markdown: estimates over rows, and over seeds."""
    lines = [
        f"# {found['task']}: LoRA r=8 against the frozen probe",
        "",
        f"`python -m experiments.quality {found['task']}`: learning rate "
        f"{found['chosen_lr']:g} of {', '.join(found['validation_log_loss'])} by "
        f"validation log loss on seed {found['seeds'][0]}; refitted on train + "
        f"validation with seeds {found['seeds']}. Rows: {found['rows']}.",
        "",
        "| metric | frozen probe [95 %, rows] | LoRA, mean of seeds [95 %, seeds] | "
        "LoRA, seed 0 [95 %, rows] |",
        "|---|---|---|---|",
    ]
    for key, heading, scale in SHOWN:
        seeds = over_seeds([run[key]["estimate"] for run in found["lora"]])
        cells = [found["probe"][key], seeds.json(), found["lora"][0][key]]
        shown = " | ".join(_cell(c, scale) for c in cells)
        lines.append(f"| {heading} | {shown} |")
    gain = np.mean([run["accuracy"]["estimate"] for run in found["lora"]])
    gain -= found["probe"]["accuracy"]["estimate"]
    lines += ["", f"LoRA is {100 * gain:.1f} points of accuracy above the probe.", ""]
    return "\n".join(lines)


def _cell(value: dict[str, Any], scale: float) -> str:
    numbers = [value["estimate"], value["low"], value["high"]]
    middle, *ends = ("-" if n is None else f"{scale * n:.3g}" for n in numbers)
    return f"{middle} [{', '.join(ends)}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the studies of the tasks that are named; the exit code says how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; none: all")
    tasks = parser.parse_args(arguments).tasks
    if unknown := sorted(set(tasks) - set(TASKS)):
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    for task in tasks or TASKS:
        file = RESULTS / f"quality_{task}.json"
        if code := reported(partial(study, task), table, str(file)):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
