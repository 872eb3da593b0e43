"""The training step of a run, compiled for devices that are not here.

Everything is a shape: no weight is read and nothing runs. What the compiler says of the
program is what one device will hold; what the program says between devices is read from
its text; and published figures of the chip make an estimate of the rest.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh

from lowrank.adapt.attach import Adapted
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec
from lowrank.cost.chips import Chip, topology_of
from lowrank.cost.count import jaxpr_flops
from lowrank.cost.hlo import Traffic, traffic
from lowrank.cost.measure import compiled_cost, peak_resident_bytes
from lowrank.io.hub import Base
from lowrank.io.language import Language
from lowrank.io.shapes import PREFIX, shaped
from lowrank.run.exchanges import exchanged, gathered
from lowrank.run.forward import inputs_of
from lowrank.run.language import INPUTS
from lowrank.run.prepare import adapt, sizes
from lowrank.run.preview import Lowered, Planned, lowered
from lowrank.run.problems import open_any
from lowrank.run.settings import Settings, check_groups, load_plugins, plain, read
from lowrank.sharding.mesh import DATA, MeshSpec
from lowrank.train.losses import cross_entropy, next_token
from lowrank.train.pack import jitted

#: Version of what `rehearse` returns; raised when a key changes its meaning.
SCHEMA = 1
GROUPS = ("base", "delta", "optim", "penalty", "ranks", "mesh")
#: Steps of a training that is never run: a schedule has to have a length.
_STEPS = 1000


@spec
class Rehearsal:
    """The group `rehearse`.

    Attributes:
      rows: Of a batch of one trial, on all devices together.
      length: Tokens of a row.
      trials: That share the step.
      weights: What the weights of a shape are stored in.
      num_classes: Width of a new head, where a base gets one.
      search: Whether shapes of the mesh, what is recomputed and micro-batches are
        looked for that fit and take the least time.
      tries: Programs that a search compiles: the best ones by a rough estimate.
      format: "table" for a terminal, "json" for programs.
      out: A file for the report, as JSON.
    """

    rows: int = 128
    length: int = 2048
    trials: int = 1
    weights: Literal["float32", "bfloat16"] = "float32"
    num_classes: int = 2
    search: bool = False
    tries: int = 4
    format: Literal["table", "json"] = "table"
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "length", "trials", "num_classes", "tries"):
            if getattr(self, name) < 1:
                raise BadInput(
                    f"rehearse.{name} must be at least 1, not {getattr(self, name)}"
                )


def rehearse(config: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles the step that a config describes and reads what it takes.

    Args:
      config: `GROUPS` and `rehearse`, composed and resolved.

    Returns:
      Plain data of version `SCHEMA`, see `report.rehearsal`.

    Raises:
      BadInput: A setting does not fit, the topology does not exist, or what compiles
        for it is not installed.
    """
    check_groups(config, (*GROUPS, "rehearse", "plugins", "seed"))
    load_plugins(config.get("plugins"))
    asked = plain(Rehearsal, config.get("rehearse"), "rehearse")
    mesh = plain(MeshSpec, config.get("mesh"), "mesh")
    if mesh.topology is None:
        raise BadInput(
            "a rehearsal compiles for mesh.topology, and there is none: choose a mesh "
            "with one, as mesh=v5e_256, or give it, as mesh.topology=v5e:4x4"
        )
    chip, along = topology_of(mesh.topology)
    devices = devices_of(chip, along, mesh.topology)
    sizes_ = mesh.sizes(devices)
    idle = len(devices) - math.prod(sizes_.values())
    if idle:
        raise BadInput(
            f"mesh.topology = {mesh.topology} has {len(devices)} devices, and the axes "
            f"of mesh take {len(devices) - idle}, {told(sizes_)}: give one of them -1"
        )
    parts = dataclasses.replace(mesh, **sizes_).parts()
    planned, _ = _planned(config, asked, parts)
    built = mesh.build(devices)
    program = lowered(planned, asked.trials, built)
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "base": planned.settings.base.name,
        "delta": planned.settings.delta["name"],
        "rows": asked.rows,
        "length": asked.length,
        "trials": asked.trials,
        "weights": asked.weights,
        "dtype": planned.settings.base.dtype,
        "remat": planned.settings.base.remat,
        "accumulate": planned.settings.optim.accumulate,
        "topology": mesh.topology,
        "mesh": sizes_,
        "devices": len(devices),
        "chip": dataclasses.asdict(chip),
        "parameters": {
            "trained": sizes(planned.adapted).trained_parameters,
            "total": sizes(planned.adapted).total_parameters,
        },
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        | _compiler(chip),
        **_compiled(program, chip, built, planned.adapted),
        "host_peak_bytes": peak_resident_bytes(),
    }


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a rough count of a step looks at.

    Attributes:
      params: Shapes of the base's weights.
      parameters: How many numbers these are.
      num_layers, num_heads, d_model: Of the base.
      activation_bytes: Of one number in the compute dtype.
      trained_bytes: Of what one trial trains.
    """

    params: Any
    parameters: int
    num_layers: int
    num_heads: int
    d_model: int
    activation_bytes: int
    trained_bytes: int


def shape_of(config: Mapping[str, Any], asked: Rehearsal) -> Shape:
    """The shape of a step, for a search.

    Raises:
      BadInput: A setting does not fit, or the base does not say what its shape is.
    """
    planned, base = _planned(config, asked, parts=1)
    if base.spec is None:
        raise BadInput(
            f"rehearse.search=true counts layers, and {base.name} does not say how "
            "many it has: give mesh, base.remat and optim.accumulate yourself"
        )
    counted = sizes(planned.adapted)
    return Shape(
        params=base.params,
        parameters=counted.total_parameters,
        num_layers=base.spec.num_layers,
        num_heads=base.spec.num_heads,
        d_model=base.spec.d_model,
        activation_bytes=2 if planned.settings.base.dtype == "bfloat16" else 4,
        trained_bytes=counted.adapter_bytes,
    )


def told(sizes_: Mapping[str, int]) -> str:
    """Axes of a mesh as text, those of one device left out."""
    shown = {n: c for n, c in sizes_.items() if c > 1} or {DATA: 1}
    return " x ".join(f"{name} {count}" for name, count in shown.items())


def devices_of(chip: Chip, along: Sequence[int], topology: str) -> Sequence[Any]:
    """Devices to compile for: a slice that is not here, or as many of this machine.

    Raises:
      BadInput: There is no compiler for them, no such slice, or not as many devices.
    """
    count = math.prod(along)
    if chip.platform != "tpu":
        here = jax.devices("cpu")
        if len(here) < count:
            raise BadInput(
                f"mesh.topology = {topology} is rehearsed on {count} virtual devices, "
                f"and this process has {len(here)}: set JAX_NUM_CPU_DEVICES={count}"
            )
        return here[:count]
    # Or the compiler asks a cloud what machine this is, for minutes; and it may be at
    # work in several processes, since there is no chip to share.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).splitlines()[0][:300]
        if importlib.util.find_spec("libtpu") is None:
            raise BadInput(
                f"mesh.topology = {topology} is compiled for by libtpu, which is not "
                f"installed: pip install 'lowrank[rehearse]' ({reason})"
            ) from None
        raise BadInput(
            f"mesh.topology = {topology} is no slice that libtpu knows: {reason}"
        ) from None
    return found.devices


def _compiler(chip: Chip) -> dict[str, str]:
    if chip.platform != "tpu":
        return {"compiler": "XLA:CPU, whose exchanges and memory are not the chip's"}
    return {"compiler": f"XLA:TPU, libtpu {importlib.metadata.version('libtpu')}"}


def _planned(
    config: Mapping[str, Any], asked: Rehearsal, parts: int
) -> tuple[Planned, Base | Language]:
    """A trial of shapes, and its base."""
    source = str(config["base"].get("source", ""))
    wanted = config["base"]
    rows = (asked.rows, asked.length)
    base: Base | Language
    if source.startswith(PREFIX):
        base = shaped(
            source.removeprefix(PREFIX),
            scan=wanted["scan"],
            remat=wanted["remat"],
            dtype=wanted["dtype"],
            weights=asked.weights,
            parts=parts,
        )
    else:
        settings = _settings(config, asked, language=False)
        base, _ = open_any(settings.base, asked.num_classes, None, rows)
    language = isinstance(base, Language)
    settings = _settings(config, asked, language)
    if asked.length > base.max_length:
        raise BadInput(
            f"rehearse.length = {asked.length} is more than {base.max_length}, the "
            f"longest input of {base.name}"
        )
    if isinstance(base, Language):
        loss, inputs = next_token, _of_sequences
    else:
        loss, inputs = cross_entropy, inputs_of
    example = _batch(asked, language)
    one = inputs({name: x[0] for name, x in example.items()})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one)
    adapted = adapt(base, [settings], shapes).alone[0]
    given = (base.partition, _STEPS, [example])
    return Planned(settings, adapted, loss, inputs, *given), base


def _of_sequences(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in INPUTS}


def _settings(config: Mapping[str, Any], asked: Rehearsal, language: bool) -> Settings:
    """The settings of a run on data that nobody reads."""
    data: dict[str, Any] = {"name": "table", "path": "-"}
    data["batching"] = {"batch_size": asked.rows, "buckets": [asked.length]}
    if language:
        data = {"name": "text", "path": "-"}
        data["batching"] = {"batch_size": asked.rows, "length": asked.length}
    given = {name: config.get(name) for name in GROUPS}
    return read({**given, "data": data, "seed": config.get("seed", 0)})


def _batch(asked: Rehearsal, language: bool) -> dict[str, np.ndarray]:
    """A batch that takes no memory, whatever its shape; an axis of trials first."""
    wide, narrow = (1, asked.rows, asked.length), (1, asked.rows)
    found = {"ids": (wide, np.int32), "mask": (wide, np.bool_)}
    if language:
        for name in ("label", "positions", "segments"):
            found[name] = (wide, np.int32)
        found["weight"] = (wide, np.float32)
    else:
        found |= {"label": (narrow, np.int32), "weight": (narrow, np.float32)}
    found["index"] = (narrow, np.int32)
    return {
        name: np.broadcast_to(np.zeros((), dtype), shape)
        for name, (shape, dtype) in found.items()
    }


def _compiled(
    program: Lowered, chip: Chip, mesh: Mesh, adapted: Adapted
) -> dict[str, Any]:
    """What the compiled step tells; "fits" is false where it could not be compiled."""
    frozen, state, _ = program.shapes
    held = {
        "base": _bytes(frozen),
        "factors": _bytes(state.trained),
        "best factors": _bytes(state.best),
        "optimizer": _bytes(state.opt),
    }
    flops = jaxpr_flops(program.packed, *program.shapes)
    found: dict[str, Any] = {
        "bytes_per_chip": held,
        "flops": flops.flops,
        "flops_exact": flops.exact,
    }
    began = time.perf_counter()
    step = jitted(program.packed, program.mesh, state)
    try:
        compiled = step.lower(*program.shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {
            "fits": False,
            "why": " ".join(str(error).split())[:400],
            "compile_seconds": time.perf_counter() - began,
        }
    seconds = time.perf_counter() - began
    costs = compiled_cost(compiled)
    read_ = traffic(compiled.as_text(), program.mesh.size)
    peak = costs["peak_bytes"]
    temporaries = costs["temp_bytes"] or 0
    return found | {
        "bytes_per_chip": held
        | {
            "kept for the pass back": min(read_.stacked, temporaries),
            "other temporaries": max(temporaries - read_.stacked, 0),
            "arguments": costs["argument_bytes"],
            "peak": peak,
        },
        "fits": None if peak is None else peak <= chip.usable,
        "exchanges": exchanged(read_, adapted),
        "gathers": gathered(read_, adapted),
        "unbounded_loops": read_.unbounded,
        "estimate": _estimate(flops.flops, read_, chip, mesh, costs),
        "compile_seconds": seconds,
    }


def _bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays that know where they lie."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _estimate(
    flops: float, read_: Traffic, chip: Chip, mesh: Mesh, costs: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds that a step takes at least, by published figures; no measurement."""
    sent = sum(one.bytes for one in read_.exchanges)
    # Read or written once, at least.
    moved = (costs["argument_bytes"] or 0) + 2 * (costs["temp_bytes"] or 0)
    parts = {
        "products": flops / mesh.size / chip.flops,
        "memory": moved / chip.bandwidth,
        "exchanges": sent / chip.links,
    }
    return parts | {
        "overlapped": max(parts.values()),
        "one_after_another": sum(parts.values()),
    }
