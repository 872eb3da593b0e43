"""A finished adapter cut to fewer components:

python -m experiments.truncate truncate.adapter=runs/ID truncate.rank=4 \\
    truncate.directory=smaller
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.run.door import command
from lowrank.run.truncation import truncate_run


def truncate(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Writes the adapter and says what is left of it."""
    del overrides
    print(json.dumps(truncate_run(config), indent=2))


main = command(truncate, config_name="truncate")

if __name__ == "__main__":
    main()
