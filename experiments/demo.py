"""The main job on the embedded default: frozen probe, then LoRA, one table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from lowrank.report.tables import show_comparison, show_result
from lowrank.run.door import command
from lowrank.run.prepare import prepare
from lowrank.run.probe import run_probe
from lowrank.run.settings import read
from lowrank.run.trial import run_trial


def demo(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Runs the default config, or what the arguments make of it."""
    console = Console()
    prepared = prepare(read(config))
    console.print("Frozen probe: logistic regression on the base's features ...")
    probe = run_probe(prepared)
    console.print("LoRA ...")
    result = run_trial(config, overrides)
    show_result(result, console)
    show_comparison({"frozen probe": probe, "LoRA": result}, console)
    console.print(f"Everything is in {prepared.directory}")


main = command(demo)

if __name__ == "__main__":
    main()
