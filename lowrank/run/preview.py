"""What a run would be: sites, ranks, parameters, FLOPs and memory, nothing trained."""

import dataclasses
from typing import Any

import jax

from lowrank.cost.count import jaxpr_flops
from lowrank.cost.measure import compiled_cost
from lowrank.run.forward import inputs_of, on_inputs
from lowrank.run.prepare import Prepared, site_rows, sizes
from lowrank.sharding import batch_shapes, replicated
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.pack import over_trials
from lowrank.train.penalties import impose
from lowrank.train.step import make_step


def preview(prepared: Prepared) -> dict[str, Any]:
    """Compiles the largest step from shapes alone and reads its costs.

    Returns:
      Sites, sizes, the data's shape and the costs of the largest step.
    """
    settings, adapted = prepared.settings, prepared.adapted
    mesh = settings.mesh.build()
    model = on_inputs(adapted.apply, inputs_of)
    imposed = impose([settings.penalty], adapted.sites, adapted.thin)
    start = lambda: states.start(
        adapted.init_trained, adapted.dials(), [settings.optim], [settings.seed],
        weights=imposed.weights([settings.penalty]),
    )  # fmt: skip
    sharded = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        tree,
    )
    state, frozen = sharded(jax.eval_shape(start)), sharded(adapted.frozen())
    steps = prepared.batches.num_steps
    step = make_step(
        model, cross_entropy, settings.optim, steps, adapted.draws, adapted.active,
        imposed,
    )  # fmt: skip
    packed = over_trials(step, 1)
    largest = max(prepared.batches.examples(), key=lambda batch: batch["ids"].size)
    batch = batch_shapes(largest, mesh, 1)
    compiled = jax.jit(packed, donate_argnums=1).lower(frozen, state, batch).compile()
    return {
        "preview": True,
        "trial": settings.trial_id,
        "directory": str(prepared.directory),
        "sites": site_rows(adapted),
        "whole": list(adapted.fully_trained),
        "sizes": dataclasses.asdict(sizes(adapted)),
        "steps": prepared.batches.num_steps,
        "batches": [list(b["ids"].shape[1:]) for b in prepared.batches.examples()],
        "step": compiled_cost(compiled, jaxpr_flops(packed, frozen, state, batch)),
    }
