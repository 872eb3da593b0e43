"""What a run would be: sites, ranks, parameters, FLOPs and memory, nothing trained."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank.adapt.attach import Adapted
from lowrank.allocate.signals import SIGNALS
from lowrank.cost.count import jaxpr_flops
from lowrank.cost.measure import compiled_cost
from lowrank.run.forward import on_inputs
from lowrank.run.placing import place
from lowrank.run.prepare import Prepared, site_rows, sizes
from lowrank.run.ranks import begun, gauges, slots_of
from lowrank.run.settings import Settings
from lowrank.sharding.mesh import batch_shapes
from lowrank.sharding.partition import Rule
from lowrank.train import state as states
from lowrank.train.batches import entries_of, shape_of
from lowrank.train.losses import Loss
from lowrank.train.pack import jitted, on_devices
from lowrank.train.penalties import impose
from lowrank.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a step is made of: all that compiling it asks of a trial.

    Attributes:
      settings: What was asked for.
      adapted: The model with its corrections; of weights, shapes are enough.
      loss, inputs: See `run.problem.Problem`.
      partition: How the base's weights are split over devices.
      num_steps: Of the whole training.
      examples: One batch of each shape, with an axis of trials.
    """

    settings: Settings
    adapted: Adapted
    loss: Loss
    inputs: Callable[[Mapping[str, Any]], Any]
    partition: Sequence[Rule]
    num_steps: int
    examples: Sequence[Mapping[str, np.ndarray]]

    @classmethod
    def of(cls, prepared: Prepared) -> "Planned":
        """Of a trial that could be run."""
        problem, batches = prepared.problem, prepared.batches
        return cls(
            prepared.settings, prepared.adapted, problem.loss, problem.inputs,
            problem.base.partition, batches.num_steps, batches.examples(),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The largest step of a pack, from shapes alone.

    Attributes:
      packed: The step as a function.
      shapes: What it is called with: the base, the state, a batch.
      mesh: Its devices.
    """

    packed: Callable[..., Any]
    shapes: tuple[Any, ...]
    mesh: Mesh

    def costs(self) -> dict[str, Any]:
        """Compiles the step and reads what it takes; see `compiled_cost`."""
        program = jitted(self.packed, self.mesh, self.shapes[1])
        compiled = program.lower(*self.shapes).compile()
        return compiled_cost(compiled, jaxpr_flops(self.packed, *self.shapes))


def lowered(planned: Planned, num_trials: int = 1, mesh: Mesh | None = None) -> Lowered:
    """The step on the largest batch, for a pack of trials like this one.

    Args:
      planned: The trial.
      num_trials: Of the pack; where the trial axis of the mesh does not divide it, see
        `MeshSpec.for_trials`.
      mesh: Other devices than those of this machine.
    """
    settings, adapted = planned.settings, planned.adapted
    asked, num_steps = settings.mesh, planned.num_steps
    if mesh is None:
        asked = asked.for_trials(num_trials)
        # It is not run: of several processes, not all need take part.
        mesh = asked.build(jax.devices())
    placed = place(adapted, asked, mesh, planned.partition)
    model = on_inputs(adapted.apply, planned.inputs, mesh)
    imposed = impose([settings.penalty], adapted.sites, adapted.thin)
    chosen = settings.ranks
    competing = slots_of(adapted, bounds=chosen.bounds) if chosen.move else None
    slots = competing and [competing] * num_trials
    moving, dials = begun(
        adapted, [chosen.moving] * num_trials, slots, None, num_steps,
        gauges(model, planned.loss),
    )  # fmt: skip
    aged = moving is not None and moving.births
    # The weights are an argument: what trains them whole begins with them.
    start = lambda leaves: states.start(
        adapted.init_trained, dials or adapted.dials(), [settings.optim] * num_trials,
        range(num_trials), leaves, imposed.weights([settings.penalty] * num_trials),
        roles=adapted.roles(), ages=aged,
        ranks=moving.begin if moving else lambda trained: {},
    )  # fmt: skip
    begun_state = jax.eval_shape(start, adapted.leaves)
    state = placed.located(begun_state, placed.state(begun_state))
    frozen = placed.located(adapted.frozen(), placed.frozen)
    step = make_step(
        model, planned.loss, settings.optim, num_steps, adapted.draws,
        adapted.active, imposed, adapted.roles(), aged,
        moving.of_step if moving else (),
    )  # fmt: skip
    largest = max(planned.examples, key=entries_of)
    wide = {
        name: np.broadcast_to(array[:1], (num_trials, *array.shape[1:]))
        for name, array in largest.items()
    }
    batch = batch_shapes(wide, mesh, 1)
    packed = on_devices(step, num_trials, mesh, moving)
    return Lowered(packed, (frozen, state, batch), mesh)


def preview(prepared: Prepared) -> dict[str, Any]:
    """Compiles the largest step from shapes alone and reads its costs.

    Returns:
      Sites, sizes, the data's shape, how ranks would move, and the costs of the largest
      step.
    """
    adapted = prepared.adapted
    return {
        "preview": True,
        "trial": prepared.settings.trial_id,
        "directory": str(prepared.directory),
        "sites": site_rows(adapted),
        "whole": list(adapted.fully_trained),
        "sizes": dataclasses.asdict(sizes(adapted)),
        "steps": prepared.batches.num_steps,
        "batches": [list(shape_of(b)) for b in prepared.batches.examples()],
        "ranks": _ranks(prepared),
        "step": lowered(Planned.of(prepared)).costs(),
    }


def _ranks(prepared: Prepared) -> dict[str, Any] | None:
    """How ranks would move: the budget, and what is measured at which cost."""
    chosen, adapted = prepared.settings.ranks, prepared.adapted
    if not chosen.move:
        return None
    slots = slots_of(adapted, bounds=chosen.bounds)
    planned = chosen.moving.on(slots, prepared.batches.num_steps)
    budget = planned.constants["budget"]
    return {
        "unit": planned.program.unit,
        "budget_at_start": int(budget[0]),
        "budget_at_end": int(budget[-1]),
        "average_forward_budget": planned.average_forward_budget(),
        "events": int(planned.constants["due"].sum()),
        "measured_every": planned.measure_every,
        "signals": {name: SIGNALS[name].cost for name in sorted(planned.needs)},
    }
