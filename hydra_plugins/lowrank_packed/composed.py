"""Configs of jobs, composed once: sweepers compose them all to see that they can be.

Composing is most of what a sweep does before it loads anything. What a sweeper has
composed is kept, and the launcher takes it instead of composing it again.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


class Composed:
    """The configs of jobs that somebody asked a loader for and that nobody took."""

    def __init__(self, loader: Any):
        """Listens to a loader.

        Args:
          loader: Hydra's `ConfigLoader`; what it loads for jobs is kept from now on.
        """
        self._load = loader.load_sweep_config
        self._kept: dict[tuple[str, ...], list[Any]] = defaultdict(list)
        loader.load_sweep_config = self._listen

    def take(self, config: Any, overrides: Sequence[str]) -> Any:
        """The config of one job, which is the caller's own: nobody is given it again.

        Args:
          config: Of the sweep.
          overrides: The job's arguments.
        """
        kept = self._kept[tuple(overrides)]
        return kept.pop() if kept else self._load(config, list(overrides))

    def _listen(self, master_config: Any, sweep_overrides: list[str]) -> Any:
        found = self._load(master_config, sweep_overrides)
        self._kept[tuple(sweep_overrides)].append(found)
        return found
