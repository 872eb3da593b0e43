"""The command: python -m experiments.ranks_protocol size=smoke|standard|claims|full"""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.ranks_protocol import report, study
from experiments.ranks_protocol.settings import Protocol, read
from lowrank.run.door import command
from lowrank.train.guard import interruptible


def protocol(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Runs what the config says, writes the results and prints them."""
    del overrides
    # A study is many short trainings; what each compiles is no news.
    logging.getLogger("lowrank").setLevel(logging.WARNING)
    chosen = read(config)
    with interruptible():
        found = report.results(_watched(chosen), chosen)
        files = report.write(found, chosen.results)
    print(report.markdown(found))
    Console(stderr=True).print(f"Written: {', '.join(map(str, files))}")


def _watched(chosen: Protocol) -> Mapping[str, Any]:
    """The study, with a bar where there is a terminal."""
    study.check(chosen)
    if not (chosen.progress and sys.stderr.isatty()):
        return study.run(chosen)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        total = study.work(chosen)
        task = bar.add_task("", total=total)
        return study.run(
            chosen, lambda text, n: bar.update(task, advance=n, description=text)
        )


main = command(protocol, config_name="ranks_protocol")

if __name__ == "__main__":
    main()
