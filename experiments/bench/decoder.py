"""A decoder beside PEFT: python -m experiments.bench.decoder [--rounds 7] [--quick]

A training step of LoRA on all linear maps of a language model, and generation, token by
token with a cache of keys; each against transformers and PEFT on torch, on the same
weights, tokens and factors. Arms sit in processes of their own, and take turns.
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
from lowrank.io.sources import locate

#: Ours beside theirs, by what they do.
PAIRS = {
    "training step": ("decoder", "decoder_peft"),
    "generation": ("speaker", "speaker_peft"),
}
#: Largest relative difference of the losses of a pair's first step: sums of some
#: hundred terms in another order, through thirty layers.
SAME_LOSS = 1e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit code says whether it could."""
    options = parse(arguments)
    return reported(lambda: compare(options), table, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m experiments.bench.decoder")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every arm")
    parser.add_argument("--base", default="smollm2", help="weights, as elsewhere")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=8, help="components of every map")
    parser.add_argument("--threads", type=int, default=2, help="cores of an arm")
    parser.add_argument("--quick", action="store_true", help="few turns and tokens")
    parser.add_argument("--out", help="JSON with everything, and a table beside it")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.rounds < 1:
        parser.error("--steps and --rounds are at least 1")
    if options.quick:
        options.steps, options.rounds = min(options.steps, 2), min(options.rounds, 2)
        options.seq = min(options.seq, 16)
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs both pairs and gathers the report.

    Raises:
      BadInput: The peers are missing, or the base cannot be loaded.
    """
    peers.require()
    machine = describe(options.threads)
    setting = Setting(
        base=options.base,
        folder=str(locate(options.base, None)[0]),
        batch=options.batch,
        seq=options.seq,
        rank=options.rank,
        num_threads=options.threads,
    )
    found = {
        what: measure(pair, setting, options.rounds, options.steps)
        for what, pair in PAIRS.items()
    }
    machine["load_after"] = os.getloadavg()[0]
    plan = {n: getattr(setting, n) for n in ("base", "batch", "seq", "rank")}
    return {"machine": machine, "setting": plan, "pairs": found}


def measure(
    pair: tuple[str, str], setting: Setting, rounds: int, steps: int
) -> dict[str, Any]:
    """Both arms of a pair, turn about; every other round in reverse order."""
    children: dict[str, Child] = {}
    times: dict[str, list[float]] = {arm: [] for arm in pair}
    losses: dict[str, list[float]] = {arm: [] for arm in pair}
    peaks: dict[str, int | None] = {}
    try:
        for arm in pair:
            children[arm] = Child(arm, setting)
            losses[arm].append(children[arm].first_loss)
        for number in range(rounds):
            for arm in pair[:: -1 if number % 2 else 1]:
                turn = children[arm].run(WARM + steps)
                times[arm].append(statistics.median(turn["seconds"][WARM:]))
                losses[arm] += turn["losses"]
                peaks[arm] = turn["peak_bytes"]
    finally:
        for child in children.values():
            child.close()
    ours, theirs = pair
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    gap = abs(losses[ours][0] - losses[theirs][0]) / abs(losses[theirs][0])
    return {
        "seconds": times,
        "losses": losses,
        "peak_bytes": peaks,
        "ratio": median_interval(ratios),
        "loss_gap": gap,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    setting, machine = report["setting"], report["machine"]
    tokens = setting["batch"] * setting["seq"]
    lines = [
        f"# {setting['base']} beside PEFT and transformers",
        "",
        f"`python -m experiments.bench.decoder`: {setting['batch']} rows of "
        f"{setting['seq']} tokens, LoRA r={setting['rank']} on all linear maps; "
        f"generation of {setting['seq']} tokens per row after as many. "
        f"{machine['num_threads']} of {machine['num_cpus']} cores, {machine['cpu']}.",
        "",
        "| what | ours, s | theirs, s | of their time | tokens/s | theirs | "
        "of their peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, found in report["pairs"].items():
        ours, theirs = PAIRS[what]
        own, other = (statistics.median(found["seconds"][x]) for x in (ours, theirs))
        ratio, peaks = found["ratio"], found["peak_bytes"]
        memory = peaks[ours] / peaks[theirs] if peaks[ours] and peaks[theirs] else None
        lines.append(
            f"| {what} | {own:.2f} | {other:.2f} | {ratio['median']:.2f} "
            f"[{ratio['low']:.2f}, {ratio['high']:.2f}] | {tokens / own:.0f} | "
            f"{tokens / other:.0f} | {'-' if memory is None else f'{memory:.2f}'} |"
        )
        if found["loss_gap"] > SAME_LOSS:
            lines += [
                "",
                f"The arms of {what} do not compute the same thing: their first "
                f"results differ by {found['loss_gap']:.1e}, relative.",
                "",
            ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
