"""The launcher: jobs of one multirun as packs that share a compiled step and a base."""

# No `from __future__ import annotations` here: Hydra's scanner runs a module before it
# has a name, and a dataclass could then not look up its own annotations.

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.lowrank_packed.composed import Composed

log = logging.getLogger(__name__)


@dataclass
class PackedLauncherConf:
    """No fields: what a sweep may be told stands in the group `sweep`."""

    _target_: str = "hydra_plugins.lowrank_packed.packed.PackedLauncher"


ConfigStore.instance().store(
    group="hydra/launcher",
    name="packed",
    node=PackedLauncherConf,
    provider="lowrank",
)


class PackedLauncher(BasicLauncher):
    """Runs jobs in packs where the task function says how, else one after another."""

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """See `hydra.plugins.launcher.Launcher`; comes before the sweeper's work."""
        super().setup(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._composed = Composed(hydra_context.config_loader)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """See `lowrank.sweeps.jobs.launch`."""
        packing = getattr(self.task_function, "packing", None)
        if packing is None:
            log.warning(
                "hydra/launcher=packed: this command does not say how its jobs are "
                "packed, so they run alone"
            )
            return super().launch(job_overrides, initial_job_idx)
        # Here, and not above: it loads JAX.
        from lowrank.sweeps.jobs import launch

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.task_function is not None
        return launch(
            job_overrides,
            initial_job_idx,
            config=self.config,
            context=self.hydra_context,
            compose=self._composed.take,
            task_function=self.task_function,
            packing=packing,
        )
