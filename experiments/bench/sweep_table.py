"""The sweep benchmark as Markdown: makespans, bounds, gains and the curve."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.bench.report import median_interval

TITLES = {
    "alone": "A: one process per trial",
    "reused": "B: one process, one step reused",
    "packed": "C: packed",
    "halved": "D: packed with halving",
    "peft": "E: PEFT on torch, one process",
}
#: (numerator, denominator, limit at 100 steps, limit at 30 steps)
BOUNDS = (
    ("packed", "alone", 0.7, 0.5),
    ("halved", "alone", 0.35, None),
    ("packed", "peft", 0.9, None),
    ("halved", "peft", 0.5, None),
)
#: What each arm does without, beside the arm before it.
SAVED = (
    ("alone", "reused", "starting and compiling once per trial, and its records"),
    ("reused", "packed", "calls, batches and evaluations trial by trial"),
    ("packed", "halved", "steps of trials that are cut"),
)


def table(report: Mapping[str, Any]) -> str:
    """All of a report; makespans or the curve may be missing."""
    machine = report["machine"]
    lines = [
        "# Many short trials, five ways" if report["spans"] else "# Width of a pack",
        "",
        f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cpus']} cores; "
        f"load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after.",
    ]
    if report["spans"]:
        lines += makespans(report)
    for shape, found in report["curves"].items():
        lines += curve(shape, found)
    return "\n".join([*lines, ""])


def makespans(report: Mapping[str, Any]) -> list[str]:
    """Whole commands: their times, the bounds on their ratios, and what is saved."""
    middle = {
        arm: float(np.median([one["seconds"] for one in found]))
        for arm, found in report["spans"].items()
    }
    lines = [
        "",
        f"`make bench-sweep`: {report['trials']} trials of MiniLM, LoRA of four ranks "
        f"x two rates x three seeds, {report['steps']} steps of 256 tokens each, whole "
        "commands. The scores of D are those of the trial that is left."
        + _scaled(report),
        "",
        "| arm | makespan, s | runs | validation accuracy | validation log loss |",
        "|---|---|---|---|---|",
    ]
    for arm, found in report["spans"].items():
        seconds = ", ".join(f"{one['seconds']:.0f}" for one in found)
        said = [f"{found[0]['validation'][n]:.3f}" for n in ("accuracy", "log_loss")]
        lines.append(
            f"| {TITLES[arm]} | {seconds} | {len(found)} | {' | '.join(said)} |"
        )
    short = report["steps"] < 65
    lines += ["", "| ratio | wanted | found |", "|---|---|---|"]
    for top, bottom, limit, limit_short in BOUNDS:
        wanted = limit_short if short else limit
        if top in middle and bottom in middle and wanted is not None:
            ratio = middle[top] / middle[bottom]
            met = "met" if ratio <= wanted else "missed"
            lines.append(
                f"| {TITLES[top]} / {TITLES[bottom]} | {wanted} | {ratio:.2f}: {met} |"
            )
    return [*lines, "", *gains(middle)]


def _scaled(report: Mapping[str, Any]) -> str:
    """What is said where some trials of A stand for all."""
    timed = [len(one.get("each", ())) for one in report["spans"].get("alone", ())]
    if not timed or not 0 < timed[0] < report["trials"]:
        return ""
    return f" Of A {timed[0]} trials were timed, and their mean stands for the others'."


def gains(middle: Mapping[str, float]) -> list[str]:
    """Where the time of a process per trial goes, as the arms tell it apart."""
    return [
        f"* {TITLES[upper][0]} to {TITLES[lower][0]}: "
        f"{100 * (middle[upper] - middle[lower]) / middle['alone']:.0f} % of A, {what}."
        for upper, lower, what in SAVED
        if {"alone", upper, lower} <= middle.keys()
    ]


def curve(shape: str, found: Mapping[str, Any]) -> list[str]:
    """Time per trial-step over that of a pack of one, turn by turn."""
    lines = [
        "",
        f"Time of a trial-step at {shape}, over that of a pack of one "
        f"(wanted: at most {found['limit']}):",
        "",
        "| pack | ms per trial-step | over a pack of one | compile, s | temp MiB |",
        "|---|---|---|---|---|",
    ]
    one = np.array(found["widths"]["1"]["seconds"])
    for width, cell in found["widths"].items():
        seconds = np.array(cell["seconds"])
        ratio = median_interval(list(seconds / one))
        lines.append(
            f"| {width} | {1000 * np.median(seconds):.0f} | {ratio['median']:.2f} "
            f"[{ratio['low']:.2f}, {ratio['high']:.2f}] | "
            f"{cell['compile_seconds']:.1f} | {cell['temp_bytes'] / 2**20:.0f} |"
        )
    return lines
