"""What could be adapted in a base: python -m experiments.sites base=minilm"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.report.sites import show_sites
from lowrank.run.door import command
from lowrank.run.survey import survey


def sites(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Shows the weights of the base, or prints them as JSON."""
    del overrides
    found = survey(config)
    if config["format"] == "json":
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        show_sites(found)


main = command(sites, config_name="sites")

if __name__ == "__main__":
    main()
