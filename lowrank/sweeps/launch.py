"""A sweep, run: what is finished is skipped, the rest goes into packs.

    jobs -> trials -> (finished | refused | to do) -> packs -> outcomes

The same line may be given again at any time: finished trials return what they left,
packs that were begun go on with the trials they were begun with, and the rest is
planned as if it were new.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lowrank.core.errors import (
    BadInput,
    CannotWrite,
    Corrupt,
    LowrankError,
    OutOfMemory,
    Preempted,
)
from lowrank.core.spec import digest
from lowrank.io.files import LOCK_NAME, Lock, probe
from lowrank.io.record import Record, stored_result
from lowrank.run.packs import Outcome, write_hydra
from lowrank.run.prepare import identity_of, load_base
from lowrank.run.settings import Settings
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.board import Board
from lowrank.sweeps.compositions import Compositions, saved
from lowrank.sweeps.group import (
    Trial,
    check_trials,
    deal,
    groups,
    half_of,
    halves,
    pack_id,
    reasons_alone,
)
from lowrank.sweeps.width import Memory, share_of, width

logger = logging.getLogger(__name__)

#: The part of a sweep's directory that holds its packs.
PACKS = "packs"


@runtime_checkable
class RunPack(Protocol):
    """See `run.packs.run_pack`."""

    def __call__(
        self,
        settings: Sequence[Settings],
        overrides: Sequence[Sequence[str]],
        *,
        folder: Path,
    ) -> list[Outcome]: ...


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a command runs many jobs together; `run.door.command` hands it on.

    Attributes:
      run: Trains trials of one static key as one pack.
      memory: Bytes that a pack needs, by width.
      value: What a job returns to the sweeper, from a trial's result.
    """

    run: RunPack
    memory: Memory
    value: Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A pack to run.

    Attributes:
      trials: Its composition, in order.
      todo: Those of them that are not finished, in the same order.
      continued: Whether it was begun earlier.
    """

    trials: Sequence[Trial]
    todo: Sequence[Trial]
    continued: bool = False

    @property
    def id(self) -> str:
        """Of the composition."""
        return pack_id(self.trials)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
      trials: All of them, in the order of the jobs.
      known: Outcomes that are there already, by trial id: finished earlier, refused.
      packs: The others.
      alone: Why a trial has no company, by trial id.
    """

    trials: Sequence[Trial]
    known: Mapping[str, Outcome]
    packs: Sequence[Planned]
    alone: Mapping[str, str]


def make_plan(
    trials: Sequence[Trial], directory: Path, packing: Packing, spec: SweepSpec
) -> Plan:
    """Decides what is run, and with whom; writes nothing but caches.

    Args:
      trials: One per job.
      directory: The sweep's.
      packing: Says how much memory packs need.
      spec: May set the width and the memory.

    Raises:
      BadInput: Two jobs are one trial, or a pack is wider than memory.
      Corrupt: The record of a pack that was begun is damaged.
    """
    check_trials(trials)
    look = _Look()
    known = {t.id: found for t in trials if (found := look(t)) is not None}
    # A pack goes on with all its trials or not at all.
    sound = [t for t in trials if t.id not in known or known[t.id].error is None]
    packs = [
        Planned(pack, [t for t in pack if t.id not in known], continued=True)
        for pack in Compositions(directory / PACKS).begun(sound, look.forced)
    ]
    packs = [pack for pack in packs if pack.todo]
    placed = {trial.id for pack in packs for trial in pack.todo} | known.keys()
    fresh = [trial for trial in trials if trial.id not in placed]
    for group in groups(fresh):
        most = width(group, spec, packing.memory)
        for pack in deal(group, most, share_of(group[0].settings)):
            packs.append(Planned(pack, pack))
    return Plan(trials, known, packs, reasons_alone(trials))


class _Look:
    """Sees what a trial's directory holds; loads base and data only if it must.

    Trials of a sweep mostly share them, so their fingerprints are taken once.

    Attributes:
      forced: Ids of trials that start over, because run.force=true.
    """

    def __init__(self) -> None:
        self.forced: set[str] = set()
        self._identities: dict[str, Mapping[str, str]] = {}

    def __call__(self, trial: Trial) -> Outcome | None:
        """The outcome that is there already; None if the trial is to be run.

        A directory that holds something else is an outcome, too, an error; with
        run.force=true it is left to `Record.open`, which moves the content aside.
        """
        directory, settings = trial.directory, trial.settings
        # What a sweep writes before it runs says nothing of what became of the trial.
        written = set(directory.iterdir()) if directory.is_dir() else set()
        if not written - {directory / ".hydra", directory / LOCK_NAME}:
            return None
        try:
            facts = {"config": settings.config, "identity": self._identity(settings)}
            result = stored_result(directory, **facts)
            if result is None:
                return None
            # Killed between its result and its status, it still says "running".
            with Record.open(directory, **facts):
                return Outcome(result, None)
        except (Corrupt, CannotWrite) as error:
            if not settings.run.force:
                return Outcome(None, error)
            self.forced.add(trial.id)
            return None

    def _identity(self, settings: Settings) -> Mapping[str, str]:
        parts = [settings.config[name] for name in ("base", "data")]
        key = digest([*parts, settings.run.cache])
        if key not in self._identities:
            cache = settings.run.cache
            task = settings.data.load(Path(cache) / "data" if cache else None)
            base = load_base(settings, len(task.classes))
            self._identities[key] = identity_of(settings, base, task)
        return {**self._identities[key], "config": settings.trial_id}


def run_plan(
    plan: Plan, directory: Path, packing: Packing, spec: SweepSpec
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

    Returns:
      Outcomes by trial id; after a failure and with `on_failure=stop`, those of the
      trials that were run.

    Raises:
      Preempted: A pack was asked to stop; what was saved is kept.
      CannotWrite: The sweep's directory cannot be written, or another process is at it.
    """
    probe(directory)
    lock = Lock(directory)
    progress = plan.trials[0].settings.run.progress
    try:
        with Board(plan.trials, progress) as board:
            return _run(plan, Compositions(directory / PACKS), packing, spec, board)
    finally:
        lock.release()


def _run(
    plan: Plan,
    compositions: Compositions,
    packing: Packing,
    spec: SweepSpec,
    board: Board,
) -> dict[str, Outcome]:
    outcomes = dict(plan.known)
    for trial in plan.trials:
        if trial.id in outcomes:
            _show(board, trial, outcomes[trial.id], packing, "finished earlier: ")
        elif trial.id in plan.alone:
            logger.info("trial %s runs alone: %s", trial.id, plan.alone[trial.id])
    queue = collections.deque(_with_directories(plan, outcomes, board, packing))
    fits: dict[str, int] = {}
    while queue:
        if spec.on_failure == "stop" and any(o.error for o in outcomes.values()):
            for trial in (trial for pack in queue for trial in pack.todo):
                board.tell(trial, "not run", "on_failure=stop after a failed trial")
            break
        pack = queue.popleft()
        todo = pack.todo
        if len(todo) > fits.get(todo[0].key, len(todo)):
            queue.extendleft(_halved(pack))
            continue
        name, folder = compositions.begin(pack.trials, pack.continued)
        for trial in todo:
            board.tell(trial, "running", pack=name)
        logger.info(
            "%s pack %s of %d, %d left",
            "continuing" if pack.continued else "running",
            name,
            len(todo),
            len(queue),
        )
        try:
            found = packing.run(
                [_ready(trial.settings, len(pack.trials)) for trial in pack.trials],
                [trial.overrides for trial in pack.trials],
                folder=folder,
            )
        except Preempted:
            for trial in todo:
                board.tell(trial, "stopped", "saved; the same line continues")
            raise
        except Exception as error:
            if _divisible(todo) and isinstance(error, OutOfMemory):
                share = share_of(todo[0].settings)
                fits[todo[0].key] = half_of(len(todo), share)
                logger.warning("%s; packs like it are halved", error)
            elif len(todo) > 1 and _refused(error) and not saved(folder):
                logger.warning("pack %s is refused, and halved: %s", name, error)
            else:
                if not isinstance(error, LowrankError):
                    logger.exception("pack %s ended by a bug", name)
                found = [Outcome(None, error)] * len(todo)
                _take(found, todo, outcomes, board, packing)
                continue
            queue.extendleft(_halved(pack))
            continue
        # Those that were finished before return what they left; they are told already.
        ours = dict(zip([trial.id for trial in pack.trials], found, strict=True))
        left = [ours[trial.id] for trial in todo]
        _take(left, todo, outcomes, board, packing)
    return outcomes


def _take(
    found: Sequence[Outcome],
    todo: Sequence[Trial],
    outcomes: dict[str, Outcome],
    board: Board,
    packing: Packing,
) -> None:
    for trial, outcome in zip(todo, found, strict=True):
        assert (outcome.result is None) != (outcome.error is None), trial.id
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
    return [Planned(part, part) for part in reversed(parts)]


def _ready(settings: Settings, num_trials: int) -> Settings:
    """For a pack of so many, and without a progress bar.

    A bar would draw over the lines of the trials. A pack that does not come out even on
    the trial axis gets fewer devices, not fewer trials.
    """
    run = dataclasses.replace(settings.run, progress=False)
    mesh = settings.mesh.for_trials(num_trials)
    return dataclasses.replace(settings, run=run, mesh=mesh)


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
            pack = Planned(todo, todo)
        if todo:
            packs.append(dataclasses.replace(pack, todo=todo))
    return packs


def _show(
    board: Board, trial: Trial, outcome: Outcome, packing: Packing, first: str = ""
) -> None:
    if outcome.result is None:
        error = outcome.error
        board.tell(trial, "failed", f"{type(error).__name__}: {error}")
    else:
        value = packing.value(outcome.result)
        told = f"{value:.4g}" if isinstance(value, int | float) else str(value)
        board.tell(trial, "done", f"{first}{told}")
