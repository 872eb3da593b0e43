"""What changes from step to step, for all trials of a pack, and nothing else.

The base is not in here: it is an argument of the step, never copied, never donated.
Every leaf but `step` has a leading axis of trials.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from lowrank.core.arrays import Dials, Frozen, Key, Roles, Trained
from lowrank.core.trees import flatten
from lowrank.sharding.mesh import by_trial, replicated, trial_axis
from lowrank.train import optim as optimizers
from lowrank.train.optim import AdamW

#: Of a trial that was not validated yet: below whatever a validation may give.
NO_VALUE = float(np.finfo(np.float32).min)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "step", "trained", "opt", "dials", "constants", "key", "best", "best_value",
        "best_step", "skipped", "live", "ranks",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a pack between two steps.

    Attributes:
      step: Steps taken, an integer scalar; after a rollback the data is further on.
      trained, opt, dials: The trial's trained tree, optimizer state and dials.
      constants: Constants of optimizer, loss and penalties that may differ between
        trials.
      key: Root of the trial's randomness.
      best, best_value, best_step: The trained tree at its best validation so far.
      skipped: Steps whose loss or gradient was not finite.
      live: Whether the trial still trains: one that ended stands still, while its
        neighbors in the pack go on.
      ranks: What allocators remember, see `train.ranks`; empty where no rank moves.
    """

    # Leaves may also be shapes, shardings or axes, as in any tree: hence Any.
    step: Any
    trained: Any
    opt: Any
    dials: Any
    constants: Any
    key: Any
    best: Any
    best_value: Any
    best_step: Any
    skipped: Any
    live: Any
    ranks: Any

    def replace(self, **changes: Any) -> "TrainState":
        return dataclasses.replace(self, **changes)


def trial_key(seed: int) -> Key:
    """The root key of a trial."""
    return jax.random.key(seed)


def start(
    init_trained: Callable[..., Trained],
    dials: Dials | Sequence[Dials],
    optims: Sequence[AdamW],
    seeds: Sequence[int],
    base: Frozen | None = None,
    weights: Sequence[Mapping[str, float]] = (),
    roles: Roles | None = None,
    ages: bool = False,
    ranks: Callable[[Trained], Any] = lambda trained: {},
    where: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """The state of a pack before its first step.

    Args:
      init_trained: key, or (key, base) where a base is given -> a trained tree.
      dials: Those of every trial, or one per trial, alike in shapes.
      optims: One per trial; static choices are the first one's.
      seeds: One per trial.
      base: What the start may read of the base, as an argument of the program.
      weights: Further constants, one mapping per trial: weights of penalties.
      roles: What the axes of the factors are for; ages need them.
      ages: Whether components have ages, as the step is told; see `transformation`.
      ranks: Trained trees of all trials -> what the state holds for allocators.
      where: Shapes of the state -> where it comes to lie; None: where JAX puts it.
    """
    count = len(seeds)
    tables = optimizers.tables(optims)
    if weights:
        tables = [{**a, **b} for a, b in zip(tables, weights, strict=True)]
    constants = {
        name: np.array([table[name] for table in tables], np.float32)
        for name in tables[0]
    }

    each = [dials] * count if isinstance(dials, Mapping) else list(dials)

    def begin(keys: Any, dials: Any, constants: Any, given: Any) -> TrainState:
        trained = jax.vmap(lambda key: init_trained(key, *given))(keys)
        return TrainState(
            step=jnp.int32(0),
            trained=trained,
            opt=jax.vmap(lambda t: optimizers.init(optims[0], t, roles, ages))(trained),
            dials=jax.tree.map(lambda *leaves: jnp.stack(leaves), *dials),
            constants=constants,
            key=keys,
            best=trained,
            best_value=jnp.full(count, NO_VALUE, jnp.float32),
            best_step=jnp.full(count, -1, jnp.int32),
            skipped=jnp.zeros(count, jnp.int32),
            live=jnp.ones(count, bool),
            ranks=ranks(trained),
        )

    keys = jnp.stack([trial_key(seed) for seed in seeds])
    # One program: op by op, each of some fifty small ones would be compiled alone.
    given = () if base is None else (dict(base),)
    args = (keys, each, constants, given)
    out = None if where is None else where(jax.eval_shape(begin, *args))
    return jax.jit(begin, out_shardings=out)(*args)


def on_mesh(
    state: TrainState, mesh: Mesh, splits: Mapping[str, PartitionSpec] | None = None
) -> TrainState:
    """A tree of where every leaf of a pack's state lies.

    Trials along the trial axis, if there is one. Factors, their best ones, and whatever
    an optimizer holds for each of their entries are split alike; all else is whole.

    Args:
      state: A pack's state, or its shapes.
      mesh: The devices.
      splits: Joined path in the trained tree -> what splits it, without the axis of
        trials; what is not named is whole.
    """
    splits, trial = splits or {}, by_trial(mesh)
    shapes = {path: leaf.shape for path, leaf in flatten(state.trained)[0].items()}

    def lay(path: str, leaf: Any) -> NamedSharding:
        # Moments lie below fields of the optimizer: the end of a path tells whose.
        parts = path.split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            own = splits.get(name)
            if own and leaf.shape == shapes[name]:
                return NamedSharding(mesh, PartitionSpec(trial_axis(mesh), *own))
        return trial

    placed = {}
    for field in dataclasses.fields(TrainState):
        leaves, structure = flatten(getattr(state, field.name))
        found = {path: lay(path, leaf) for path, leaf in leaves.items()}
        placed[field.name] = structure.unflatten(found)
    return TrainState(**{**placed, "step": replicated(mesh)})


def settle(
    state: TrainState,
    values: Float[ArrayLike, " trials"],
    live: Bool[ArrayLike, " trials"],
) -> TrainState:
    """Keeps the trained tree of every trial whose validation value is a new best.

    Where ranks move, only what trained with the last ones may be the best: earlier
    states have more components than the budget, and other gates than those that stay.

    Args:
      state: Donated; what comes out lies where it lay.
      values: Validation values, the largest the best; the lowest float, `NO_VALUE`,
        where there is none.
      live: Which trials go on from here; one that has ended never does.
    """
    leaves, structure = jax.tree.flatten(state)
    where = tuple(leaf.sharding for leaf in leaves)
    return _settling(structure, where)(state, values, live)


@functools.cache
def _settling(structure: Any, where: tuple[Sharding, ...]) -> Callable[..., TrainState]:
    # Compiled steps take a state only as it lies on the mesh: left to itself, the
    # compiler may put an output elsewhere.
    out = jax.tree.unflatten(structure, where)
    return jax.jit(_settled, donate_argnums=0, out_shardings=out)


def _settled(state: TrainState, values: Array, live: Array) -> TrainState:
    better = values > state.best_value
    if state.ranks:
        better &= state.step > state.ranks["constants"]["end"]

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

    return state.replace(
        best=jax.tree.map(keep, state.trained, state.best),
        best_value=jnp.where(better, values, state.best_value),
        best_step=jnp.where(better, state.step, state.best_step),
        live=state.live & live,
    )
