"""The host loop: when to step, log, evaluate, save and stop.

The host does constant work per step and reads a step's metrics only while the next
one is running, so the device never waits for it. Everything that meets disk or
network comes in as a callable: this file knows neither.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank.core.errors import BadInput, NonFinite, Preempted
from lowrank.core.spec import spec
from lowrank.sharding.processes import on_host
from lowrank.train.batches import Batches, shape_of
from lowrank.train.guard import NonFinitePolicy, StopSignal
from lowrank.train.ranks import SOUND, unsound
from lowrank.train.state import NO_VALUE, TrainState, settle
from lowrank.train.watchdog import STEP

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Events:
    """What the loop may ask of its surroundings.

    Attributes:
      log: (step, one dict of numbers per trial; empty where a trial has none).
      save: (position, state, memory): a checkpoint, in the background.
      restore: The last good (state, memory), for the rollback policy.
      evaluate: state -> one dict of validation numbers per trial; None without a
        validation split.
      lower_is_better: Validation numbers of which the smallest is the best.
      undefined: Validation numbers that may be missing, as a correlation with equal
        numbers is; such a validation is no best one.
      timed: (batch shape, seconds): a finished step.
      progress: (position, total, text).
      alive: What the loop begins to do; for a watchdog.
    """

    log: Callable[[int, Sequence[Mapping[str, float]]], None]
    save: Callable[[int, TrainState, Mapping[str, Any]], None]
    restore: Callable[[], tuple[TrainState, Mapping[str, Any]]]
    evaluate: Callable[[TrainState], Sequence[Mapping[str, float]]] | None
    timed: Callable[[tuple[int, ...], float], None]
    progress: Callable[[int, int, str], None]
    lower_is_better: frozenset[str] = frozenset()
    undefined: frozenset[str] = frozenset()
    alive: Callable[[str], None] = lambda doing: None


@spec
class LoopSpec:
    """When things happen, in steps.

    Attributes:
      log_every: Metrics are averaged over this many steps and logged.
      evaluate_every: Validation; once per epoch if None.
      checkpoint_every: A checkpoint is also written after each validation.
      select: Validation number that picks the best state.
      patience: Validations without a new best after which a trial stops; None: any.
      stop_after: Stop as if preempted after this many steps; for rehearsals.
    """

    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int = 100
    select: str = "accuracy"
    patience: int | None = None
    stop_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"loop.{name} must be at least 1, not {value}")


def fresh(num_trials: int) -> dict[str, Any]:
    """What the loop remembers beside the state; JSON, saved with every checkpoint.

    "position" is in the data and shared; of each trial there are "bad_steps" (not
    finite), "stale" (validations without a new best), "window" (numbers not logged
    yet) and "ended": None, or {"step", "why", "failed"}.
    """
    each = lambda value: [copy.copy(value) for _ in range(num_trials)]
    own = {"bad_steps": 0, "stale": 0, "window": [], "ended": None}
    return {"position": 0, **{name: each(value) for name, value in own.items()}}


def finished(memory: Mapping[str, Any], until: int) -> bool:
    """Whether nothing is left to train: no step, or no trial that has not ended.

    Args:
      memory: The loop's.
      until: The step at which training ends, or pauses.
    """
    return memory["position"] >= until or all(memory["ended"])


def check_pause(until: int | None, num_steps: int, every: int | None) -> None:
    """Refuses to pause where there is no validation.

    At a validation a step's numbers are read, logged and saved in any case, so what
    comes after a pause is what would have come without it.

    Args:
      until: The step to pause at; None: none.
      num_steps: Of the whole training.
      every: Steps between validations; None: there are none.

    Raises:
      BadInput: There is no validation at `until`, or training has ended by then.
    """
    if until is None or (every and 0 < until < num_steps and not until % every):
        return
    raise BadInput(
        f"training pauses at a validation, and step {until} of {num_steps} has none: "
        + (f"they come every {every} steps" if every else "there is no such split")
        + " (loop.evaluate_every)"
    )


class Loop:
    """Runs a pack over its data from wherever it was left.

    Trials share the data's position and the clock, nothing else: one that runs out of
    patience or of finite numbers stands still while the others go on.
    """

    def __init__(
        self,
        pack: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Any]],
        batches: Batches,
        events: Events,
        settings: LoopSpec,
        policy: NonFinitePolicy,
        steps_per_epoch: int,
    ):
        self._pack = pack
        self._batches = batches
        self._events = events
        self._settings = settings
        self._policy = policy
        self._evaluate_every = settings.evaluate_every or steps_per_epoch
        self._pending: tuple[int, tuple[int, ...], Any] | None = None
        self._clock = 0.0
        self._saved = -1
        self._until = batches.num_steps

    def run(
        self,
        state: TrainState,
        memory: Mapping[str, Any],
        until: int | None = None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Trains to the end, or to a validation before it.

        Args:
          state: Fresh, or restored.
          memory: From `fresh`, or what was saved with the state.
          until: The step to pause at, saved, see `check_pause`; None: the end.

        Returns:
          The final state, and the final memory: it tells which trials ended early.

        Raises:
          NonFinite: The policy ended the last trial, and all others before it.
          Preempted: A signal came; the state has been saved.
        """
        memory = copy.deepcopy(dict(memory))
        self._until = self._batches.num_steps if until is None else until
        with StopSignal() as stop:
            while not self._finished(memory):
                state, memory, again = self._stretch(state, memory, stop)
                if not again:
                    break
        if self._saved != memory["position"]:
            self._save(state, memory)
        return state, memory

    def _finished(self, memory: Mapping[str, Any]) -> bool:
        return finished(memory, self._until)

    def _stretch(self, state: TrainState, memory: dict[str, Any], stop: StopSignal):
        """Steps until the end or a rollback; returns whether to go on."""
        self._clock = time.perf_counter()
        first = memory["position"]
        self._events.alive(STEP)
        for position, batch in self._batches.iterate(first):
            self._events.alive(STEP)
            state, metrics = self._pack(state, batch)
            bad = self._settle(memory)
            self._pending = (position, shape_of(batch), metrics)
            memory["position"] = position + 1
            validate = self._events.evaluate and self._due(memory, self._evaluate_every)
            save = self._due(memory, self._settings.checkpoint_every)
            last = memory["position"] >= self._batches.num_steps
            why = stop.after(position + 1)
            halted = why or self._settings.stop_after == position + 1
            if validate or save or last or halted:
                # Of a step that was skipped, too, the next one is read before a save.
                bad = bad if bad == "rollback" else self._settle(memory) or bad
            if bad == "rollback":
                state, memory = self._roll_back(memory)
                if last and self._events.evaluate:
                    state = self._validate(state, memory)
                return state, memory, True
            if bad == "end":
                state = self._hold(state, memory)
            if validate or last:
                self._flush(position, memory, _live(memory))
            if validate or (last and self._events.evaluate):
                state = self._validate(state, memory)
            if save or validate:
                self._save(state, memory)
            if halted and not last:
                self._stop(state, memory, why or "stop_after")
            if self._finished(memory):
                break
        return state, memory, False

    def _due(self, memory: Mapping[str, Any], every: int) -> bool:
        return memory["position"] % every == 0

    def _settle(self, memory: dict[str, Any]) -> str | None:
        """Reads the pending step's metrics; the action if it was not finite."""
        if self._pending is None:
            return None
        position, shape, metrics = self._pending
        self._pending = None
        values = {name: np.asarray(v) for name, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        self._events.timed(tuple(shape), now - self._clock)
        self._clock = now
        finite = values.pop("finite").astype(bool)
        sound = values.pop(SOUND, np.ones_like(finite))
        live = _live(memory)
        for trial in live:
            row = {name: float(v[trial]) for name, v in values.items()}
            memory["window"][trial].append(row)
        action = self._decide(position, [t for t in live if not finite[t]], memory)
        if stuck := [t for t in _live(memory) if not sound[t]]:
            # Nothing that a later batch may cure: whatever the policy, the trial ends.
            self._flush(position, memory, stuck)
            self._fail(memory, position, {t: unsound(position, t) for t in stuck})
            action = action if action == "rollback" else "end"
        if (position + 1) % self._settings.log_every == 0:
            self._flush(position, memory, _live(memory))
        text = f"loss {np.mean(values['loss'][live]):.4f}" if live else ""
        self._events.progress(position + 1, self._batches.num_steps, text)
        return action

    def _decide(
        self, position: int, bad: Sequence[int], memory: dict[str, Any]
    ) -> str | None:
        """What the policy says of trials whose step was not finite."""
        self._flush(position, memory, bad)
        actions = set()
        for trial in bad:
            seen = memory["bad_steps"][trial]
            try:
                actions.add(self._policy.decide(position, trial, seen))
            except NonFinite as error:
                self._fail(memory, position, {trial: error})
                actions.add("end")
            memory["bad_steps"][trial] += 1
        # Every trial of a pack has the same policy.
        return next((a for a in ("rollback", "end", "skip") if a in actions), None)

    def _fail(
        self, memory: dict[str, Any], position: int, errors: Mapping[int, NonFinite]
    ) -> None:
        """Ends trials; raises the error of one without which none would be left."""
        for trial, error in errors.items():
            others = memory["ended"][:trial] + memory["ended"][trial + 1 :]
            if all(one and one["failed"] for one in others):
                raise error
            logger.warning("trial %d ends: %s", trial, error)
            self._end(memory, trial, position, str(error), failed=True)

    def _end(
        self, memory: dict[str, Any], trial: int, step: int, why: str, failed: bool
    ) -> None:
        memory["ended"][trial] = {"step": step, "why": why, "failed": failed}

    def _hold(self, state: TrainState, memory: Mapping[str, Any]) -> TrainState:
        """The state, with the trials that have ended held still."""
        ended = memory["ended"]
        return settle(
            state,
            np.full(len(ended), NO_VALUE, np.float32),
            np.array([one is None for one in ended]),
        )

    def _flush(
        self, position: int, memory: dict[str, Any], trials: Sequence[int]
    ) -> None:
        """Logs the averages of what has gathered in the windows of some trials."""
        rows: list[dict[str, float]] = [{} for _ in memory["window"]]
        for trial in trials:
            window, memory["window"][trial] = memory["window"][trial], []
            for name in window[0] if window else ():
                values = [one[name] for one in window]
                rows[trial][f"train/{name}"] = float(np.mean(values))
        if any(rows):
            self._events.log(position + 1, rows)

    def _validate(self, state: TrainState, memory: dict[str, Any]) -> TrainState:
        assert self._events.evaluate is not None
        self._events.alive("validation")
        results = self._events.evaluate(state)
        select = self._settings.select
        known = {name for one in results for name in one}
        if known and select not in known | self._events.undefined:
            raise BadInput(
                f"loop.select = {select!r} is not a validation number; there are "
                f"{', '.join(sorted(known))}"
            )
        sign = -1.0 if select in self._events.lower_is_better else 1.0
        best = on_host(state.best_value)
        values = np.full(len(results), NO_VALUE, np.float32)
        rows: list[dict[str, float]] = [{} for _ in results]
        for trial in _live(memory):
            if not results[trial]:
                why = "a validation gives numbers that are not finite"
                self._end(memory, trial, memory["position"], why, failed=True)
                continue
            if select in results[trial]:
                values[trial] = sign * results[trial][select]
            new = values[trial] > best[trial]
            stale = memory["stale"][trial] = 0 if new else memory["stale"][trial] + 1
            rows[trial] = {f"validation/{n}": v for n, v in results[trial].items()}
            if self._settings.patience is not None and stale >= self._settings.patience:
                why = f"no new best in {stale} validations"
                self._end(memory, trial, memory["position"], why, failed=False)
                if memory["position"] < self._batches.num_steps:
                    step = memory["position"]
                    logger.info("%s: trial %d stops at step %d", why, trial, step)
        self._events.log(memory["position"], rows)
        live = np.array([one is None for one in memory["ended"]])
        state = settle(state, values, live)
        self._events.alive(STEP)
        self._clock = time.perf_counter()
        return state

    def _save(self, state: TrainState, memory: Mapping[str, Any]) -> None:
        if self._saved != memory["position"]:
            self._events.alive("checkpoint")
            self._events.save(memory["position"], state, copy.deepcopy(dict(memory)))
            self._events.alive(STEP)
            self._saved = memory["position"]
        self._clock = time.perf_counter()

    def _stop(self, state: TrainState, memory: Mapping[str, Any], why: str) -> None:
        self._save(state, memory)
        raise Preempted(
            f"stopped by {why} at step {memory['position']} of "
            f"{self._batches.num_steps}; the state is saved and the same command "
            "continues"
        )

    def _roll_back(self, memory: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """The last good state, with the data position after the bad batch."""
        self._pending = None
        self._events.alive("rollback")
        state, saved = self._events.restore()
        logger.warning(
            "rolled back to the state of step %d; batches up to step %d are skipped",
            saved["position"],
            memory["position"],
        )
        return state, {
            **saved,
            "position": memory["position"],
            "bad_steps": memory["bad_steps"],
        }


def _live(memory: Mapping[str, Any]) -> list[int]:
    """The trials that have not ended."""
    return [trial for trial, ended in enumerate(memory["ended"]) if ended is None]
