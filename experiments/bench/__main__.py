"""The command: python -m experiments.bench [--steps 8] [--rounds 7] [--quick]."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from experiments.bench import peers
from experiments.bench.child import ARMS, Child
from experiments.bench.report import SCHEMA, show, summarize
from experiments.bench.setting import SHAPES, Setting
from lowrank.core.errors import BadInput, LowrankError, exit_code
from lowrank.io import hub
from lowrank.io.bert import BERT
from lowrank.io.files import write_json_atomically

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "numpy")
#: Steps of a turn that are not timed: caches are cold after the others' turns.
WARM = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit code says whether it could."""
    options = parse(arguments)
    try:
        report = compare(options)
    except LowrankError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    show(report, Console())
    if options.out:
        write_json_atomically(Path(options.out), report)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m experiments.bench", description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every arm")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms")
    parser.add_argument(
        "--shapes",
        default=",".join(f"{batch}x{seq}" for batch, seq in SHAPES),
        help="rows x tokens, some",
    )
    parser.add_argument("--base", default="minilm", help="weights, as elsewhere")
    parser.add_argument("--threads", type=int, default=2, help="cores of an arm")
    parser.add_argument("--quick", action="store_true", help="small shape, few steps")
    parser.add_argument("--out", help="JSON with everything, raw times included")
    options = parser.parse_args(arguments)
    options.arms = tuple(options.arms.split(","))
    options.shapes = [one.split("x") for one in options.shapes.split(",")]
    if any(len(one) != 2 or not all(map(str.isdigit, one)) for one in options.shapes):
        parser.error("--shapes is a list like 32x64,8x32: rows x tokens")
    options.shapes = [(int(batch), int(seq)) for batch, seq in options.shapes]
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    if options.steps < 1 or options.rounds < 1:
        parser.error("--steps and --rounds are at least 1")
    if options.quick:
        options.steps, options.rounds = min(options.steps, 3), min(options.rounds, 3)
        options.shapes = options.shapes[-1:]
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all arms on all shapes and gathers the report.

    Raises:
      BadInput: An arm's packages are missing, or the base cannot be loaded.
    """
    if any(arm.startswith("peft") for arm in options.arms):
        peers.require()
    machine = describe(options.threads)
    base = hub.load(options.base, num_classes=Setting().num_classes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        export(base, folder)
        shared = {
            "base": options.base,
            "folder": str(folder),
            "num_threads": options.threads,
        }
        settings = [Setting(batch=b, seq=s, **shared) for b, s in options.shapes]
        report = {
            "schema": SCHEMA,
            "machine": machine,
            "shapes": {s.shape: measure(s, options) for s in settings},
            "starts": {
                arm: starts(arm, settings[0], Path(scratch) / f"cache-{arm}")
                for arm in options.arms
                if arm != "peft_huge"
            },
        }
    machine["load_after"] = os.getloadavg()[0]
    return report


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm in its process, turn about; every other round in reverse order."""
    children: dict[str, Child] = {}
    try:
        for arm in options.arms:
            children[arm] = Child(arm, setting)
        raw: dict[str, Any] = {
            arm: {"rounds": [], "losses": [child.first_loss], "idle_cpu_seconds": []}
            for arm, child in children.items()
        }
        for number in range(options.rounds):
            order = list(options.arms)[:: -1 if number % 2 else 1]
            for arm in order:
                turn = children[arm].run(WARM + options.steps)
                raw[arm]["rounds"].append(turn["seconds"][WARM:])
                raw[arm]["losses"] += turn["losses"]
                raw[arm]["idle_cpu_seconds"].append(turn["idle_cpu_seconds"])
                raw[arm]["peak_bytes"] = turn["peak_bytes"]
        # Counting walks the program and needs memory of its own: after the peak.
        for arm, child in children.items():
            raw[arm] |= {"facts": child.facts, "flops": child.flops()}
    finally:
        for child in children.values():
            child.close()
    shape = {"arms": raw}
    return {**shape, "summary": summarize(shape)}


def starts(arm: str, setting: Setting, cache: Path) -> dict[str, float]:
    """Seconds from the command to the first step, cold and with a warm cache."""

    def seconds(environment: dict[str, str]) -> float:
        child = Child(arm, setting, environment)
        child.close()
        return child.first_step_seconds

    if arm.startswith("peft"):
        return {"cold": seconds({})}
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {"cold": seconds(caching), "cached": seconds(caching)}


def export(base: hub.Base, folder: Path) -> None:
    """Writes the base as a Hugging Face folder, for those who read nothing else.

    Raises:
      BadInput: It did not come from one, so there is no config.json.
    """
    if base.hf_config is None:
        raise BadInput(f"bench: base {base.name!r} has no config.json to compare with")
    folder.mkdir()
    tensors = {
        name: np.array(value)
        for name, value in BERT.to_hf(base.params, prefix="").items()
        if not name.startswith("classifier.")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(base.hf_config)))


def describe(num_threads: int) -> dict[str, Any]:
    """Machine and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "cpu": cpu,
        "num_cpus": os.cpu_count(),
        "num_threads": num_threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
