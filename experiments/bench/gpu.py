"""LoRA on billion-sized shapes beside PEFT: python -m experiments.bench.gpu --model 1b

A training step of LoRA r=16 on all linear maps of a Llama shape with random weights, in
bfloat16: ours, and transformers with PEFT and SDPA, plain and through `torch.compile`.
Utilisation is model FLOPs over what square matrix products reach on the same device.
Arms sit in processes of their own and take turns; an arm that fails is told of.

On a machine without an accelerator: --device cpu --model toy, which shows that it runs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench import peers
from experiments.bench.__main__ import WARM, describe
from experiments.bench.child import Child
from experiments.bench.ending import reported
from experiments.bench.report import median_interval
from experiments.bench.setting import Setting
from experiments.bench.shapes import SHAPES, config_of, model_flops
from lowrank.core.errors import LowrankError

#: Arm -> what it is called.
ARMS = {
    "decoder": "lowrank",
    "decoder_peft": "PEFT",
    "decoder_peft_compiled": "PEFT, torch.compile",
}
OURS, CEILING = "decoder", "product"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit code says whether it could."""
    options = parse(arguments)
    return reported(lambda: compare(options), table, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m experiments.bench.gpu")
    parser.add_argument("--model", default="1b", choices=SHAPES, help="the shape")
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--remat", default="none", choices=("none", "full"))
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16, help="components of every map")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms")
    parser.add_argument("--out", help="JSON with everything, and a table beside it")
    options = parser.parse_args(arguments)
    options.arms = options.arms.split(",")
    if unknown := {*options.arms} - {*ARMS}:
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    if options.steps < 1 or options.rounds < 1:
        parser.error("--steps and --rounds are at least 1")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all arms and gathers the report.

    Raises:
      BadInput: The peers are missing, or a number is out of its range.
      LowrankError: No arm, or not the ceiling, could be run.
    """
    if {*options.arms} - {OURS}:
        peers.require()
    machine = describe(os.cpu_count() or 1)
    setting = Setting(
        base=options.model, model=options.model, batch=options.batch, seq=options.seq,
        rank=options.rank, num_threads=os.cpu_count() or 1, dtype=options.dtype,
        remat=options.remat, device=options.device,
    )  # fmt: skip
    children: dict[str, Child] = {}
    failed: dict[str, str] = {}
    turns: dict[str, list[dict[str, Any]]] = {}
    try:
        for arm in (CEILING, *options.arms):
            try:
                children[arm] = Child(arm, setting, _environment(options.device))
            except LowrankError as error:
                failed[arm] = str(error)
        if CEILING in failed or len(failed) == len(options.arms):
            raise LowrankError(f"bench: nothing to compare: {failed}")
        turns = {arm: [] for arm in children}
        for number in range(options.rounds):
            for arm in list(children)[:: -1 if number % 2 else 1]:
                turns[arm].append(children[arm].run(WARM + options.steps))
        reached = children[CEILING].facts
    finally:
        for child in children.values():
            child.close()
    seconds = {
        arm: [statistics.median(one["seconds"][WARM:]) for one in own]
        for arm, own in turns.items()
    }
    return {
        "machine": machine,
        "setting": {**vars(options)},
        "seconds": seconds,
        "losses": {
            arm: [x for one in own for x in one["losses"]]
            for arm, own in turns.items()
            if arm != CEILING
        },
        "peak_bytes": {arm: own[-1]["peak_bytes"] for arm, own in turns.items()},
        "model_flops": model_flops(
            config_of(options.model), options.batch, options.seq, options.rank
        ),
        "ceiling_flops_per_second": reached["work"] / min(seconds[CEILING]),
        "failed": failed,
    }


def _environment(device: str) -> dict[str, str]:
    if device == "cpu":
        return {}
    # All arms hold their part of one device, and each as much as it needs.
    return {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    setting, machine = report["setting"], report["machine"]
    tokens = setting["batch"] * setting["seq"]
    ceiling = report["ceiling_flops_per_second"]
    lines = [
        f"# LoRA on a Llama of {setting['model']}, beside PEFT",
        "",
        f"`python -m experiments.bench.gpu`: {setting['batch']} rows of "
        f"{setting['seq']} tokens, r={setting['rank']}, {setting['dtype']}, "
        f"remat={setting['remat']}, random weights. Utilisation is of "
        f"{ceiling / 1e12:.3g} TFLOP/s, which square products reach. "
        f"{setting['device']}, {machine['cpu']}, jax {machine['versions']['jax']}.",
        "",
        "| arm | s per step | tokens/s | our time over its | peak GiB | utilisation |",
        "|---|---|---|---|---|---|",
    ]
    seconds = report["seconds"]
    for arm in (arm for arm in ARMS if arm in seconds):
        own, peak = statistics.median(seconds[arm]), report["peak_bytes"][arm]
        ratio = "-"
        if arm != OURS and OURS in seconds:
            pairs = zip(seconds[OURS], seconds[arm], strict=True)
            found = median_interval([a / b for a, b in pairs])
            ratio = f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        memory = "-" if peak is None else f"{peak / 2**30:.2f}"
        used = report["model_flops"] / own / ceiling
        lines.append(
            f"| {ARMS[arm]} | {own:.4f} | {tokens / own:.0f} | {ratio} | {memory} | "
            f"{100 * used:.1f} % |"
        )
    lines += [f"\n{ARMS[arm]}: {why}" for arm, why in report["failed"].items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
