"""Which mesh, what to compute again, and how many micro-batches: the best that fit.

A program takes minutes to compile, and there are hundreds of candidates. A rough count
of bytes and seconds, of a Transformer's layers, says which few are compiled; what is
told of those is the compiler's.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank.core.errors import BadInput
from lowrank.core.trees import nbytes
from lowrank.cost.chips import Chip, topology_of
from lowrank.run.rehearsal import Rehearsal, Shape, rehearse, shape_of
from lowrank.run.settings import plain
from lowrank.sharding.mesh import MeshSpec

REMATS = ("none", "dots", "full")
MICRO_BATCHES = (1, 2, 4, 8)
#: Bytes that a layer keeps for the pass back, over those of its input, by what is
#: computed again; roughly, of a gated Transformer layer without its attention scores.
_KEPT = {"none": 24.0, "dots": 10.0, "full": 1.0}
#: Passes over the weights: forward and back, and forward again.
_PASSES = {"none": 2.0, "dots": 2.0, "full": 3.0}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay a step out.

    Attributes:
      data, fsdp, tensor: Devices along each axis.
      remat: See `BaseSpec.remat`.
      accumulate: Micro-batches.
      bytes: That a chip holds, roughly.
      seconds: That a step takes, roughly.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulate: int
    bytes: float
    seconds: float


def search(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rehearses the most promising candidates.

    Args:
      config: As `rehearse` takes it.

    Returns:
      "candidates": how many there are; "tried": reports of `rehearse`, those that fit
      first, the fastest by its estimate first.

    Raises:
      BadInput: See `rehearse`; or no candidate comes out even.
    """
    asked = plain(Rehearsal, config.get("rehearse"), "rehearse")
    mesh = plain(MeshSpec, config.get("mesh"), "mesh")
    if mesh.topology is None:
        # It says what to do.
        return rehearse(config)
    chip, along = topology_of(mesh.topology)
    shape = shape_of(config, asked)
    count = math.prod(along)
    found = list(candidates(shape, asked, chip, count, max(mesh.trial, 1)))
    if not found:
        raise BadInput(
            f"rehearse.rows = {asked.rows} cannot be shared out to {count} devices of "
            f"{mesh.topology} in any way: give a multiple of a divisor of {count}"
        )
    room = lambda one: one.bytes > chip.usable
    found.sort(key=lambda one: (room(one), one.seconds))
    tried = [rehearse(_with(config, one)) for one in found[: asked.tries]]
    tried.sort(key=lambda one: (not one["fits"], _seconds(one)))
    return {"candidates": len(found), "tried": tried}


def candidates(
    shape: Shape, asked: Rehearsal, chip: Chip, devices: int, trials: int
) -> Iterator[Candidate]:
    """Every way that comes out even."""
    each = devices // trials
    for fsdp, tensor in itertools.product(_divisors(each), repeat=2):
        if each % (fsdp * tensor) or shape.num_heads % tensor:
            continue
        data = each // (fsdp * tensor)
        for micro, remat in itertools.product(MICRO_BATCHES, REMATS):
            if asked.rows % micro or (asked.rows // micro) % (data * fsdp):
                continue
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
            yield _rough(shape, asked, chip, sizes, remat, micro, trials)


def _rough(
    shape: Shape,
    asked: Rehearsal,
    chip: Chip,
    sizes: Mapping[str, int],
    remat: str,
    micro: int,
    trials: int,
) -> Candidate:
    """A candidate with its rough figures."""
    data, fsdp, tensor = sizes["data"], sizes["fsdp"], sizes["tensor"]
    own = max(asked.trials // trials, 1)
    rows = own * asked.rows / (data * fsdp)
    stream = rows / micro * asked.length * shape.d_model * shape.activation_bytes
    base = nbytes(shape.params)
    kept = _KEPT[remat] * stream * shape.num_layers
    # Hidden units and heads are split, the residual stream is not.
    kept /= 1 if remat == "full" else tensor
    layer = base / max(shape.num_layers, 1) / tensor
    held = base / (fsdp * tensor) + own * shape.trained_bytes * 5 + kept + 2 * layer
    passes = _PASSES[remat]
    gathered = passes * micro * base / tensor * (fsdp - 1) / fsdp
    # Two sums per layer and pass: behind attention, and behind the feed-forward part.
    summed = 2 * passes * micro * shape.num_layers * stream
    summed *= 2 * (tensor - 1) / tensor
    flops = 2 * passes * own * asked.rows * asked.length * shape.parameters
    products = flops / (data * fsdp * tensor) / chip.flops
    return Candidate(
        data, fsdp, tensor, remat, micro, held,
        max(products, (gathered + summed) / chip.links),
    )  # fmt: skip


def _with(config: Mapping[str, Any], one: Candidate) -> dict[str, Any]:
    """The config of a candidate."""
    axes = {"data": one.data, "fsdp": one.fsdp, "tensor": one.tensor}
    return {
        **config,
        "mesh": {**config["mesh"], **axes},
        "base": {**config["base"], "remat": one.remat},
        "optim": {**config["optim"], "accumulate": one.accumulate},
    }


def _seconds(report: Mapping[str, Any]) -> float:
    estimate = report.get("estimate")
    return estimate["one_after_another"] if estimate else float("inf")


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
