"""A finished run as one model that transformers opens by itself.

python -m experiments.merge run.directory=runs/ID merged.directory=my-model
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.run.door import command
from lowrank.run.merging import merge_run


def merge(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Writes the model and says where."""
    del overrides
    print(merge_run(config))


main = command(merge, config_name="merge")

if __name__ == "__main__":
    main()
