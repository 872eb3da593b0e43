"""Judge a finished run again: python -m experiments.evaluate run.directory=runs/ID"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.report.tables import show_scores
from lowrank.run.door import command
from lowrank.run.judge import evaluate_run


def evaluate(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Scores the run and shows it."""
    del overrides
    show_scores(evaluate_run(config))


main = command(evaluate, config_name="evaluate")

if __name__ == "__main__":
    main()
