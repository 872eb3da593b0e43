"""Successive halving across packs: who trains to which rung, and who goes on from it.

    packs to a rung -> all of them are there -> a sealed decision -> narrower packs ...

All trials of the sweep that could share a pack compete, whichever packs they are in: a
race. The decision is on disk before a trial is told to be cut or a state is taken out
of a pack, so a sweep that is killed at any moment goes on as it would have.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from lowrank.core import errors
from lowrank.core.errors import BadInput, Corrupt, LowrankError, NonFinite
from lowrank.io.files import Lock, now
from lowrank.io.record import STATUS, read_status
from lowrank.io.seals import write_sealed
from lowrank.io.view import load_record
from lowrank.report.arms import numbers
from lowrank.run.packs import Outcome
from lowrank.run.prepare import prepare
from lowrank.run.sweep import Halving, SweepSpec
from lowrank.sweeps.compositions import Compositions
from lowrank.sweeps.group import Trial, deal, groups
from lowrank.sweeps.load import LOWER_IS_BETTER
from lowrank.sweeps.plan import Planned
from lowrank.sweeps.rungs import (
    Contest,
    Decision,
    Rung,
    decided,
    ladder,
    ranked,
    store,
)
from lowrank.sweeps.width import Memory, share_of, width

logger = logging.getLogger(__name__)

#: A trial's own failures: it would fail again. Others are tried again before a rung is
#: decided, for a full disk says nothing of a learning rate.
_OWN = (NonFinite, BadInput)


def earliest(trials: Sequence[Trial], rule: Halving, num_steps: int) -> int:
    """No trial may be cut before this step.

    A trial whose ranks still move is not yet the trial that it will be, and has no
    best state either: the last ranks of all have trained for a step by then.
    """
    settled = [trial.settings.ranks.settled(num_steps) for trial in trials]
    return max([rule.min_steps, *settled], default=0) if trials else 0


class Race:
    """Trials of one static key on their way through the rungs.

    Attributes:
      trials: That compete, those included that have failed.
      contest: The rungs, and what decides.
      num_steps: Of the whole training.
      decisions: Those that hold, the earliest first.
    """

    def __init__(self, trials: Sequence[Trial], rule: Halving, directory: Path):
        """Loads the data to learn how long training is, and what was decided.

        Raises:
          BadInput: The trials cannot be compared on the way.
          Corrupt: The sweep was halved by another rule, or a decision is damaged.
        """
        self.trials = trials
        self._directory = directory
        settings = trials[0].settings
        metric = rule.metric or settings.loop.select
        prepared = prepare(settings)
        if "validation" not in prepared.problem.rows:
            raise BadInput(
                "sweep.halving compares trials by a validation number, and "
                f"{prepared.problem.name} has no validation split: give one, or "
                "sweep=default"
            )
        validation = prepared.evaluation("validation")
        prepared.problem.judge.check("sweep.halving.metric", metric, validation)
        if settings.non_finite.action == "rollback":
            raise BadInput(
                "sweep.halving joins trials of several packs, and with "
                "non_finite.action=rollback the packs fall apart in their steps: set "
                "halt or skip, or sweep=default"
            )
        self.num_steps = prepared.batches.num_steps
        every = settings.loop.evaluate_every or prepared.batches.steps_per_epoch
        least = earliest(trials, rule, self.num_steps)
        rungs = ladder(rule, len(trials), self.num_steps, every, least)
        ids = tuple(sorted(trial.id for trial in trials))
        self.every = every
        self.contest = Contest(ids, rule, tuple(rungs), metric)
        self.decisions = decided(directory, self.contest)

    @property
    def since(self) -> int:
        """The step of the last rung that is decided; 0 before the first."""
        return self.decisions[-1].step if self.decisions else 0

    @property
    def next(self) -> Rung | None:
        """The rung ahead; None if the rest trains to the end."""
        rungs = self.contest.rungs[len(self.decisions) :]
        return rungs[0] if rungs else None

    @property
    def until(self) -> int | None:
        """Where to pause."""
        return self.next and self.next.step

    @property
    def running(self) -> list[Trial]:
        """Trials that no decision has cut."""
        if not self.decisions:
            return list(self.trials)
        kept = set(self.decisions[-1].kept)
        return [trial for trial in self.trials if trial.id in kept]

    def ended(self) -> dict[str, Outcome]:
        """Outcomes of the trials that the decisions have ended, by id."""
        found: dict[str, Outcome] = {}
        for decision in self.decisions:
            for trial, _ in decision.order:
                if trial in decision.kept:
                    continue
                if trial in decision.failed:
                    kind, message = decision.failed[trial]
                    error = getattr(errors, kind, LowrankError)
                    found[trial] = Outcome(None, error(message))
                else:
                    found[trial] = Outcome(None, cut=decision.why(trial))
        return found

    def packs(
        self,
        known: Mapping[str, Outcome],
        forced: Collection[str],
        compositions: Compositions,
        spec: SweepSpec,
        memory: Memory,
    ) -> list[Planned]:
        """The packs from the last decided rung to the next.

        Packs that have come beyond that rung go on as they are. The others are dealt
        anew, as narrow as their trials are few; trials that start over, by themselves.
        """

        def planned(pack: Sequence[Trial], since: int, continued: bool) -> Planned:
            todo = [trial for trial in pack if trial.id not in known]
            return Planned(pack, todo, continued, since, self.until)

        sound = [
            trial
            for trial in self.running
            if trial.id not in known or known[trial.id].error is None
        ]
        found = [
            planned(pack, 0, continued=True)
            for pack in compositions.begun(sound, forced, self.since)
        ]
        found = [pack for pack in found if pack.todo]
        placed = {t.id for pack in found for t in pack.todo} | known.keys()
        left = [trial for trial in self.running if trial.id not in placed]
        for since, own in (
            (self.since, [trial for trial in left if trial.id not in forced]),
            (0, [trial for trial in left if trial.id in forced]),
        ):
            if own:
                share = share_of(own[0].settings)
                dealt = deal(own, width(own, spec, memory), share)
                found += [planned(pack, since, continued=False) for pack in dealt]
        return found

    def decide(self, outcomes: Mapping[str, Outcome]) -> Decision | None:
        """Decides the next rung, if all trials have come to it, and seals that.

        Returns:
          The decision; None where nobody waits for one, or one more has to be tried
          again first.

        Raises:
          CannotWrite: The file system refused.
        """
        rung, running = self.next, self.running
        mine = [outcomes.get(trial.id) for trial in running]
        if rung is None or not any(one and one.paused for one in mine):
            return None
        values: dict[str, float | None] = {}
        failed: dict[str, tuple[str, str]] = {}
        for trial, outcome in zip(running, mine, strict=True):
            if outcome is not None and isinstance(outcome.error, _OWN):
                failed[trial.id] = type(outcome.error).__name__, str(outcome.error)
                values[trial.id] = None
            elif outcome is None or outcome.error is not None:
                logger.warning(
                    "the rung at step %d is not decided: trial %s has not come to it. "
                    "The same line tries it again; the others wait, saved",
                    rung.step,
                    trial.id,
                )
                return None
            else:
                values[trial.id] = _value(trial, self.contest.metric, rung.step)
        lower = self.contest.metric in LOWER_IS_BETTER
        decision = Decision(
            contest=self.contest.id,
            number=len(self.decisions),
            step=rung.step,
            metric=self.contest.metric,
            order=tuple(ranked(values, lower)),
            keep=rung.keep,
            failed=failed,
        )
        store(self._directory, decision)
        self.decisions.append(decision)
        logger.info(
            "rung at step %d: %d of %d trials go on by %s",
            rung.step,
            len(decision.kept),
            len(decision.order),
            decision.metric,
        )
        return decision

    def told(self) -> str:
        """The rungs: `9 trials, 3 from step 8, 1 from step 16 of 48`."""
        parts = [f"{rung.keep} from step {rung.step}" for rung in self.contest.rungs]
        return (
            f"{', '.join([f'{len(self.trials)} trials', *parts])} of {self.num_steps}, "
            f"by {self.contest.metric}"
        )

    def share(self) -> float:
        """The part of the steps of all trials that is trained, if none ends early."""
        count, at, steps = len(self.trials), 0, 0
        for rung in self.contest.rungs:
            steps += count * (rung.step - at)
            count, at = rung.keep, rung.step
        steps += count * (self.num_steps - at)
        return steps / (len(self.trials) * self.num_steps)


def races(trials: Sequence[Trial], directory: Path, spec: SweepSpec) -> list[Race]:
    """The races of a sweep; none without `sweep.halving`.

    Raises:
      BadInput: No trial would ever be cut; and see `Race`.
    """
    if spec.halving is None:
        return []
    found = [Race(group, spec.halving, directory) for group in groups(trials)]
    if not any(race.contest.rungs for race in found):
        one = max(found, key=lambda race: len(race.trials))
        raise BadInput(
            f"sweep.halving (first = {spec.halving.first}, min_steps = "
            f"{spec.halving.min_steps}) cuts nobody: of {len(found)} groups of trials "
            f"that can be compared the largest has {len(one.trials)}, which train "
            f"{one.num_steps} steps and are validated every {one.every}. A rung stands "
            "at a validation before the end: set loop.evaluate_every or the first rung "
            "lower, give more trials, or sweep=default."
        )
    for race in found:
        logger.info("halving: %s", race.told())
    return found


def mark_cut(trial: Trial, why: str) -> None:
    """Says in a trial's record that it was cut, unless it says so or has a result.

    A record that cannot be read or written is left alone: the decision holds without.
    """
    directory = trial.directory
    try:
        lock = Lock(directory)
        try:
            status = read_status(directory)
            if status["status"] not in ("cut", "done"):
                status |= {"status": "cut", "reason": why, "updated": now()}
                write_sealed(directory / STATUS, status)
        finally:
            lock.release()
    except (Corrupt, errors.CannotWrite) as error:
        logger.warning(
            "trial %s was cut; its record does not say so: %s", trial.id, error
        )


def _value(trial: Trial, metric: str, step: int) -> float | None:
    """A trial's best validation number up to a step, as in its own log.

    The best and not the last, since that is what a trial is told by at its end, too.
    """
    metrics, name = load_record(trial.directory).metrics, f"validation/{metric}"
    if name not in metrics:
        return None
    found = numbers(metrics, name)[numbers(metrics, "step") <= step]
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    return float(found.min() if metric in LOWER_IS_BETTER else found.max())
