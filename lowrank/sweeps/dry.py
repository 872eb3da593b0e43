"""What a sweep would be: trials, packs, memory, compiles and time; nothing is run."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank.cost.room import GIB
from lowrank.run.prepare import prepare
from lowrank.run.preview import preview
from lowrank.run.settings import Settings
from lowrank.run.sweep import SweepSpec
from lowrank.sweeps.group import Trial, program, static_key
from lowrank.sweeps.launch import Plan
from lowrank.sweeps.plan import Planned
from lowrank.sweeps.width import Memory, memory_limit

#: Side and number of the products by which the device's speed is measured.
_SIDE, _PRODUCTS = 1024, 5


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a pack is expected to cost.

    Attributes:
      parameters: Trained ones, of each trial that has the pack's largest rank.
      steps: Of each trial.
      shapes: Batch shapes, each of which is compiled.
      peak_bytes: What one device must hold; None if the compiler does not tell.
      seconds: Training time of the pack.
      measured: Whether the time comes from finished trials rather than from FLOPs.
    """

    parameters: int
    steps: int
    shapes: int
    peak_bytes: int | None
    seconds: float
    measured: bool


def show_plan(
    plan: Plan, memory: Memory, spec: SweepSpec, console: Console | None = None
) -> dict[str, Any]:
    """Prints what a sweep would do, and returns its sums.

    Compiles one step per program, as the sweep itself would, and times a few products
    of matrices; trains nothing.

    Returns:
      "trials", "finished", "refused", "packs", "programs" (compiled steps), "seconds".
    """
    console = console or Console()
    refused = {id: o.error for id, o in plan.known.items() if o.error is not None}
    costs = _costs(plan, memory)
    console.print(_trials(plan, refused))
    console.print(_packs(plan.packs, costs, spec))
    for number, group in enumerate(_static(plan.packs), 1):
        console.print(f"static key {group[0].key} ({number}): " + _told(group, plan))
    for trial_id, reason in plan.alone.items():
        console.print(f"trial {trial_id} runs alone: {reason}", markup=False)
    for trial_id, error in refused.items():
        console.print(f"trial {trial_id} is refused: {error}", markup=False)
    parts = {}
    for race in plan.races:
        console.print(f"static key {race.trials[0].key}: {race.told()}", markup=False)
        parts[race.trials[0].key] = race.share()
    programs = {program(pack.trials): costs[pack.id].shapes for pack in plan.packs}
    found = {
        "trials": len(plan.trials),
        "finished": len(plan.known) - len(refused),
        "refused": len(refused),
        "packs": len(plan.packs),
        "programs": sum(programs.values()),
        "seconds": sum(
            costs[pack.id].seconds * parts.get(pack.trials[0].key, 1.0)
            for pack in plan.packs
        ),
    }
    measured = bool(costs) and all(cost.measured for cost in costs.values())
    source = (
        "from the steps of finished trials"
        if measured
        else "from FLOPs at the measured speed of a matrix product: a lower bound"
    )
    console.print(
        f"{found['trials']} trials, {found['finished']} finished, {found['refused']} "
        f"refused; {found['packs']} packs, {found['programs']} steps to compile; "
        f"training {_duration(found['seconds'])}, {source}; nothing was run"
    )
    return found


def _costs(plan: Plan, memory: Memory) -> dict[str, Cost]:
    """The cost of every pack by its id; equal programs are compiled once."""
    known: dict[tuple, Cost] = {}
    speed = _speed() if plan.packs else 1.0
    timings = _timings(plan)
    found = {}
    for pack in plan.packs:
        kind = program(pack.trials)
        if kind not in known:
            largest = max(pack.trials, key=lambda trial: trial.rank).settings
            known[kind] = _cost(largest, pack, memory, speed, timings.get(kind[0]))
        found[pack.id] = known[kind]
    return found


def _cost(
    settings: Settings,
    pack: Planned,
    memory: Memory,
    speed: float,
    seconds_per_step: float | None,
) -> Cost:
    count = len(pack.trials)
    shown = preview(prepare(settings))
    peak = memory(settings, [count])[count]
    each = seconds_per_step or shown["step"]["flops"] / speed
    return Cost(
        shown["sizes"]["trained_parameters"],
        shown["steps"],
        len(shown["batches"]),
        peak,
        each * shown["steps"] * count,
        seconds_per_step is not None,
    )


def _timings(plan: Plan) -> dict[str, float]:
    """Median seconds of a trial's step, by static key, from finished trials."""
    found: dict[str, list[float]] = {}
    for trial in plan.trials:
        outcome = plan.known.get(trial.id)
        costs = (outcome.result or {}).get("costs", {}) if outcome else {}
        if (seconds := costs.get("step_median_seconds")) is not None:
            # A pack's step serves all of its trials.
            each = seconds / max(costs.get("num_trials") or 1, 1)
            found.setdefault(trial.key, []).append(each)
    return {key: sorted(times)[len(times) // 2] for key, times in found.items()}


def _speed() -> float:
    """FLOP/s of a product of matrices on this device."""
    x = jnp.ones((_SIDE, _SIDE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    began = time.perf_counter()
    for _ in range(_PRODUCTS):
        jax.block_until_ready(product(x))
    return 2 * _SIDE**3 * _PRODUCTS / (time.perf_counter() - began)


def _trials(plan: Plan, refused: dict) -> Table:
    table = Table(title="Trials")
    for name in ("job", "trial", "differs in", "pack"):
        table.add_column(name, overflow="fold")
    home = {t.id: pack for pack in plan.packs for t in pack.todo}
    for trial in plan.trials:
        where = "refused" if trial.id in refused else "finished"
        if trial.id in home:
            pack = home[trial.id]
            where = f"{pack.id}{' (continued)' if pack.continued else ''}"
        table.add_row(str(trial.number), trial.id, escape(trial.label), where)
    return table


def _packs(packs: Sequence[Planned], costs: dict[str, Cost], spec: SweepSpec) -> Table:
    meshes = [pack.trials[0].settings.mesh.sizes() for pack in packs]
    num_devices = max((math.prod(sizes.values()) for sizes in meshes), default=1)
    limit, source = memory_limit(spec, num_devices)
    room = "" if limit is None else f", {limit / GIB:.1f} GiB each ({source})"
    table = Table(title=f"Packs{room}")
    for name in ("pack", "static key"):
        table.add_column(name, no_wrap=True)
    for name in ("trials", "rank", "parameters", "steps", "memory", "time"):
        table.add_column(name, justify="right")
    for pack in packs:
        key, count, rank = program(pack.trials)
        cost = costs[pack.id]
        peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.0f} MiB"
        table.add_row(
            pack.id,
            key,
            f"{len(pack.todo)} of {count}" if len(pack.todo) < count else str(count),
            str(rank),
            f"{cost.parameters:,}",
            f"{cost.steps:,}",
            peak,
            _duration(cost.seconds),
        )
    return table


def _static(packs: Sequence[Planned]) -> list[list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for pack in packs:
        found.setdefault(pack.trials[0].key, []).extend(pack.todo)
    return list(found.values())


def _told(group: Sequence[Trial], plan: Plan) -> str:
    """What is special about a static key: where it differs from the sweep's others."""
    mine = static_key(group[0].settings)
    tables = [static_key(trial.settings) for trial in plan.trials]
    odd = [n for n in sorted(mine) if any(t.get(n) != mine[n] for t in tables)]
    told = ", ".join(f"{name}={mine[name]}" for name in odd) or "all trials agree"
    return f"{len(group)} trials, {escape(told)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
