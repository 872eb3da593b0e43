"""The sweeper: Optuna asks for as many trials at a time as fill packs."""

# No `from __future__ import annotations` here; see packed.py.

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class OptunaSweeperConf:
    """Fields of `hydra.sweeper`.

    Attributes:
      num_trials: In all, those of earlier calls of the same line included.
      batch: Trials asked for at a time; a multiple of the packs' width fills them.
      direction: "maximize" or "minimize".
      sampler: "tpe" or "random".
      seed: Of the sampler.
    """

    _target_: str = "hydra_plugins.lowrank_packed.optuna_sweeper.OptunaSweeper"
    num_trials: int = 32
    batch: int = 8
    direction: str = "maximize"
    sampler: str = "tpe"
    seed: int = 0


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="lowrank_optuna",
    node=OptunaSweeperConf,
    provider="lowrank",
)


class OptunaSweeper(Sweeper):
    """Asks and tells; see `lowrank.sweeps.ask`."""

    def __init__(
        self, num_trials: int, batch: int, direction: str, sampler: str, seed: int
    ) -> None:
        """Takes the fields of `hydra.sweeper`."""
        self.choices = {
            "num_trials": num_trials,
            "batch": batch,
            "direction": direction,
            "sampler": sampler,
            "seed": seed,
        }
        self.launcher: Launcher | None = None

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """Makes the launcher that the config names."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the study; the best trial's number, value and arguments."""
        # Here, and not above: it loads Optuna and JAX.
        from lowrank.sweeps.ask import study

        assert self.launcher is not None
        assert self.config is not None
        assert self.hydra_context is not None
        return study(
            arguments, self.launcher, self.config, self.hydra_context, **self.choices
        )
