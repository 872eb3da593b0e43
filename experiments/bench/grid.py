"""The grid that the sweep arms run: the same trials, data and steps for all of them."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir

from lowrank.core.spec import spec
from lowrank.data.tasks import IntentsData
from lowrank.run.door import CONF, resolve
from lowrank.run.settings import Settings, read

RANKS, RATES, SEEDS = (2, 4, 8, 16), (1e-3, 4e-3), (0, 1, 2)
BATCH, SEQ = 32, 8
VALIDATION_ROWS, TEST_ROWS = 128, 64


@spec
class Grid:
    """Trials of a makespan.

    Attributes:
      folder: Where data and runs are.
      steps: Of every trial; 256 tokens each.
      trials: How many of the grid's 24 trials, the first ones.
    """

    folder: str
    steps: int = 100
    trials: int = 24

    @property
    def epochs(self) -> int:
        """Four where that divides the steps, else one."""
        return 4 if self.steps % 4 == 0 else 1

    @property
    def cells(self) -> list[dict[str, float]]:
        """What tells the trials apart; neighbors differ in seed first."""
        found = itertools.product(RANKS, RATES, SEEDS)
        cells = [dict(zip(("rank", "lr", "seed"), one, strict=True)) for one in found]
        # Every rank occurs among the first few.
        order = np.random.default_rng(0).permutation(len(cells))
        return [cells[n] for n in order[: self.trials]]

    def common(self, where: str) -> list[str]:
        """Arguments of every trial."""
        return [
            "data=table",
            f"data.path={self.folder}/data",
            f"data.batching.batch_size={BATCH}",
            f"data.batching.buckets=[{SEQ}]",
            f"optim.epochs={self.epochs}",
            "track=local",
            "evaluate=sealed",
            "evaluate.latency=false",
            "evaluate.resamples=100",
            # At the end only, as in the other arms.
            f"loop.evaluate_every={self.steps}",
            f"loop.checkpoint_every={self.steps}",
            f"run.root={self.folder}/{where}",
        ]

    def halving(self) -> list[str]:
        """Arguments of the halved sweep: validations on the way, for the rungs."""
        return ["sweep=halving", f"loop.evaluate_every={max(self.steps // 10, 1)}"]

    def own(self, cell: Mapping[str, float]) -> list[str]:
        """Arguments that tell one trial from the others."""
        return [
            f"delta.rank={cell['rank']}",
            f"optim.lr={cell['lr']}",
            f"seed={cell['seed']}",
        ]

    def settings(self, where: str) -> list[Settings]:
        """The trials, composed as the command composes them."""
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return [
                read(dict(resolve(compose("config", self.common(where) + self.own(c)))))
                for c in self.cells
            ]

    def write_data(self) -> None:
        """Writes short utterances with their intent: as many rows as the steps need."""
        task = IntentsData(rows_per_class=40).load()
        rng = np.random.default_rng(0)
        wanted = {
            "train": BATCH * self.steps // self.epochs,
            "validation": VALIDATION_ROWS,
            "test": TEST_ROWS,
        }
        known: list[str] = []
        for name, count in wanted.items():
            split = task.splits[name]
            frame = pd.DataFrame(
                {
                    "text": split.texts,
                    "label": [task.classes[n].split("|")[0] for n in split.labels],
                }
            )
            if known:
                frame = frame[frame["label"].isin(known)]
            rows = frame.iloc[rng.permutation(len(frame))[:count]]
            known = known or sorted(set(rows["label"]))
            path = Path(self.folder) / "data" / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_csv(path, index=False)


def validation_numbers(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean accuracy and log loss over trials, by which arms are compared."""
    names = ("accuracy", "log_loss")
    return {name: float(np.mean([one[name] for one in results])) for name in names}
