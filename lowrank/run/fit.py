"""Training without a config: adapted model in, trained corrections out.

The command line goes through this function too, so the library and the commands
cannot drift apart.
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from lowrank.adapt.attach import Adapted
from lowrank.allocate.adaptive import Allocator
from lowrank.allocate.fixed import Uniform
from lowrank.allocate.slots import Slots
from lowrank.core.arrays import Dials, Frozen, Trained
from lowrank.core.errors import BadInput
from lowrank.core.spec import digest
from lowrank.core.trees import fingerprint
from lowrank.cost.measure import StepTimer
from lowrank.io.checkpoints import Checkpoints
from lowrank.run.checks import check_plan
from lowrank.run.first_look import first_look
from lowrank.run.forward import Batch, Forward, inputs_of, on_inputs
from lowrank.run.judges import OF_CLASSES, Judge
from lowrank.run.placing import place
from lowrank.run.ranks import begun, check_settled, gauges
from lowrank.run.storage import Storage
from lowrank.sharding.mesh import MeshSpec, batch_shapes, place_batch, put
from lowrank.sharding.partition import Rule
from lowrank.sharding.processes import first, on_host
from lowrank.train import state as states
from lowrank.train.batches import PATCH, TrainBatches
from lowrank.train.examples import check_examples_apart
from lowrank.train.guard import NonFinitePolicy
from lowrank.train.loop import Events, Loop, LoopSpec, check_pause, finished, fresh
from lowrank.train.losses import Loss, cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import Pack
from lowrank.train.penalties import Penalties, impose
from lowrank.train.ranks import RankEvents
from lowrank.train.state import TrainState
from lowrank.train.step import make_step

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: (position, one dict of numbers per trial)
Log = Callable[[int, Sequence[Mapping[str, float]]], None]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A trained pack.

    Attributes:
      adapted: The model.
      frozen: The base, on its devices.
      state: The final state of all trials; `state.best` holds the best ones.
      forward: Inference, already compiled for the validation shapes.
      timer: Step times by batch shape.
      pack: The compiled steps; None if there was nothing left to train.
      validated: Whether a validation split chose the best state.
      ended: Of each trial that did not train to the last step: {"step", "why",
        "failed"}; None of the others.
      paused: The step at which the others wait, as `until` said; None if there is no
        step left.
      events: How ranks moved; None where they did not.
    """

    adapted: Adapted
    frozen: Frozen
    state: TrainState
    forward: Forward
    timer: StepTimer
    pack: Pack | None
    validated: bool
    ended: tuple[Mapping[str, Any] | None, ...]
    paused: int | None = None
    events: RankEvents | None = None

    def trained(self, trial: int = 0) -> Trained:
        """A trial's trained tree: the best validated one, else the last."""
        return jax.tree.map(lambda x: x[trial], self.chosen)

    def dials(self, trial: int = 0) -> Dials:
        """A trial's dials."""
        return jax.tree.map(lambda x: x[trial], self.state.dials)

    @property
    def chosen(self) -> Trained:
        """The trained trees of all trials that reports are about."""
        return self.state.best if self.validated else self.state.trained

    def logits(self, batch: Batch) -> np.ndarray:
        """Logits of every trial, trials first."""
        return np.asarray(self.forward(self.chosen, self.state.dials, batch))


def fit(
    adapted: Adapted,
    batches: TrainBatches,
    *,
    validation: Sequence[Batch] | None = None,
    loss: Loss = cross_entropy,
    judge: Judge = OF_CLASSES,
    optim: AdamW | Sequence[AdamW] = AdamW(),
    penalty: Penalties | Sequence[Penalties] = Penalties(),
    ranks: Allocator | Sequence[Allocator] = Uniform(),
    seeds: Sequence[int] = (0,),
    dials: Sequence[Dials] | None = None,
    slots: Sequence[Slots] | None = None,
    starts: Sequence[Callable[[Trained], Trained] | None] = (),
    directory: str | Path | None = None,
    identity: Mapping[str, str] | None = None,
    mesh: MeshSpec = MeshSpec(),
    partition: Sequence[Rule] = (),
    loop: LoopSpec = LoopSpec(),
    until: int | None = None,
    non_finite: NonFinitePolicy = NonFinitePolicy(),
    log: Log | None = None,
    storage: Storage | None = None,
    inputs: Callable[[Mapping[str, Any]], Any] = inputs_of,
    progress: bool = True,
    alive: Callable[[str], None] = lambda doing: None,
    watch: Callable[[Pack], contextlib.AbstractContextManager[Any]] | None = None,
) -> Fit:
    """Trains one pack: a trial per seed, sharing the compiled step and the base.

    Args:
      adapted: From `attach`.
      batches: Training data, built with the same seeds.
      validation: Batches that choose the best state and may stop early.
      loss: What is minimized (see `train.losses`).
      judge: What a validation's numbers are (see `run.judges`).
      optim: Constants; one for all trials or one per trial.
      penalty: Weights of penalties on the corrections; one for all or one per trial.
      ranks: How ranks are chosen; one for all or one per trial. Those that move need
        rules with a max_rank above the rank.
      seeds: One trial each: its start, its dropout and its data order.
      dials: One per trial: its ranks, scales and rates; the adapted model's own for
        all if None.
      slots: One per trial: which layers compete for ranks, within which bounds; by
        default all, from 0 to max_rank.
      starts: One per trial: its drawn trained tree -> the one that it starts from, as
        of an earlier adapter; None, or none at all: as drawn. Not where ranks move.
      directory: Keeps checkpoints and continues from them; None keeps nothing.
      identity: Fingerprints that a stored state in `directory` must agree with to be
        continued, beside those of base, rules, constants, weights, seeds and length,
        which are always compared.
      mesh: Devices.
      partition: How the model's family splits its weights; see `sharding.partition`.
      loop: When things happen.
      until: The step of a validation to pause at, saved; None: train to the end.
        Schedules are those of the whole training in any case.
      non_finite: What to do about a step that is not finite.
      log: Receives metrics, one dict per trial.
      storage: Instead of `directory`: checkpoints and the metrics file's length.
      inputs: Picks the model's input from a batch.
      progress: A progress bar, where there is a terminal.
      alive: Told what begins; see `train.watchdog.Watchdog.alive`.
      watch: Stands around the compiled steps while they run; see `run.profile.watched`.

    Returns:
      The trained pack.

    Raises:
      BadInput, NonFinite, Corrupt, Preempted: See `core.errors`.
    """
    optims = _each(optim, len(seeds))
    penalties = _each(penalty, len(seeds))
    allocators = _each(ranks, len(seeds))
    placed = place(adapted, mesh, rules=partition)
    devices = placed.mesh
    if directory is not None:
        own = _identity(
            adapted, batches, optims, penalties, allocators, seeds, dials, slots
        )
        storage = Storage(
            Checkpoints(Path(directory), identity={**own, **(identity or {})})
        )
    check_plan(batches, validation, optims, seeds, devices, loop, judge.check)
    every = loop.evaluate_every or batches.steps_per_epoch
    check_pause(until, batches.num_steps, every if validation else None)
    if non_finite.action == "rollback" and storage is None:
        raise BadInput("non_finite.action=rollback needs a directory to roll back to")
    for what, each in (("penalties", penalties), ("allocators of ranks", allocators)):
        if len(each) != len(seeds):
            raise BadInput(
                f"{len(seeds)} trials have {len(each)} sets of {what}; give one for "
                "all of them, or one each"
            )
    imposed = impose(penalties, adapted.sites, adapted.thin)
    model = on_inputs(adapted.apply, inputs, devices)
    moving, dials = begun(
        adapted, allocators, slots, dials, batches.num_steps,
        gauges(model, loss),
    )  # fmt: skip
    if any(starts) and (len(starts) != len(seeds) or moving is not None):
        raise BadInput(
            f"{len(seeds)} trials have {len(starts)} starts; give one each, or None, "
            "and ranks that stay"
        )
    frozen = put(adapted.frozen(), placed.frozen)
    aged = moving is not None and moving.births
    begun_before = storage is not None and storage.begun
    looks = moving is not None and moving.looks_first and not begun_before
    state = states.start(
        adapted.init_trained, dials or adapted.dials(), optims, seeds, adapted.leaves,
        imposed.weights(penalties), adapted.roles(), aged,
        moving.begin if moving else lambda trained: {},
        # What is computed on the host comes to its place later.
        None if looks or any(starts) else placed.state,
    )  # fmt: skip
    if any(starts) and not begun_before:
        state = _started(state, starts)
    if moving is not None and looks:
        alive("a first look at the data")
        state = first_look(
            adapted, allocators, moving, state, frozen, batches, loss, inputs
        )
    state = put(state, placed.state(state))
    forward = Forward(model, frozen, devices)
    memory: Mapping[str, Any] = {**fresh(len(seeds)), "data": batches.state(0)}
    if storage is not None and begun_before:
        alive("restore")
        state, memory = storage.resume(state, memory)
        batches.check_state(memory["data"])
        logger.info("continuing at step %d", memory["position"])
    elif storage is not None:
        storage.start_over()
        if non_finite.action == "rollback":
            storage.save(0, state, memory)
    timer = StepTimer()
    pack = None
    if not finished(memory, until or batches.num_steps):
        alive("compilation")
        examples = batches.examples()
        if moving is not None and moving.of_examples:
            of_first = lambda tree: jax.tree.map(lambda x: x[0], tree)
            own = (state.trained, state.dials, state.constants, examples[0])
            check_examples_apart(model, loss, frozen, *map(of_first, own))
        step = make_step(
            model, loss, optims[0], batches.num_steps, adapted.draws, adapted.active,
            imposed, adapted.roles(), aged, moving.of_step if moving else (),
        )  # fmt: skip
        shapes = [batch_shapes(batch, devices, 1) for batch in examples]
        onto = lambda batch: place_batch(batch, devices, 1)
        pack = Pack(step, frozen, state, shapes, onto, len(seeds), devices, moving)
    validate = None
    if validation:
        alive("compilation for validation")
        forward.compile(state.trained, state.dials, validation)
        validate = lambda s: judge.numbers(
            forward, lambda batch: forward(s.trained, s.dials, batch), validation
        )
    if pack is not None:
        # What ends a trial or keeps its best compiles nothing later: this one changes
        # nothing.
        nothing = np.full(len(seeds), states.NO_VALUE, np.float32)
        state = states.settle(state, nothing, np.ones(len(seeds), bool))
        # Shapes only: the state itself is donated to the first step.
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        shown = progress and first()
        around = contextlib.nullcontext(pack) if watch is None else watch(pack)
        with _progress(shown) as report, _closing(storage), around as steps:
            events = Events(
                log=log or (lambda position, rows: None),
                save=storage.save if storage else (lambda *a: None),
                restore=lambda: _stored(storage, like),
                evaluate=validate,
                timed=timing(timer),
                progress=report,
                lower_is_better=judge.lower_is_better,
                # It was checked to be one of this judge's.
                undefined=frozenset({loop.select}),
                alive=alive,
            )
            runner = Loop(
                steps, batches, events, loop, non_finite, batches.steps_per_epoch
            )
            state, memory = runner.run(state, memory, until)
            alive("last checkpoint")
    ended = tuple(memory["ended"])
    here = memory["position"]
    paused = None if here >= batches.num_steps or all(ended) else here
    if paused is None:
        check_settled(moving, state, ended)
    return Fit(
        adapted, frozen, state, forward, timer, pack, bool(validation), ended, paused,
        moving,
    )  # fmt: skip


def timing(timer: StepTimer) -> Callable[[tuple[int, ...], float], None]:
    """What notes a step by the shape of its batch; of images, places are no rows."""

    def add(shape: tuple[int, ...], seconds: float) -> None:
        if len(shape) != 4:
            return timer.add(shape, seconds)
        rows, height, width, _ = shape
        patches = max(1, height * width // PATCH**2)
        return timer.add(shape, seconds, rows, rows * patches)

    return add


def _started(
    state: TrainState, starts: Sequence[Callable[[Trained], Trained] | None]
) -> TrainState:
    """A state whose trials start where `starts` say, before anything is trained."""
    own = []
    for trial, start in enumerate(starts):
        drawn = jax.tree.map(lambda x, t=trial: x[t], state.trained)
        own.append(start(drawn) if start is not None else drawn)
    trained = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    # The best state is a buffer of its own: a step donates both.
    return state.replace(trained=trained, best=jax.tree.map(jnp.copy, trained))


def _each(given: _T | Sequence[_T], count: int) -> list[_T]:
    """One per trial, where one may be given for all."""
    return list(given) if isinstance(given, Sequence) else [given] * count


def _identity(
    adapted: Adapted,
    batches: TrainBatches,
    optims: Sequence[AdamW],
    penalties: Sequence[Penalties],
    allocators: Sequence[Allocator],
    seeds: Sequence[int],
    dials: Sequence[Dials] | None,
    slots: Sequence[Slots] | None,
) -> dict[str, str]:
    """What decides a pack's course beside its code and the order of its data."""
    weighed = any(one.named for one in penalties)
    chosen = any(one != Uniform() for one in allocators)
    return {
        "base": fingerprint(adapted.frozen(), on_host),
        "rules": digest({**adapted.rules, "/ref_rank": adapted.ref_rank}),
        "trials": digest(
            [[one, seed] for one, seed in zip(optims, seeds, strict=True)]
        ),
        "steps": str(batches.num_steps),
        **({} if dials is None else {"dials": fingerprint(list(dials))}),
        # States from before there were penalties go on as they did.
        **({"penalties": digest(list(penalties))} if weighed else {}),
        **({"ranks": digest(list(allocators))} if chosen else {}),
        **({} if slots is None else {"layers": digest([one.told for one in slots])}),
    }


@contextlib.contextmanager
def _progress(wanted: bool):
    if not (wanted and sys.stderr.isatty()):
        yield lambda position, total, text: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=None)
        yield lambda position, total, text: bar.update(
            task, completed=position, total=total, description=text
        )


@contextlib.contextmanager
def _closing(storage: Storage | None):
    """Waits for the checkpoint in flight, however the loop ends."""
    try:
        yield
    finally:
        if storage is not None:
            storage.checkpoints.wait()


def _stored(storage: Storage | None, like: TrainState):
    assert storage is not None, "the rollback policy is refused without a directory"
    return storage.restore(like)
