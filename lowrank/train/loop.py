"""The host loop: when to step, log, evaluate, save and stop.

The host does constant work per step and reads a step's metrics only while the next
one is running, so the device never waits for it. Everything that meets disk or
network comes in as a callable: this file knows neither.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import BadInput, Preempted
from lowrank.core.spec import spec
from lowrank.train.guard import NonFinitePolicy, StopSignal
from lowrank.train.state import TrainState, improve
from lowrank.train.watchdog import STEP

logger = logging.getLogger(__name__)


@runtime_checkable
class Batches(Protocol):
    """The training data: batches as a function of position."""

    @property
    def num_steps(self) -> int: ...

    def iterate(
        self, start_step: int = 0
    ) -> Iterator[tuple[int, Mapping[str, Any]]]: ...


@dataclasses.dataclass(frozen=True)
class Events:
    """What the loop may ask of its surroundings.

    Attributes:
      log: (step, one dict of numbers per trial).
      save: (position, state, memory): a checkpoint, in the background.
      restore: The last good (state, memory), for the rollback policy.
      evaluate: state -> one dict of validation numbers per trial; None without a
        validation split.
      lower_is_better: Validation numbers of which the smallest is the best.
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
    alive: Callable[[str], None] = lambda doing: None


@spec
class LoopSpec:
    """When things happen, in steps.

    Attributes:
      log_every: Metrics are averaged over this many steps and logged.
      evaluate_every: Validation; once per epoch if None.
      checkpoint_every: A checkpoint is also written after each validation.
      select: Validation number that picks the best state.
      patience: Stop after this many validations without a new best; None: never.
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


#: What the loop remembers beside the state; saved with every checkpoint.
FRESH: Mapping[str, Any] = {"position": 0, "bad_steps": 0, "stale": 0, "window": []}


def finished(memory: Mapping[str, Any], settings: LoopSpec, num_steps: int) -> bool:
    """Whether nothing is left to train: all steps are done, or patience has run out."""
    patience = settings.patience
    stale = patience is not None and memory["stale"] >= patience
    return stale or memory["position"] >= num_steps


class Loop:
    """Runs a pack over its data from wherever it was left."""

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

    def run(self, state: TrainState, memory: Mapping[str, Any]) -> TrainState:
        """Trains to the end.

        Args:
          state: Fresh, or restored.
          memory: `FRESH`, or what was saved with the state.

        Returns:
          The final state.

        Raises:
          NonFinite: As the policy says.
          Preempted: A signal came; the state has been saved.
        """
        memory = copy.deepcopy(dict(memory))
        with StopSignal() as stop:
            while not self._finished(memory):
                state, memory, again = self._stretch(state, memory, stop)
                if not again:
                    break
        if self._saved != memory["position"]:
            self._save(state, memory)
        return state

    def _finished(self, memory: Mapping[str, Any]) -> bool:
        return finished(memory, self._settings, self._batches.num_steps)

    def _stretch(self, state: TrainState, memory: dict[str, Any], stop: StopSignal):
        """Steps until the end or a rollback; returns whether to go on."""
        self._clock = time.perf_counter()
        first = memory["position"]
        self._events.alive(STEP)
        for position, batch in self._batches.iterate(first):
            self._events.alive(STEP)
            state, metrics = self._pack(state, batch)
            bad = self._settle(memory)
            self._pending = (position, batch["ids"].shape[1:], metrics)
            memory["position"] = position + 1
            validate = self._events.evaluate and self._due(memory, self._evaluate_every)
            save = self._due(memory, self._settings.checkpoint_every)
            last = memory["position"] >= self._batches.num_steps
            halted = stop.received or self._settings.stop_after == position + 1
            if validate or save or last or halted:
                # Of a step that was skipped, too, the next one is read before a save.
                bad = bad if bad == "rollback" else self._settle(memory) or bad
            if bad == "rollback":
                state, memory = self._roll_back(memory)
                if last and self._events.evaluate:
                    state = self._validate(state, memory)
                return state, memory, True
            if memory["window"] and (validate or last):
                self._flush(position, memory)
            if validate or (last and self._events.evaluate):
                state = self._validate(state, memory)
            if save or validate:
                self._save(state, memory)
            if halted and not last:
                self._stop(state, memory, stop.received or "stop_after")
            if self._finished(memory):
                if not last:
                    logger.info(
                        "no new best in %d validations: stopping early at step %d",
                        memory["stale"],
                        memory["position"],
                    )
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
        memory["window"].append({name: v.tolist() for name, v in values.items()})
        action = None
        if not finite.all():
            trials = np.flatnonzero(~finite).tolist()
            self._flush(position, memory)
            action = self._policy.decide(position, trials, memory["bad_steps"])
            memory["bad_steps"] += 1
        elif (position + 1) % self._settings.log_every == 0:
            self._flush(position, memory)
        text = f"loss {np.mean(values['loss']):.4f}"
        self._events.progress(position + 1, self._batches.num_steps, text)
        return action

    def _flush(self, position: int, memory: dict[str, Any]) -> None:
        window, memory["window"] = memory["window"], []
        rows = {name: np.mean([w[name] for w in window], axis=0) for name in window[0]}
        count = len(rows["loss"])
        self._events.log(
            position + 1,
            [
                {f"train/{n}": float(v[t]) for n, v in rows.items()}
                for t in range(count)
            ],
        )

    def _validate(self, state: TrainState, memory: dict[str, Any]) -> TrainState:
        assert self._events.evaluate is not None
        self._events.alive("validation")
        results = self._events.evaluate(state)
        select = self._settings.select
        if select not in results[0]:
            raise BadInput(
                f"loop.select = {select!r} is not a validation number; there are "
                f"{', '.join(results[0])}"
            )
        sign = -1.0 if select in self._events.lower_is_better else 1.0
        values = np.array([sign * row[select] for row in results], np.float32)
        improved = values > np.asarray(state.best_value)
        memory["stale"] = 0 if improved.any() else memory["stale"] + 1
        rows = [{f"validation/{n}": v for n, v in row.items()} for row in results]
        self._events.log(memory["position"], rows)
        state = improve(state, jnp.asarray(values))
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
