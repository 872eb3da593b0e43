"""Tunes every arm alike, judges it on fresh seeds, and keeps what is finished.

For each task, the arms that need nothing first, then those that take ranks of others:

    tune    every rate of the grid x every tuning seed; the rate with the smallest mean
            log error is the arm's; a grid of one needs no tuning
    judge   that rate x every judged seed

Trials that may share a program and a base are one pack. A pack's results are files; the
same command takes those that are whole and trains the others. Packs are made of the
protocol alone and never of what is missing, so a study that was killed ends with the
numbers of one that was not.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ranks_protocol import arms as all_arms
from experiments.ranks_protocol.arms import ARMS, Place
from experiments.ranks_protocol.settings import Protocol
from experiments.ranks_protocol.tasks import Task, chosen
from experiments.ranks_protocol.training import (
    SCHEMA,
    Record,
    Trial,
    code,
    failed,
    slots_for,
    train,
)
from lowrank.allocate.adaptive import Allocator
from lowrank.allocate.fixed import Shuffled
from lowrank.core.errors import BadInput, Corrupt, NonFinite
from lowrank.core.spec import digest
from lowrank.io.files import (
    Lock,
    local_path,
    probe,
    read_json,
    remove_unfinished,
    write_json_atomically,
)
from lowrank.sweeps.engine import compiled_once

#: How long a pack took, in its folder.
SECONDS = "seconds.json"
#: Told (task, arm or phase, trial-steps done).
Tick = Callable[[str, int], None]


def work(protocol: Protocol) -> int:
    """Steps of all trainings of the study."""
    total = 0
    for part in protocol.parts:
        grid = len(part.rates) if len(part.rates) > 1 else 0
        each = grid * part.tuning_seeds + part.seeds
        arms = sum(len(_own(task, part)) for task in chosen(part.tasks))
        total += arms * each * part.steps
    return total


def check(protocol: Protocol) -> None:
    """Finds what would fail later: names, budgets, bounds and windows of every arm.

    Raises:
      BadInput: Says what does not go together.
    """
    for part in protocol.parts:
        all_arms.check(part)
        for task in chosen(part.tasks):
            for seed in (*part.tuned, *part.judged):
                slots = slots_for(task.model(seed, part))
                for arm in _own(task, part):
                    if not ARMS[arm].needs:
                        made = _allocator(task, arm, seed, part, None)
                        made.on(slots, part.steps)


def run(protocol: Protocol, tick: Tick = lambda text, steps: None) -> dict[str, Any]:
    """The whole study: task -> {"in_points", "grid", "rates", "judged", "tuned",
    "seconds"}; "judged" and "tuned" are records by arm, "seconds" is how long their
    packs took, whenever they were trained.

    Args:
      protocol: What to do.
      tick: Told of progress.

    Raises:
      LowrankError: See `check` and `run.fit.fit`; `CannotWrite` if another process
        works in the same folder.
    """
    check(protocol)
    folder = local_path(protocol.records)
    probe(folder)
    with contextlib.ExitStack() as held:
        held.callback(Lock(folder).release)
        remove_unfinished(folder)
        # What is judged runs the programs that were tuned.
        held.enter_context(compiled_once(folder / "compiled"))
        return {
            task.name: _compare(task, part, folder / task.name, tick)
            for part in protocol.parts
            for task in chosen(part.tasks)
        }


def _own(task: Task, protocol: Protocol) -> list[str]:
    """The arms that say something about a task."""
    knows = lambda name: not ARMS[name].knows or task.has_truth
    return [one for one in protocol.arms if one not in task.without and knows(one)]


def _compare(
    task: Task, protocol: Protocol, folder: Path, tick: Tick
) -> dict[str, Any]:
    own = _own(task, protocol)
    rates: dict[str, float] = {}
    tuned: dict[str, list[Record]] = {}
    judged: dict[str, list[Record]] = {}
    spent: list[float] = []
    for stage in (
        [one for one in own if not ARMS[one].needs],
        [one for one in own if ARMS[one].needs],
    ):
        every = {arm: list(protocol.rates) for arm in stage}
        if len(protocol.rates) > 1:
            wanted = _trials(task, every, protocol.tuned, protocol, tuned, rates)
            tuned |= _trained(task, wanted, protocol, folder, tick, spent, "tuning")
            rates |= {
                arm: best_rate(tuned[arm], protocol.rates, task.in_points)
                if able(tuned[arm])
                else min(protocol.rates)
                for arm in stage
            }
        else:
            rates |= dict.fromkeys(stage, protocol.rates[0])
        once = {arm: [rates[arm]] for arm in stage}
        wanted = _trials(task, once, protocol.judged, protocol, judged, rates)
        judged |= _trained(task, wanted, protocol, folder, tick, spent, "judging")
    return {
        "in_points": task.in_points,
        "grid": list(protocol.rates),
        "rates": {arm: rates[arm] for arm in own},
        "judged": {arm: judged[arm] for arm in own},
        "tuned": {arm: tuned[arm] for arm in own if arm in tuned},
        "seconds": sum(spent),
    }


def able(records: Sequence[Record]) -> bool:
    """Whether an arm has anything to choose a rate by.

    One that takes ranks of another may have none with another order, in any tuning
    seed; its judged seeds say so.
    """
    needs = any(ARMS[one["arm"]].needs for one in records)
    return not needs or any(one["error"] is not None for one in records)


def best_rate(
    records: Sequence[Record], rates: Sequence[float], in_points: bool = False
) -> float:
    """The rate with the smallest mean log error over the tuning seeds.

    In points, with the smallest mean error.

    A rate at which a seed failed is the last choice; of equal ones the smaller wins. A
    seed that failed at every rate says nothing of them.

    Raises:
      NonFinite: No rate has an error for any seed.
    """
    means = {}
    telling = {one["seed"] for one in records if one["error"] is not None}
    records = [one for one in records if one["seed"] in telling] or records
    for rate in sorted(rates):
        own = [one["error"] for one in records if one["rate"] == rate]
        whole = own and all(error is not None for error in own)
        mean = lambda errors: np.mean(errors if in_points else np.log(errors))
        means[rate] = float(mean(own)) if whole else math.inf
    best = min(means, key=means.__getitem__)
    if means[best] == math.inf:
        arm = records[0]["arm"] if records else "an arm"
        raise NonFinite(
            f"{arm} has no learning rate of {list(rates)} at which all tuning seeds "
            "were trained; give smaller rates"
        )
    return best


def _trials(
    task: Task,
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    protocol: Protocol,
    records: Mapping[str, Sequence[Record]],
    best: Mapping[str, float],
) -> list[Trial]:
    """Every arm x rate x seed; arms that take ranks take those of the same seed.

    Where those failed there is nothing to take, and the trial has no allocator.
    """
    found = []
    for arm, own in rates.items():
        needs = ARMS[arm].needs
        for seed in seeds:
            ranks = None
            if needs is not None:
                ranks = _ranks(records[needs], seed, best[needs])
            for rate in own:
                made = None
                if needs is None or ranks is not None:
                    made = _allocator(task, arm, seed, protocol, ranks)
                found.append(Trial(arm, seed, rate, made))
    return found


def _ranks(
    records: Sequence[Record], seed: int, rate: float
) -> Mapping[str, int] | None:
    """The ranks that an arm ended with; None if it failed."""
    for one in records:
        if (one["seed"], one["rate"]) == (seed, rate):
            return one["ranks"]
    return None


def _allocator(
    task: Task,
    arm: str,
    seed: int,
    protocol: Protocol,
    ranks: Mapping[str, int] | None,
) -> Allocator:
    slots = slots_for(task.model(seed, protocol))
    knows = task.truth(seed, protocol) if ARMS[arm].knows else None
    budget = task.budget(seed, slots, protocol)
    place = Place(slots, budget, task.unit, knows, ranks, seed)
    return ARMS[arm].allocator(place, protocol)


def _trained(
    task: Task,
    trials: Sequence[Trial],
    protocol: Protocol,
    folder: Path,
    tick: Tick,
    spent: list[float],
    phase: str,
) -> dict[str, list[Record]]:
    """The records of trials by arm, pack by pack."""
    found: dict[str, list[Record]] = {trial.arm: [] for trial in trials}
    able = []
    for trial in trials:
        if why := _impossible(task, trial, protocol):
            found[trial.arm].append(failed(task, trial, why))
            tick(f"{task.name}: {phase}", protocol.steps)
        else:
            able.append(trial)
    for pack in packs(task, able, protocol):
        names = ", ".join(dict.fromkeys(trial.arm for trial in pack))
        own = lambda steps, text=f"{task.name}: {phase} {names}": tick(text, steps)
        records, seconds = _stored(task, pack, protocol, folder, own)
        spent.append(seconds)
        for record in records:
            found[record["arm"]].append(record)
    return found


def packs(
    task: Task, trials: Sequence[Trial], protocol: Protocol
) -> Iterator[list[Trial]]:
    """Trials that share a program and a base, in the order of the first of each."""
    groups: dict[Any, list[Trial]] = {}
    for trial in trials:
        place = task.place(trial.seed, protocol)
        alone = trial.arm if task.apart else None
        key = all_arms.program(trial.choice), place, alone
        groups.setdefault(key, []).append(trial)
    yield from groups.values()


def _impossible(task: Task, trial: Trial, protocol: Protocol) -> str | None:
    """Why a trial cannot be: ranks that are all alike have no other order, and those
    of a trial that failed are none."""
    if trial.allocator is None:
        return f"{ARMS[trial.arm].needs}, whose ranks it takes, failed with this seed"
    if not isinstance(trial.allocator, Shuffled):
        return None
    try:
        trial.allocator.on(slots_for(task.model(trial.seed, protocol)), protocol.steps)
    except BadInput as error:
        return str(error)
    return None


def _stored(
    task: Task,
    pack: Sequence[Trial],
    protocol: Protocol,
    folder: Path,
    tick: Callable[[int], None],
) -> tuple[list[Record], float]:
    """A pack's records, those on disk if they are whole, else of a new training; and
    the seconds that it took, which are beside them: records of two runs are equal."""
    identity = {
        "schema": SCHEMA,
        "code": code(),
        "task": task.identity,
        "training": protocol.training,
        "trials": [[t.arm, t.seed, t.rate, digest(t.choice)] for t in pack],
    }
    own = folder / digest(identity, 12)
    files = [own / trial.file for trial in pack]
    clock = own / SECONDS
    with contextlib.suppress(Corrupt):
        found = [read_json(file) for file in files], read_json(clock)["seconds"]
        tick(protocol.steps * len(pack))
        return found
    began = time.perf_counter()
    records = train(task, pack, protocol, tick)
    for file, record in zip(files, records, strict=True):
        write_json_atomically(file, record)
    seconds = time.perf_counter() - began
    write_json_atomically(clock, {"seconds": seconds})
    # As they will be read: numbers that JSON holds.
    return [read_json(file) for file in files], seconds
