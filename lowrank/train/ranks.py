"""Ranks that move: what an allocator does to a pack, around its vmapped step.

    before step t   events of those trials that are due: gates, factors, moments, ages
    step t          with these gates; it knows nothing of allocators
    after step t    what the step measured, of those trials that measure

An event is named by the step that follows, and a measurement is of what its step
computed with: the factors before their update, and the task's gradient at them.

All of it stands outside the map over trials, under conditions on all of them at once: a
condition inside would compute both branches, in every step. So a step pays only for
what it does, and only what an event may change passes through its condition.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lowrank.allocate import signals, transitions, truncate
from lowrank.allocate.allocation import Allocation
from lowrank.allocate.importance import Memory, Signals
from lowrank.allocate.selectors import GAINING
from lowrank.allocate.slots import Slots
from lowrank.core.arrays import Dials, Frozen, Key, Roles, Trained
from lowrank.core.errors import NonFinite
from lowrank.deltas.thin import Terms, Thin
from lowrank.train import aging
from lowrank.train.probes import OF_EXAMPLES, OF_PASS
from lowrank.train.state import TrainState

#: Whether every importance was a number so far: of the metrics, for the loop alone.
SOUND = "sound"
#: (frozen, trained, dials, constants, batch) -> signals by name, each path -> (*stack,
#: max_rank): see `train.ablation`.
Gauge = Callable[..., Mapping[str, Mapping[str, Array]]]
#: (function of one trial, its arguments with an axis of trials) -> results with one.
MapTrials = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class RankEvents:
    """How the ranks of a pack move.

    Attributes:
      allocation: The allocator on the layout of the pack.
      constants: Its numbers, with an axis of trials.
      zeroed: Path -> the factor that is zero in a component that says nothing.
      thin: How corrections are read, by path; for signals that look at their size.
      roles: What the axes of the factors are for; births ask for it.
      gauge: Runs the model once more; for signals that need it.
    """

    allocation: Allocation
    constants: Mapping[str, np.ndarray]
    zeroed: Mapping[str, str]
    thin: Mapping[str, Thin] = dataclasses.field(default_factory=dict)
    roles: Roles = dataclasses.field(default_factory=dict)
    gauge: Gauge | None = None

    @property
    def births(self) -> bool:
        """Whether components begin anew in mid-run, so that they need ages."""
        program = self.allocation.program
        return program.selector in GAINING or program.squeezed

    @property
    def of_step(self) -> frozenset[str]:
        """The signals that the step itself has to tell."""
        return self.allocation.needs & (OF_PASS | {"gradients"})

    @property
    def looks_first(self) -> bool:
        """Whether something is measured once, before the first step."""
        return bool(self.allocation.needs & signals.ONCE)

    @property
    def of_examples(self) -> bool:
        """Whether what is measured has to hold for every example by itself."""
        return bool(self.allocation.needs & OF_EXAMPLES)

    @property
    def _slots(self) -> Slots:
        return self.allocation.slots

    def opened(self, dials: Sequence[Dials]) -> list[dict[str, dict[str, Any]]]:
        """Every trial's dials with the gates of its first step."""
        found = []
        for trial, own in enumerate(dials):
            constants = {name: value[trial] for name, value in self.constants.items()}
            gates = self._slots.parts(self.allocation.gates(constants))
            found.append(_with_gates(own, gates))
        return found

    def begin(self, trained: Trained) -> dict[str, Any]:
        """What a pack's state holds for its allocator before the first step.

        Args:
          trained: Of all trials, with their axis.

        Returns:
          "memory" of the allocator, the "constants" of every trial, and the "history":
          of every layer, after each event that was, the rank and the components that
          were not kept before it. A vector of components rests as path -> (*stack,
          max_rank), whose meaning does not depend on how many components the neighbors
          in a pack make a trial hold.
        """
        events = max(int(np.asarray(self.constants["due"]).sum(axis=-1).max()), 1)

        def one(trained: Trained) -> dict[str, Any]:
            blank = jnp.zeros((events, self._slots.num_layers), jnp.int32)
            history = {"ranks": blank, "gained": blank, "count": jnp.int32(0)}
            memory = self._rest(self.allocation.init(trained))
            return {"memory": memory, "history": history}

        constants = {name: jnp.asarray(x) for name, x in self.constants.items()}
        return {**jax.vmap(one)(trained), "constants": constants}

    def looked(
        self, state: TrainState, signals: Sequence[Mapping[str, Mapping[str, Array]]]
    ) -> TrainState:
        """The state before the first step with what was measured once.

        Args:
          state: Of the pack.
          signals: Of each trial by name, path -> (*stack, max_rank).
        """
        slots, ranks = self._slots, state.ranks
        seen = []
        for trial, given in enumerate(signals):
            own = lambda tree, t=trial: jax.tree.map(lambda x: x[t], tree)
            flat = {name: slots.flat(parts) for name, parts in given.items()}
            memory = self.allocation.observe(
                self._flat(own(ranks["memory"])), flat, 0, own(ranks["constants"])
            )
            seen.append(self._rest(memory))
        memory = jax.tree.map(lambda *each: jnp.stack(each), *seen)
        return state.replace(ranks={**ranks, "memory": memory})

    def before(self, state: TrainState) -> TrainState:
        """The state after the events that are due; a trial that has ended has none."""
        constants = state.ranks["constants"]
        due = jax.vmap(lambda own: self.allocation.due(state.step, own))(constants)
        due &= state.live
        changing: dict[str, Any] = {
            "gates": {path: state.dials[path]["gate"] for path in self._slots.paths},
            "memory": state.ranks["memory"],
            "history": state.ranks["history"],
        }
        if self.births or self.allocation.program.revivable:
            changing["trained"] = {p: state.trained[p] for p in self._slots.paths}
        if self.births:
            changing["opt"] = state.opt

        def run(old: dict[str, Any]) -> dict[str, Any]:
            one = lambda own, key, dials, c: self._event(own, key, state.step, dials, c)
            found = jax.vmap(one)(old, state.key, state.dials, constants)
            return _where(due, found, old)

        new = lax.cond(jnp.any(due), run, lambda old: old, changing)
        ranks = {name: new[name] for name in ("memory", "history")}
        return state.replace(
            dials=_with_gates(state.dials, new["gates"]),
            trained={**state.trained, **new.get("trained", {})},
            opt=new.get("opt", state.opt),
            ranks={**state.ranks, **ranks},
        )

    def _event(
        self,
        own: dict[str, Any],
        key: Key,
        step: Array,
        dials: Dials,
        constants: Mapping,
    ) -> dict[str, Any]:
        """The event of one trial, whether or not it is due."""
        slots, allocation = self._slots, self.allocation
        before, shown = self._flat(own["memory"]), slots.flat(own["gates"])
        gates, memory = allocation.event(before, shown, step, key, constants)
        # At first all are kept, the shut ones too.
        gained = memory["kept"] * ((before["kept"] == 0) | (shown == 0))
        found = {
            **own,
            "gates": slots.parts(gates),
            "memory": self._rest(memory),
            "history": _written(
                own["history"],
                ranks=slots.open_ranks(memory["kept"]),
                gained=slots.open_ranks(gained),
            ),
        }
        if self.births:
            born = {
                path: transitions.births(own["gates"][path], gate)
                for path, gate in found["gates"].items()
            }
            found["trained"] = {
                path: transitions.reborn(factors, born[path], self.zeroed[path])
                for path, factors in own["trained"].items()
            }
            found["opt"] = aging.reborn(own["opt"], born, self.roles)
        if allocation.program.squeezed:
            found["trained"] = {
                path: truncate.written(factors, dials[path], self.thin[path])
                for path, factors in own["trained"].items()
            }
            every = {p: jnp.ones(x.shape, bool) for p, x in own["gates"].items()}
            found["opt"] = aging.reborn(own["opt"], every, self.roles)
        if allocation.program.revivable:
            kept = slots.parts(memory["kept"])
            found["trained"] = {
                path: transitions.revivable(factors, kept[path], self.zeroed[path])
                for path, factors in own["trained"].items()
            }
        return found

    def measuring(self, state: TrainState) -> Bool[Array, " trials"]:
        """Which trials measure in the step that follows; ended ones do not."""
        one = lambda own: self.allocation.measures(state.step, own)
        return jax.vmap(one)(state.ranks["constants"]) & state.live

    def after(
        self,
        before: TrainState,
        after: TrainState,
        due: Bool[Array, " trials"],
        seen: Mapping[str, Any],
        frozen: Frozen,
        batch: Mapping[str, Array],
        over: MapTrials,
    ) -> TrainState:
        """The state with what the step has measured.

        Args:
          before: What the step computed with.
          after: What came of it.
          due: Whose measurements count: of those that measure, whose step was finite.
          seen: What the step told, of `of_step`.
          frozen: The base.
          batch: Of all trials.
          over: Maps over trials.
        """
        ranks = before.ranks
        if not self.allocation.measure_every:
            # What is needed, if anything, was measured before the first step.
            return after.replace(ranks=ranks)

        def run(memory: Any) -> Any:
            def observe(own, trained, dials, constants, seen, weights, batch):
                given = self._signals(frozen, trained, dials, seen, weights, batch)
                seen = self.allocation.observe(
                    self._flat(own), given, before.step, constants
                )
                return self._rest(seen)

            new = over(observe)(
                memory, before.trained, before.dials, ranks["constants"], seen,
                before.constants, batch,
            )  # fmt: skip
            return _where(due, new, memory)

        memory = lax.cond(jnp.any(due), run, lambda own: own, ranks["memory"])
        return after.replace(ranks={**ranks, "memory": memory})

    def _signals(
        self,
        frozen: Frozen,
        trained: Trained,
        dials: Dials,
        seen: Mapping[str, Any],
        constants: Mapping[str, Array],
        batch: Mapping[str, Array],
    ) -> Signals:
        """The signals that are needed, of one trial."""
        needs, slots = self.allocation.needs, self._slots
        found: dict[str, Any] = {}
        if "factors" in needs:
            found["factors"] = {path: trained[path] for path in slots.paths}
        if "gradients" in needs:
            found["gradients"] = {p: seen["gradients"][p] for p in slots.paths}
        # In one order always: programs of several processes must be one.
        found |= {name: slots.flat(seen[name]) for name in sorted(needs & OF_EXAMPLES)}
        of_size: dict[str, Callable[[Mapping[str, Terms]], Mapping[str, Array]]] = {
            "norms": lambda sites: {p: signals.norms(t) for p, t in sites.items()},
            "spectrum": signals.spectra,
            "activations": lambda sites: {
                p: signals.energies(t, _by_layer(seen["activations"][p]))
                for p, t in sites.items()
            },
        }
        for name in sorted(of_size.keys() & needs):
            sites = {
                p: thin.terms(trained[p], dials[p]) for p, thin in self.thin.items()
            }
            parts = of_size[name](sites).items()
            found[name] = slots.flat(
                {p: x.reshape(dials[p]["gate"].shape) for p, x in parts}
            )
        if self.gauge is not None:
            measured = self.gauge(frozen, trained, dials, constants, batch)
            found |= {n: slots.flat(x) for n, x in measured.items() if n in needs}
        return found

    def told(self, state: TrainState) -> dict[str, Array]:
        """What a step reports, of every trial.

        "ranks/budget" counts what the last event kept, "ranks/forward_budget" what the
        step computes with, both in the budget's unit.
        """
        slots = self._slots
        one = self.allocation.program.unit == "components"
        price = np.ones_like(slots.cost) if one else slots.cost
        price = jnp.asarray(price[slots.layer], jnp.int32)

        def count(dials: Dials, memory: Any) -> dict[str, Array]:
            gates = slots.flat({p: dials[p]["gate"] for p in slots.paths}) != 0
            memory = self._flat(memory)
            kept = gates & (memory["kept"] != 0)
            spent = lambda held: jnp.sum(jnp.where(held, price, 0))
            return {
                "ranks/budget": spent(kept),
                "ranks/forward_budget": spent(gates),
                SOUND: memory["sound"],
            }

        return jax.vmap(count)(state.dials, state.ranks["memory"])

    def _rest(self, memory: Memory) -> Any:
        """Vectors of components by path, as a state holds them."""

        def parted(x: Array) -> Any:
            if x.shape != (self._slots.num_components,):
                return x
            parts = self._slots.parts(x.astype(jnp.float32))
            return {path: part.astype(x.dtype) for path, part in parts.items()}

        return jax.tree.map(parted, dict(memory))

    def _flat(self, rest: Any) -> Memory:
        """The inverse of `_rest`."""
        shapes = {c.path: (*c.stack, c.max_rank) for c in self._slots.competitors}

        def is_vector(x: Any) -> bool:
            # By shapes too: sites may have the names of factors.
            if not isinstance(x, Mapping) or {*x} != {*shapes}:
                return False
            return {p: getattr(own, "shape", None) for p, own in x.items()} == shapes

        join = lambda x: self._restored(x) if is_vector(x) else x
        return jax.tree.map(join, rest, is_leaf=is_vector)

    def _restored(self, parts: Mapping[str, Array]) -> Array:
        kind = next(iter(parts.values())).dtype
        return self._slots.flat(parts).astype(kind)


def unsound(position: int, trial: int) -> NonFinite:
    """The error of a trial whose event had nothing to go by."""
    return NonFinite(
        f"the ranks of trial {trial} cannot be chosen before step {position}: the "
        "importance of a component is not a finite number, or nothing was measured "
        "yet. No rank was moved, and the last checkpoint is good. Lower optim.lr, or "
        "set another ranks.importance, a later ranks.begin or a smaller "
        "ranks.measure_every."
    )


def _with_gates(dials: Dials, gates: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        path: {**own, "gate": gates[path].astype(own["gate"].dtype)}
        if path in gates
        else dict(own)
        for path, own in dials.items()
    }


def _by_layer(gram: Array) -> Float[Array, "layers max_rank max_rank"]:
    return gram.reshape(-1, *gram.shape[-2:])


def _written(history: Mapping[str, Array], **row: Int[Array, " layers"]) -> Any:
    at = history["count"]
    rows = {name: history[name].at[at].set(values) for name, values in row.items()}
    return {**rows, "count": at + 1}


def _where(mask: Bool[Array, " trials"], new: Any, old: Any) -> Any:
    """`new` of the trials in the mask, `old` of the others."""
    wide = lambda x: mask.reshape(mask.shape + (1,) * (x.ndim - 1))
    return jax.tree.map(lambda n, o: jnp.where(wide(n), n, o), new, old)
