"""A sweep, run: what is finished is skipped, the rest goes into packs.

    jobs -> trials -> (finished | refused | to do) -> packs -> outcomes

The same line may be given again at any time: finished trials return what they left,
packs that were begun go on with the trials they were begun with, and the rest is
planned as if it were new.
"""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank.core.errors import (
    BadInput,
    CannotWrite,
    Corrupt,
    LowrankError,
    OutOfMemory,
    Preempted,
)
from lowrank.io.files import Lock, probe
from lowrank.run.packs import Origin, Outcome, write_hydra
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
    reasons_alone,
)
from lowrank.sweeps.halving import Race, mark_cut, races
from lowrank.sweeps.look import Look
from lowrank.sweeps.plan import Packing, Planned
from lowrank.sweeps.width import share_of, width

logger = logging.getLogger(__name__)

#: The part of a sweep's directory that holds its packs.
PACKS = "packs"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
      trials: All of them, in the order of the jobs.
      known: Outcomes that are there already, by trial id: finished earlier, refused.
      packs: The others.
      alone: Why a trial has no company, by trial id.
      races: With halving, the trials that compete; `packs` are those to the next rung.
      forced: Ids of trials that start over.
    """

    trials: Sequence[Trial]
    known: Mapping[str, Outcome]
    packs: Sequence[Planned]
    alone: Mapping[str, str]
    races: Sequence[Race] = ()
    forced: frozenset[str] = frozenset()


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
      BadInput: Two jobs are one trial, a pack is wider than memory, or trials cannot
        be halved as `spec` says.
      Corrupt: The record of a pack that was begun, or of a rung, is damaged.
    """
    check_trials(trials)
    look = Look()
    known = {t.id: found for t in trials if (found := look(t)) is not None}
    compositions = Compositions(directory / PACKS)
    found = races(trials, directory, spec)
    for race in found:
        known = {**race.ended(), **known}
    ahead = [race for race in found if race.decisions]
    there = {trial.id for race in ahead for trial in race.trials}
    first = [trial for trial in trials if trial.id not in there]
    # A pack goes on with all its trials or not at all.
    sound = [t for t in first if t.id not in known or known[t.id].error is None]
    packs = [
        Planned(pack, [t for t in pack if t.id not in known], continued=True)
        for pack in compositions.begun(sound, look.forced)
    ]
    packs = [pack for pack in packs if pack.todo]
    placed = {trial.id for pack in packs for trial in pack.todo} | known.keys()
    fresh = [trial for trial in first if trial.id not in placed]
    for group in groups(fresh):
        most = width(group, spec, packing.memory)
        for pack in deal(group, most, share_of(group[0].settings)):
            packs.append(Planned(pack, pack))
    ends = {trial.id: race.until for race in found for trial in race.trials}
    packs = [
        dataclasses.replace(pack, until=ends.get(pack.trials[0].id)) for pack in packs
    ]
    for race in ahead:
        packs += race.packs(known, look.forced, compositions, spec, packing.memory)
    alone = reasons_alone(trials)
    return Plan(trials, known, packs, alone, found, frozenset(look.forced))


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
      trials that were run. Trials that wait for a rung, because another one of them
      has to be tried again, have none.

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
    for race in plan.races:
        _mark(race, outcomes)
    packs = _with_directories(plan, outcomes, board, packing)
    while _run_packs(packs, outcomes, compositions, packing, spec, board):
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


def _run_packs(
    packs: Sequence[Planned],
    outcomes: dict[str, Outcome],
    compositions: Compositions,
    packing: Packing,
    spec: SweepSpec,
    board: Board,
) -> bool:
    """Runs packs and takes their outcomes; whether all of them were run."""
    queue = collections.deque(packs)
    fits: dict[str, int] = {}
    while queue:
        if spec.on_failure == "stop" and any(o.error for o in outcomes.values()):
            for trial in (trial for pack in queue for trial in pack.todo):
                board.tell(trial, "not run", "on_failure=stop after a failed trial")
            return False
        pack = queue.popleft()
        todo = pack.todo
        if len(todo) > fits.get(todo[0].key, len(todo)):
            queue.extendleft(_halved(pack))
            continue
        origins = _origins(pack, compositions)
        there = pack.continued or 0 < pack.since <= compositions.reached(pack.trials)
        name, folder = compositions.begin(pack.trials, there)
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
                until=pack.until,
                origins=origins,
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
    return True


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
