"""How a run's ranks moved: python -m experiments.ranks directory=runs/ID"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.errors import BadInput
from lowrank.report.ranks import report_ranks
from lowrank.run.door import command
from lowrank.run.settings import check_groups

_log = logging.getLogger("lowrank")


def ranks(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Shows a table, and writes figures and ranks.md."""
    del overrides
    check_groups(config, ("directory",))
    directory = config["directory"]
    if not isinstance(directory, str):
        raise BadInput(f"directory is that of a run, as runs/first, not {directory!r}")
    _log.info("wrote %s", report_ranks(directory))


main = command(ranks, config_name="ranks")

if __name__ == "__main__":
    main()
