"""Real text on a pretrained encoder, at one budget; nobody knows the right ranks.

A task is a config of `experiments.train`, and its name says the budget: "intents@4" is
`intents` at four components per layer on average. All seeds share the rows; the start
of head and factors, the order of the data and the ranks are a seed's own. Rates are
chosen on the validation split, arms are judged on the test split.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.ranks_protocol.settings import JUDGED_SEED
from experiments.ranks_protocol.settings import Protocol as Settings
from lowrank.adapt.attach import Adapted
from lowrank.allocate.slots import Slots, Unit
from lowrank.data.buckets import Batch
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.evaluate.score import score_trials
from lowrank.run.door import CONF, resolve
from lowrank.run.fit import Fit
from lowrank.run.forward import inputs_of
from lowrank.run.labeled import Labeled
from lowrank.run.prepare import Prepared, prepare
from lowrank.run.settings import read
from lowrank.train.batches import TrainBatches
from lowrank.train.losses import Loss, cross_entropy

#: Arguments of `experiments.train` by task. A task joins by its entry.
SOURCES: Mapping[str, tuple[str, ...]] = {
    "intents": ("experiment=quality_intents",),
    "trec6": ("experiment=quality_trec6",),
    # Few-shot: ten rows of each of 77 classes.
    "banking77": (
        "data=table",
        "data.path=../shared/data/banking77",
        "data.label=category",
        "data.rows_per_class=10",
    ),
}
#: Components that layers hold while ranks move, over the rank of the rules.
ROOM = 2
#: Rows of an evaluation batch: large ones are no faster.
_ROWS = 64
#: Few shapes: what a step is compiled for takes as long as a short training. The few
#: longer rows lose their end, for every arm alike.
_BUCKETS = [16, 32]


@dataclasses.dataclass(frozen=True)
class Real:
    """A task at one budget; see `tasks.Task`.

    Attributes:
      source: Key of `SOURCES`.
      rank: Components per layer, on average.
      more: Further arguments.
    """

    source: str
    rank: int
    more: tuple[str, ...] = ()
    unit: Unit = "components"
    claim: str | None = None
    has_truth: bool = False
    without: frozenset[str] = frozenset()
    loss: Loss = cross_entropy
    in_points: bool = True
    apart: bool = True

    @property
    def name(self) -> str:
        return f"{self.source}@{self.rank}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `experiments.train` that it stands for."""
        return (
            *SOURCES[self.source],
            "delta=lora",
            f"delta.rank={self.rank}",
            # What holds room for ranks that move; who moves them, the arms say.
            "ranks=norm",
            f"ranks.max_rank={ROOM * self.rank}",
            "track=local",
            f"data.batching.buckets={_BUCKETS}",
            *self.more,
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        settings = _prepared(self.arguments)
        return {
            "trial": settings.settings.trial_id,
            "base": settings.base.fingerprint,
            "data": settings.problem.fingerprint,
        }

    def place(self, seed: int, settings: Settings) -> int:
        del seed, settings
        return 0

    def model(self, seed: int, settings: Settings) -> Adapted:
        del seed, settings
        return _prepared(self.arguments).adapted

    def inputs(self, batch: Mapping[str, Any]) -> Any:
        return inputs_of(batch)

    def batches(self, seeds: Sequence[int], settings: Settings) -> TrainBatches:
        own = _prepared(self.arguments).labeled
        batching = dataclasses.replace(own.batching, batch_size=settings.batch_size)
        return TrainPipeline(
            own.tokens["train"],
            own.task.splits["train"].labels,
            batching=batching,
            trial_seeds=seeds,
            num_steps=settings.steps,
        )

    def truth(self, seed: int, settings: Settings) -> None:
        del seed, settings

    def budget(self, seed: int, slots: Slots, settings: Settings) -> int:
        del seed, settings
        return self.rank * slots.num_layers

    def errors(
        self, fitted: Fit, seeds: Sequence[int], settings: Settings
    ) -> list[float]:
        """The share of rows that are labelled wrongly."""
        own = _prepared(self.arguments).labeled
        judged = all(seed >= JUDGED_SEED for seed in seeds)
        found = score_trials(
            lambda batch: fitted.forward(fitted.chosen, fitted.state.dials, batch),
            sample(own, "test" if judged else "validation", settings.test_rows),
            list(own.task.classes),
            progress=False,
        )
        wrong = lambda one: np.mean(one.logits.argmax(axis=1) != one.labels)
        return [float(wrong(one)) for one in found]


def sample(own: Labeled, split: str, count: int) -> list[Batch]:
    """So many rows of a split, the same for all that ask; all if it has fewer.

    They are drawn at random: rows of one class often stand together.
    """
    tokens, labels = own.tokens[split], own.task.splits[split].labels
    kept = np.sort(np.random.default_rng(0).permutation(len(tokens))[:count])
    rows = [tokens.row(int(number)) for number in kept]
    part = dataclasses.replace(
        tokens,
        ids=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )
    batching = dataclasses.replace(own.batching, batch_size=_ROWS)
    return list(eval_batches(part, labels[kept], batching))


@functools.lru_cache(maxsize=8)
def _prepared(arguments: tuple[str, ...]) -> Prepared:
    """The base and the data: every arm asks for the same ones again."""
    # Within a command, Hydra stands already and does not stand twice.
    stands = GlobalHydra.instance().is_initialized()
    here = initialize_config_dir(str(CONF), version_base="1.3") if not stands else None
    with here or contextlib.nullcontext():
        config = compose("config", [*arguments])
    return prepare(read(dict(resolve(config))))


def at(name: str) -> Real | None:
    """The task of a name such as "intents@4"; None if it is no such name."""
    source, sign, rank = name.partition("@")
    if not sign or source not in SOURCES or not rank.isdecimal() or int(rank) < 1:
        return None
    return Real(source, int(rank))
