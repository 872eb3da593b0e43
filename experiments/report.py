"""Report a sweep from its records: python -m experiments.report directory=DIRECTORY"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.run.door import command
from lowrank.sweeps.report import report_sweep


def report(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Writes tables, figures and report.md, and shows the ranked arms."""
    del overrides
    report_sweep(config)


main = command(report, config_name="report")

if __name__ == "__main__":
    main()
