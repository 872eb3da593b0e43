"""A start from an earlier adapter, instead of from a drawn one that changes nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapt.attach import Adapted
from lowrank.core.arrays import Dials, Trained
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA
from lowrank.io.adapter import Adapter, spread
from lowrank.io.peft import MODEL, read_adapter
from lowrank.io.sources import sha256_of
from lowrank.run.problem import Problem, Shipping
from lowrank.run.settings import Settings

#: Drawn trained tree of a trial -> what it starts from.
Warm = Callable[[Trained], Trained]


def warm_start(
    settings: Settings, problem: Problem, adapted: Adapted, dials: Dials
) -> Warm | None:
    """What `delta.start` names, checked against the model; None if nothing is named.

    Components that the earlier adapter has begin as they were, with its scale; further
    ones are drawn, and change nothing at first.

    Args:
      settings: Of the trial.
      problem: Its base and how that is called in PEFT.
      adapted: The model in the common shape of the pack.
      dials: The trial's own, in that shape.

    Raises:
      BadInput: There is no adapter, it is of another base, or it does not fit.
    """
    if settings.start is None:
        return None
    shipping = problem.shipping(settings)
    odd = [path for path in adapted.sites if type(adapted.recipe(path)) is not LoRA]
    if shipping is None or odd:
        raise BadInput(
            "delta.start reads adapters of LoRA on Hugging Face models, and this run "
            f"has {'another delta' if odd else 'a base of another kind'}: set "
            "delta=lora, or leave delta.start out"
        )
    adapter = _read(settings.start, problem.base.fingerprint)
    _check_head(adapter, shipping, settings)
    adapter = _in_unit(adapter, shipping)
    kernel = lambda module: shipping.kernel(module, settings.base.scan)
    # With shapes alone: what does not fit is said before anything compiles.
    _, gates = spread(adapter, adapted.trained_shapes(), dials, kernel)
    for path, own in gates.items():
        taken, room = np.asarray(own["gate"]) > 0, np.asarray(dials[path]["gate"]) > 0
        if (taken & ~room).any():
            raise BadInput(
                f"the adapter {settings.start} has rank {int(taken.sum(-1).max())} at "
                f"{path}, and the run {int(room.sum(-1).min())}: give it at least as "
                "many, with delta.rank or delta.ranks"
            )
    return lambda drawn: _filled(adapter, drawn, dials, kernel)


def fingerprint_of(given: str) -> str:
    """sha256 of the weights that `delta.start` names.

    Raises:
      BadInput: There are none.
    """
    file = _folder(given) / MODEL
    if not file.is_file():
        raise BadInput(
            f"delta.start = {given!r} has no {MODEL}: give the folder of an adapter, "
            "or of a finished run"
        )
    return sha256_of(file)


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    # Of a run, its adapter.
    own = folder / "adapter"
    return own if own.is_dir() else folder


def _read(given: str, fingerprint: str) -> Adapter:
    return read_adapter(_folder(given), base_fingerprint=fingerprint)


def _check_head(adapter: Adapter, shipping: Shipping, settings: Settings) -> None:
    """Refuses a head whose outputs mean something else here."""
    for name, place in (("pooling", "base.pooling"), ("classes", "the data's classes")):
        before, now = (one.get(name) for one in (adapter.notes, shipping.notes))
        if adapter.whole and before is not None and before != now:
            shown = lambda x: f"{len(x)}, as {x[0]!r}" if isinstance(x, list) else x
            raise BadInput(
                f"delta.start = {settings.start!r} was trained with other "
                f"{place}: {shown(before)}, and here {shown(now)}; its head would be "
                "read wrongly. Give the same, in the same order"
            )


def _in_unit(adapter: Adapter, shipping: Shipping) -> Adapter:
    """The adapter with a head that tells numbers in this run's unit.

    A head of numbers gives z = (v - m) / s for the mean m and deviation s of what it
    was trained on; with those of this run, v is z s / s' + (m - m') / s'.
    """
    before, now = adapter.notes, shipping.notes
    if "scale" not in before or "scale" not in now:
        return adapter
    ratio = before["scale"] / now["scale"]
    shift = (before["mean"] - now["mean"]) / now["scale"]
    bias = lambda name: name.endswith(".bias")
    whole = {
        name: (value * ratio + (shift if bias(name) else 0.0)).astype(value.dtype)
        for name, value in adapter.whole.items()
    }
    return dataclasses.replace(adapter, whole=whole)


def _filled(
    adapter: Adapter,
    drawn: Trained,
    dials: Dials,
    kernel: Callable[[str], tuple[str, int | None]],
) -> Trained:
    filled, gates = spread(adapter, drawn, dials, kernel)
    found: dict[str, Any] = {}
    for path, own in drawn.items():
        if not isinstance(own, Mapping):
            found[path] = np.asarray(filled[path], own.dtype)
            continue
        gate = np.asarray(gates[path]["gate"]) > 0
        parts = {}
        for name, fresh in own.items():
            wide = gate.reshape(*gate.shape, *[1] * (fresh.ndim - gate.ndim))
            parts[name] = np.where(wide, filled[path][name], fresh).astype(fresh.dtype)
        found[path] = parts
    return jax.tree.map(jnp.asarray, found)
