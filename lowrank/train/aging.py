"""Ages: how many updates each component has had, for one that is born in mid-run.

Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1) starts its moments at zero and so
divides them by 1 - b^t:

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    update = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

There t counts the updates of the whole run. A component that is opened late has had
none: under a steady gradient its first update is (1 - b1) / sqrt(1 - b2) = 3.16 times
the learning rate at b1 = 0.9, b2 = 0.999, its twelfth 6.57 times, and hundreds go by
before it is what it should be. Here t is the component's own, `(*stack, max_rank)`.

The counting is still optax's, mapped over the slices of a factor by `jax.vmap`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lowrank.core.arrays import Roles, Trained
from lowrank.core.errors import BadInput, UnknownName, nearest

#: Along axes of these roles the slices of a factor are born and age one by one.
_COUNTED = ("stack", "rank")
#: Path -> which components begin anew, (*stack, max_rank).
Born = Mapping[str, Bool[Array, "..."]]


class Aged(NamedTuple):
    """Adam's state with ages, each field in the structure of the trained tree.

    Attributes:
      age: Updates had, int32: (*stack, max_rank) for a factor with axes of both roles,
        a scalar for a weight that is trained whole.
      mu, nu: The moments, in the shapes of what is trained.
    """

    age: Any
    mu: Any
    nu: Any


def by_component(
    adam: optax.GradientTransformation, roles: Roles
) -> optax.GradientTransformation:
    """`adam` for every component by itself, each with a count of its own.

    With all counts equal it is `adam`: no term of it mixes entries. A factor without a
    "rank" axis counts layer by layer, and once if it has no "stack" axis either.

    Args:
      adam: Any transformation whose state is optax's `ScaleByAdamState`.
      roles: What the axes of the factors are for.
    """

    def init(trained: Trained) -> Aged:
        whole: Any = adam.init(trained)
        leaves, structure = jax.tree.flatten(trained)
        ages = [
            jnp.broadcast_to(whole.count, [leaf.shape[d] for d in axes])
            for leaf, axes in zip(leaves, _axes(trained, roles, structure), strict=True)
        ]
        return Aged(structure.unflatten(ages), whole.mu, whole.nu)

    def update(updates: Any, state: Aged, params: Any = None) -> tuple[Any, Aged]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        slots = [structure.flatten_up_to(field) for field in state]
        axes = _axes(updates, roles, structure)
        moved, after = [], []
        for leaf, own, age, mu, nu in zip(leaves, axes, *slots, strict=True):
            slot = optax.ScaleByAdamState(count=age, mu=mu, nu=nu)
            one, new = _sliced(adam, own)(leaf, slot)
            moved.append(one)
            after.append((new.count, new.mu, new.nu))
        fields = [structure.unflatten(field) for field in zip(*after, strict=True)]
        return structure.unflatten(moved), Aged(*fields)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def of_ages(
    masks: Mapping[str, Mapping[str, Array]], roles: Roles
) -> dict[str, dict[str, Array]]:
    """Masks of factors as masks of their ages: which slices have an entry that moves.

    Args:
      masks: Path -> factor -> mask that broadcasts to the factor, axis by axis.
      roles: What the axes of the factors are for.
    """

    def reduced(path: str, name: str, mask: Array) -> Array:
        counted = _counted(told(roles, path, name))
        return mask.any(axis=[d for d in range(mask.ndim) if d not in counted])

    return {
        path: {name: reduced(path, name, mask) for name, mask in own.items()}
        for path, own in masks.items()
    }


def reborn(opt: optax.OptState, born: Born, roles: Roles) -> optax.OptState:
    """The state with components at age zero and without moments; pure.

    Everything else keeps its bits. A factor without a "rank" axis belongs to no single
    component and is left alone; components that all layers share begin anew where all
    layers say so.

    Args:
      opt: One trial's, made with ages; under `jax.vmap`, that of a pack.
      born: Components that begin anew; paths left out have none.
      roles: What the axes of the factors are for.

    Raises:
      BadInput: The state has no ages, or a mask does not fit the components.
      UnknownName: A path is not that of a correction.
    """
    is_aged = lambda part: isinstance(part, Aged)
    if not any(map(is_aged, jax.tree.leaves(opt, is_leaf=is_aged))):
        raise BadInput(
            "a component can begin anew only where each has an age, and this optimizer "
            "counts once for all: make its state and its step with ages=True"
        )
    renew = lambda part: _renewed(part, born, roles) if is_aged(part) else part
    return jax.tree.map(renew, opt, is_leaf=is_aged)


def told(roles: Roles, path: str, name: str) -> tuple[str, ...]:
    """The roles of a factor's axes.

    Raises:
      BadInput: They are not among `roles`.
    """
    if name not in roles.get(path, {}):
        raise BadInput(
            f"what the axes of {path}/{name} are for is not known, which ages and "
            "optim.b_ratio ask for: give roles=adapted.roles()"
        )
    return roles[path][name]


def _renewed(state: Aged, born: Born, roles: Roles) -> Aged:
    age, mu, nu = ({**part} for part in state)
    for path, mask in born.items():
        if path not in roles:
            raise UnknownName(
                f"born[{path!r}] is no correction of this model. Nearest: "
                f"{nearest(path, roles)}"
            )
        age[path], mu[path], nu[path] = ({**part[path]} for part in (age, mu, nu))
        for name, own in roles[path].items():
            if "rank" not in own:
                continue
            new = _along(own, mask, age[path][name].shape, f"{path}/{name}")
            lone = [d for d, role in enumerate(own) if role not in _COUNTED]
            whole = jnp.expand_dims(new, lone)
            age[path][name] = jnp.where(new, 0, age[path][name])
            mu[path][name] = jnp.where(whole, 0, mu[path][name])
            nu[path][name] = jnp.where(whole, 0, nu[path][name])
    return Aged(age, mu, nu)


def _along(
    own: tuple[str, ...], mask: Array, shape: tuple[int, ...], where: str
) -> Array:
    """A mask (*stack, max_rank) of components as one of a factor's ages."""
    counted = [role for role in own if role in _COUNTED]
    fitting = mask
    if "stack" not in counted:
        fitting = mask.all(axis=list(range(mask.ndim - 1)))
    fitting = jnp.moveaxis(fitting, -1, counted.index("rank"))
    if fitting.shape != shape:
        raise BadInput(
            f"born has a mask of shape {mask.shape} for {where}, whose components are "
            f"{shape}: one entry per layer of the stack and component, as in its gate"
        )
    return fitting


def _sliced(adam: optax.GradientTransformation, axes: tuple[int, ...]) -> Any:
    """(gradient, state) -> (update, state), slice by slice along `axes`."""

    def run(gradient: Array, state: optax.ScaleByAdamState) -> tuple[Any, Any]:
        return adam.update(gradient, state)

    function: Any = run
    # From the innermost map out: each sees the array without the axes mapped before.
    for nesting in reversed(range(len(axes))):
        at = axes[nesting] - nesting
        own = optax.ScaleByAdamState(count=0, mu=at, nu=at)
        function = jax.vmap(function, in_axes=(at, own), out_axes=(at, own))
    return function


def _axes(trained: Trained, roles: Roles, structure: Any) -> list[tuple[int, ...]]:
    """For every leaf of a trained tree the axes along which it counts."""
    tree = {
        path: {name: _counted(told(roles, path, name)) for name in own}
        if isinstance(own, Mapping)
        else jax.tree.map(lambda leaf: (), own)
        for path, own in trained.items()
    }
    return structure.flatten_up_to(tree)


def _counted(own: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(d for d, role in enumerate(own) if role in _COUNTED)
