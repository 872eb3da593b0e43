"""The corrections of a run by Hugging Face module, and back.

A run holds factors by path, stacked over scanned layers and padded to `max_rank`; an
adapter file holds two plain matrices per module. Neither form loses anything.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lowrank.core.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Correction:
    """The correction of one module, as matrices that act from the right.

    Attributes:
      a: Goes down to the rank.
      b: Comes back up.
      scale: The correction is x a^T b times this.
      table: Whether the module looks rows up instead of multiplying.
    """

    a: Float[np.ndarray, "rank d_in"]
    b: Float[np.ndarray, "rank d_out"]
    scale: float
    table: bool = False

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds.

    Attributes:
      corrections: Module -> its correction; modules of rank 0 are left out.
      whole: Tensor -> weight that was trained whole, in PyTorch's layout.
      rsqrt: Whether scales are alpha / sqrt(r) instead of alpha / r.
      config: The whole adapter_config.json of a folder that was read.
      notes: The facts in its lowrank.json, where there is one.
    """

    corrections: Mapping[str, Correction]
    whole: Mapping[str, np.ndarray]
    rsqrt: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def collect(
    trained: Mapping[str, Any],
    dials: Mapping[str, Mapping[str, Any]],
    module_of: Callable[[str, int | None], str],
    *,
    rsqrt: bool = False,
) -> Adapter:
    """Takes the factors of a run apart into modules.

    Stacked layers become modules of their own; components whose gate is zero are cut
    away, and other gates are folded into `b`.

    Args:
      trained: Path -> {"a", "b"} of LoRA, or a whole matrix or vector.
      dials: Path -> {"gate", "scale"}.
      module_of: (path, layer or None) -> module.
      rsqrt: Which formula the stored alpha is meant for.

    Raises:
      BadInput: A weight is stacked over more than one axis.
    """
    corrections: dict[str, Correction] = {}
    whole: dict[str, np.ndarray] = {}
    for path, value in trained.items():
        if not isinstance(value, Mapping):
            name = "bias" if path.endswith("/bias") else "weight"
            whole[f"{module_of(path, None)}.{name}"] = _turned(path, _wide(value))
            continue
        gate, a, b = (
            _wide(one) for one in (dials[path]["gate"], value["a"], value["b"])
        )
        scale = float(dials[path]["scale"])
        if gate.ndim > 2:
            raise BadInput(
                f"{path!r} is stacked over {gate.ndim - 1} axes; an adapter file has "
                "one layer number per module"
            )
        stacked = gate.ndim > 1
        if not stacked:
            a, b, gate = a[None], b[None], gate[None]
        for layer in range(len(gate)):
            kept = np.flatnonzero(gate[layer])
            if not kept.size:
                continue
            flat = lambda x, layer=layer, kept=kept: x[layer, kept].reshape(
                len(kept), -1
            )
            module = module_of(path, layer if stacked else None)
            folded = flat(b) * gate[layer, kept][:, None]
            corrections[module] = Correction(flat(a), folded, scale, _is_table(path))
    return Adapter(corrections, whole, rsqrt)


def spread(
    adapter: Adapter,
    trained: Mapping[str, Any],
    dials: Mapping[str, Mapping[str, Any]],
    kernel_of: Callable[[str], tuple[str, int | None]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Puts modules back into the factors of a run: the inverse of `collect`.

    Ranks are filled up to the run's `max_rank` with closed gates, and a site that the
    adapter does not correct has none open. A scale that differs from the run's is
    folded into `b`. A layer of which the run opens no gate is frozen there.

    Args:
      adapter: What was read.
      trained: The trained tree to fill, for paths and shapes.
      dials: Its dials.
      kernel_of: Module -> (path, layer or None).

    Returns:
      A trained tree and dials of the shapes given.

    Raises:
      BadInput: A module or weight has no place in `trained`, is frozen in the run, does
        not fit it, or a weight that the run trains whole is missing.
    """
    filled = {path: _zeros(value) for path, value in trained.items()}
    gates = {
        path: {name: np.array(value) for name, value in own.items()}
        for path, own in dials.items()
    }
    frozen = {path: ~own["gate"].any(axis=-1) for path, own in gates.items()}
    for own in gates.values():
        own["gate"][...] = 0
    for module, one in adapter.corrections.items():
        path, layer = kernel_of(module)
        if path not in dials:
            raise BadInput(
                f"the adapter corrects {module}, which no rule adapts ({path}); attach "
                "the model with a rule that covers it"
            )
        a, b, gate = filled[path]["a"], filled[path]["b"], gates[path]["gate"]
        if layer is not None and layer < len(gate):
            a, b, gate = a[layer], b[layer], gate[layer]
        elif layer is not None:
            raise BadInput(f"the adapter corrects {module}; {path} has {len(gate)}")
        closed = np.asarray(frozen[path])
        if np.all(closed if layer is None else closed[layer]):
            raise BadInput(
                f"the adapter corrects {module}, which the run freezes ({path}); "
                "attach the model with rules that correct this layer too"
            )
        sizes = (one.a[0].size, one.b[0].size)
        if one.rank > len(a) or sizes != (a[0].size, b[0].size):
            raise BadInput(
                f"the adapter's {module} is {sizes[0]} x {sizes[1]} of rank "
                f"{one.rank}, but {path} is {a[0].size} x {b[0].size} and holds rank "
                f"{len(a)}; give the base it was trained on, and a rule with max_rank "
                "to match"
            )
        a[: one.rank] = one.a.reshape(one.rank, *a.shape[1:])
        ratio = one.scale / float(gates[path]["scale"])
        b[: one.rank] = ratio * one.b.reshape(one.rank, *b.shape[1:])
        gate[: one.rank] = 1
    missing = {
        path for path, value in trained.items() if not isinstance(value, Mapping)
    }
    for tensor, array in adapter.whole.items():
        path, layer = kernel_of(tensor.rpartition(".")[0])
        if tensor.endswith(".bias"):
            path = path.rpartition("/")[0] + "/bias"
        array = _turned(path, array)
        if (
            layer is not None
            or path not in missing
            or filled[path].shape != array.shape
        ):
            raise BadInput(
                f"the adapter's {tensor}, {array.shape} in our layout, has no place: "
                f"the run trains whole {', '.join(sorted(missing)) or 'nothing'}"
            )
        filled[path] = array.astype(np.float32)
        missing.remove(path)
    if missing:
        raise BadInput(
            f"the adapter lacks {', '.join(sorted(missing))}, which the run trains "
            "whole; it was made for a model without them"
        )
    return jax.tree.map(jnp.asarray, (filled, gates))


def _is_table(path: str) -> bool:
    return path.endswith("/embedding")


def _turned(path: str, array: np.ndarray) -> np.ndarray:
    """Between our layout of a whole weight and PyTorch's, in either direction."""
    return array if _is_table(path) else array.T


def _wide(value: Any) -> np.ndarray:
    """An array on the host in float32, or in float64 if that is what it is."""
    array = np.asarray(value)
    return array.astype(np.promote_types(array.dtype, np.float32))


def _zeros(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: np.zeros(x.shape, np.float32) for name, x in value.items()}
    return np.zeros(value.shape, np.float32)
