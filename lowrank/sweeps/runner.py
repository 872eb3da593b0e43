"""A sweep, run: packs go to an engine, outcomes come back.

    packs -> engine -> outcomes

Which pack is next, what becomes of one that is too wide, refused or taken away, and
who is told, is decided here; how a pack reaches a processor is the engine's.
"""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import (
    BadInput,
    CannotWrite,
    Corrupt,
    LowrankError,
    OutOfMemory,
    Preempted,
)
from lowrank.io.files import Lock, probe
from lowrank.run.packs import Origin, Outcome
from lowrank.run.recording import write_hydra
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.board import Board
from lowrank.sweeps.compositions import Compositions, saved
from lowrank.sweeps.engine import Engine, Task
from lowrank.sweeps.group import Trial, half_of, halves
from lowrank.sweeps.halving import Race, mark_cut
from lowrank.sweeps.launch import PACKS, Plan
from lowrank.sweeps.plan import Packing, Planned
from lowrank.sweeps.width import share_of

logger = logging.getLogger(__name__)


def run_plan(
    plan: Plan, directory: Path, packing: Packing, spec: SweepSpec, engine: Engine
) -> dict[str, Outcome]:
    """Runs what a plan says.

    A pack that the device has no memory for is halved, and so are the later ones like
    it. One that is refused before its first checkpoint, because of one of its trials
    perhaps, is halved too, until the trial is found: the others are not lost.

    Args:
      plan: From `make_plan`.
      directory: The sweep's; locked meanwhile.
      packing: Runs packs.
      spec: `on_failure` says whether packs are run after a trial has failed.
      engine: Where packs run.

    Returns:
      Outcomes by trial id; after a failure and with `on_failure=stop`, those of the
      trials that were run. Trials that wait for a rung, because another one of them
      has to be tried again, have none.

    Raises:
      Preempted: The sweep was asked to stop, or a worker again and again; what was
        saved is kept.
      CannotWrite: The sweep's directory cannot be written, or another process is at it.
    """
    probe(directory)
    lock = Lock(directory)
    progress = plan.trials[0].settings.run.progress
    try:
        with Board(plan.trials, progress) as board:
            compositions = Compositions(directory / PACKS)
            return _run(plan, compositions, packing, spec, engine, board)
    finally:
        lock.release()


def _run(
    plan: Plan,
    compositions: Compositions,
    packing: Packing,
    spec: SweepSpec,
    engine: Engine,
    board: Board,
) -> dict[str, Outcome]:
    outcomes = dict(plan.known)
    for trial in plan.trials:
        if trial.id in outcomes:
            _show(board, trial, outcomes[trial.id], packing, "finished earlier: ")
        elif trial.id in plan.alone:
            logger.info("trial %s runs alone: %s", trial.id, plan.alone[trial.id])
    for race in plan.races:
        _mark(race, outcomes)
    packs = _with_directories(plan, outcomes, board, packing)
    runner = _Runner(compositions, packing, spec, engine, board, outcomes)
    while runner.run(packs):
        packs = []
        for race in plan.races:
            if race.decide(outcomes) is None:
                continue
            for trial in race.trials:
                if trial.id in outcomes and outcomes[trial.id].paused:
                    del outcomes[trial.id]
            for name, outcome in race.ended().items():
                outcomes.setdefault(name, outcome)
            for trial in _mark(race, outcomes):
                _show(board, trial, outcomes[trial.id], packing)
            packs += race.packs(outcomes, (), compositions, spec, packing.memory)
        if not packs:
            break
    return {name: one for name, one in outcomes.items() if not one.paused}


def _mark(race: Race, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """Says in records that their trials were cut; returns those of the last rung."""
    last = {name for name, _ in race.decisions[-1].order} if race.decisions else set()
    found = []
    for trial in race.trials:
        outcome = outcomes.get(trial.id)
        if outcome is not None and outcome.cut:
            mark_cut(trial, outcome.cut)
            if trial.id in last:
                found.append(trial)
    return found


@dataclasses.dataclass
class _Runner:
    """Packs that wait, packs that run, and what became of the others."""

    compositions: Compositions
    packing: Packing
    spec: SweepSpec
    engine: Engine
    board: Board
    outcomes: dict[str, Outcome]
    queue: collections.deque[Planned] = dataclasses.field(
        default_factory=collections.deque
    )
    running: dict[Any, tuple[Planned, str, Path]] = dataclasses.field(
        default_factory=dict
    )
    #: Of a static key, the widest pack that memory holds, once one was too wide.
    fits: dict[str, int] = dataclasses.field(default_factory=dict)
    #: By pack, how many times it was taken away from a worker.
    stops: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def run(self, packs: Sequence[Planned]) -> bool:
        """Runs packs and takes their outcomes; whether all of them were run."""
        self.queue.extend(packs)
        try:
            while self.queue or self.running:
                while self.queue and self._has_room() and not self._halted():
                    self._begin(self.queue.popleft())
                if not self.running:
                    break
                handle = self.engine.wait(self.running)
                pack, name, folder = self.running.pop(handle)
                try:
                    self._end(pack, self.engine.outcomes(handle))
                except Preempted as error:
                    self._stopped(pack, name, error)
                except Exception as error:
                    self._failed(pack, name, folder, error)
        except BaseException as error:
            if self.running:
                logger.warning("stopping %d packs that run", len(self.running))
                self.engine.stop(self.running)
            if isinstance(error, Preempted | KeyboardInterrupt):
                for pack, _, _ in self.running.values():
                    self._tell_stopped(pack)
            raise
        for trial in (trial for pack in self.queue for trial in pack.todo):
            self.board.tell(trial, "not run", "on_failure=stop after a failed trial")
        return not self.queue

    def _has_room(self) -> bool:
        return self.engine.room is None or len(self.running) < self.engine.room

    def _halted(self) -> bool:
        failed = any(outcome.error for outcome in self.outcomes.values())
        return failed and self.spec.on_failure == "stop"

    def _begin(self, pack: Planned) -> None:
        todo = pack.todo
        if len(todo) > self.fits.get(todo[0].key, len(todo)):
            self.queue.extendleft(_halved(pack))
            return
        origins = _origins(pack, self.compositions)
        reached = self.compositions.reached(pack.trials)
        there = pack.continued or 0 < pack.since <= reached
        name, folder = self.compositions.begin(pack.trials, there)
        for trial in todo:
            self.board.tell(trial, "running", pack=name)
        logger.info(
            "%s pack %s of %d, %d left",
            "continuing" if pack.continued else "running",
            name,
            len(todo),
            len(self.queue),
        )
        task = Task(
            self.packing.run,
            [trial.settings for trial in pack.trials],
            [trial.overrides for trial in pack.trials],
            folder,
            pack.until,
            tuple(origins),
        )
        self.running[self.engine.submit(task)] = (pack, name, folder)

    def _end(self, pack: Planned, found: Sequence[Outcome]) -> None:
        # Those that were finished before return what they left; they are told already.
        ours = dict(zip([trial.id for trial in pack.trials], found, strict=True))
        left = [ours[trial.id] for trial in pack.todo]
        _take(left, pack.todo, self.outcomes, self.board, self.packing)

    def _stopped(self, pack: Planned, name: str, error: Preempted) -> None:
        """A pack whose worker was taken away goes on; one stopped here does not."""
        if self.engine.here:
            self._tell_stopped(pack)
            raise error
        self.stops[name] += 1
        if self.stops[name] > self.spec.retries:
            self._tell_stopped(pack)
            raise error
        logger.warning("pack %s lost its worker, and goes on: %s", name, error)
        self.queue.append(dataclasses.replace(pack, continued=True))

    def _tell_stopped(self, pack: Planned) -> None:
        for trial in pack.todo:
            self.board.tell(trial, "stopped", "saved; the same line continues")

    def _failed(self, pack: Planned, name: str, folder: Path, error: Exception) -> None:
        todo = pack.todo
        if _divisible(todo) and isinstance(error, OutOfMemory):
            self.fits[todo[0].key] = half_of(len(todo), share_of(todo[0].settings))
            logger.warning("%s; packs like it are halved", error)
        elif len(todo) > 1 and _refused(error) and not saved(folder):
            logger.warning("pack %s is refused, and halved: %s", name, error)
        else:
            if not isinstance(error, LowrankError):
                logger.error("pack %s ended by a bug", name, exc_info=error)
            found = [Outcome(None, error)] * len(todo)
            _take(found, todo, self.outcomes, self.board, self.packing)
            return
        self.queue.extendleft(_halved(pack))


def _origins(pack: Planned, compositions: Compositions) -> Sequence[Origin]:
    """Where the trials of a pack are that have passed a rung in other packs."""
    if pack.continued or not pack.since:
        return ()
    found = compositions.origins(pack.trials, pack.since)
    if found is None:
        logger.warning(
            "pack %s trains from the start: no pack has a checkpoint of all its trials "
            "at step %d any more",
            pack.id,
            pack.since,
        )
    return found or ()


def _take(
    found: Sequence[Outcome],
    todo: Sequence[Trial],
    outcomes: dict[str, Outcome],
    board: Board,
    packing: Packing,
) -> None:
    for trial, outcome in zip(todo, found, strict=True):
        told = (outcome.result, outcome.error, outcome.paused, outcome.cut)
        assert sum(one is not None for one in told) == 1, trial.id
        outcomes[trial.id] = outcome
        _show(board, trial, outcome, packing)


def _refused(error: Exception) -> bool:
    """Whether an error may be one trial's own, found before anything is compiled."""
    return isinstance(error, BadInput | Corrupt | CannotWrite)


def _divisible(trials: Sequence[Trial]) -> bool:
    """Whether some device has more than one of these trials, when they are a pack."""
    return len(trials) > trials[0].settings.mesh.share(len(trials))


def _halved(pack: Planned) -> list[Planned]:
    """In reverse, for the left end of a queue."""
    parts = halves(pack.todo, share_of(pack.todo[0].settings))
    return [
        dataclasses.replace(pack, trials=half, todo=half, continued=False)
        for half in reversed(parts)
    ]


def _with_directories(
    plan: Plan, outcomes: dict[str, Outcome], board: Board, packing: Packing
) -> list[Planned]:
    """Makes every trial's directory, so that a crash leaves evidence of what was meant.

    A trial whose directory cannot be written, or is being written by another process,
    has failed; the others of its pack are run, together, unless the pack was begun:
    then they wait for it.
    """
    packs = []
    for pack in plan.packs:
        for trial in pack.todo:
            try:
                probe(trial.directory)
                lock = Lock(trial.directory)
                try:
                    settings = trial.settings
                    write_hydra(trial.directory, settings.config, trial.overrides)
                finally:
                    lock.release()
            except CannotWrite as error:
                _take([Outcome(None, error)], [trial], outcomes, board, packing)
        todo = [trial for trial in pack.todo if trial.id not in outcomes]
        if len(todo) < len(pack.todo) and not pack.continued:
            pack = dataclasses.replace(pack, trials=todo)
        if todo:
            packs.append(dataclasses.replace(pack, todo=todo))
    return packs


def _show(
    board: Board, trial: Trial, outcome: Outcome, packing: Packing, first: str = ""
) -> None:
    if outcome.cut:
        board.tell(trial, "cut", outcome.cut.removeprefix("cut "))
    elif outcome.paused:
        board.tell(trial, "waiting", f"saved at step {outcome.paused}")
    elif outcome.result is None:
        error = outcome.error
        board.tell(trial, "failed", f"{type(error).__name__}: {error}")
    else:
        value = packing.value(outcome.result)
        told = f"{value:.4g}" if isinstance(value, int | float) else str(value)
        board.tell(trial, "done", f"{first}{told}")
