"""Trains one pack of a protocol's trials, and writes down what became of each."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.ranks_protocol import measures
from experiments.ranks_protocol.settings import Protocol
from experiments.ranks_protocol.tasks import Task
from lowrank.allocate.adaptive import Allocator
from lowrank.core.errors import NonFinite
from lowrank.core.spec import digest
from lowrank.run.fit import Fit, fit
from lowrank.run.prepare import code_fingerprint
from lowrank.run.ranks import final, slots_of
from lowrank.train.guard import NonFinitePolicy
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import AdamW

#: Version of what a training does and of what its record says.
SCHEMA = 1
Record = dict[str, Any]
#: How often a training tells how far it is.
_TICKS = 20
# Models are asked for again and again, and so is what competes in them.
slots_for = functools.lru_cache(maxsize=32)(slots_of)


@functools.cache
def code() -> str:
    """sha256 over the sources of the package and of the protocol: records made by other
    code are not taken for this one's."""
    own = code_fingerprint(), code_fingerprint(Path(__file__).parent)
    return digest(list(own))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
      arm, seed, rate: Its place in the protocol.
      allocator: How its ranks are chosen; None if that is not known.
    """

    arm: str
    seed: int
    rate: float
    allocator: Allocator | None

    @property
    def choice(self) -> Allocator:
        """How its ranks are chosen, where that is known."""
        assert self.allocator is not None, "the study leaves such trials out"
        return self.allocator

    @property
    def file(self) -> str:
        """Name of its record, within its pack."""
        return f"{self.arm}-seed{self.seed}-lr{self.rate:g}.json"


def train(
    task: Task,
    pack: Sequence[Trial],
    protocol: Protocol,
    tick: Callable[[int], None] = lambda steps: None,
) -> list[Record]:
    """Trains a pack and says what became of every trial."""
    seeds = [trial.seed for trial in pack]
    adapted = task.model(seeds[0], protocol)
    every = max(protocol.steps // _TICKS, 1)
    done = 0

    def log(position: int, rows: object) -> None:
        nonlocal done
        del rows
        tick((position - done) * len(pack))
        done = position

    constant = {"schedule": "cosine", "warmup": 0.0, "clip": None}
    try:
        fitted = fit(
            adapted,
            task.batches(seeds, protocol),
            loss=task.loss,
            optim=[AdamW(lr=trial.rate, **constant) for trial in pack],
            ranks=[trial.choice for trial in pack],
            seeds=seeds,
            loop=LoopSpec(log_every=every, checkpoint_every=protocol.steps),
            non_finite=NonFinitePolicy(action="halt"),
            inputs=task.inputs,
            log=log,
            progress=False,
        )
    except NonFinite as error:
        tick((protocol.steps - done) * len(pack))
        return [failed(task, trial, str(error)) for trial in pack]
    tick((protocol.steps - done) * len(pack))
    errors = task.errors(fitted, seeds, protocol)
    return [
        _record(task, trial, number, fitted, errors[number], protocol)
        for number, trial in enumerate(pack)
    ]


def _record(
    task: Task,
    trial: Trial,
    number: int,
    fitted: Fit,
    error: float,
    protocol: Protocol,
) -> Record:
    ended = fitted.ended[number]
    if ended is not None or not math.isfinite(error):
        return failed(task, trial, ended["why"] if ended else "its error is infinite")
    adapted = fitted.adapted
    slots = slots_for(adapted)
    ranks = final(adapted, fitted.dials(number))
    steps = measures.trajectory(fitted, number, slots, protocol.steps)
    truth = task.truth(trial.seed, protocol)
    judged = {"misallocation": None, "rank_correlation": None}
    if truth is not None:
        price = measures.price(slots, task.unit)
        judged = {
            "misallocation": measures.misallocation(ranks, truth, price),
            "rank_correlation": measures.rank_correlation(ranks, truth),
        }
    spent = measures.budgets(steps, adapted, trial.choice, protocol.batch_size)
    return {
        **_base(task, trial),
        "error": error,
        "failed": None,
        "ranks": ranks,
        "truth": truth,
        **judged,
        "budgets": measures.told(spent),
    }


def _base(task: Task, trial: Trial) -> Record:
    return {
        "schema": SCHEMA,
        "task": task.name,
        "arm": trial.arm,
        "seed": trial.seed,
        "rate": trial.rate,
    }


def failed(task: Task, trial: Trial, why: str) -> Record:
    """The record of a trial without a result."""
    names = ("error", "ranks", "truth", "misallocation", "rank_correlation", "budgets")
    return {**_base(task, trial), **dict.fromkeys(names), "failed": why}
