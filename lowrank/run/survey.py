"""What could be adapted in a base: every weight, its uses and its price, no data."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax

from lowrank.adapt.sites import Site, discover
from lowrank.core.errors import BadInput
from lowrank.core.paths import layers_of, select
from lowrank.core.spec import fields_of, spec
from lowrank.core.trees import flatten
from lowrank.io.hub import Base
from lowrank.io.language import Language
from lowrank.run.problems import open_any
from lowrank.run.settings import BaseSpec, check_groups, load_plugins, plain

#: Version of what `survey` returns; raised when a key changes its meaning.
SCHEMA = 1


@spec
class Survey:
    """What to look at.

    Attributes:
      pattern: Which weights to show; a glob over paths.
      format: "table" for a terminal, "json" for programs.
      rows, tokens: Shape of the batch that the base is traced with, unless the base
        declares an example of its inputs.
      num_classes: Width of the head.
      cache: Folder of bases; the user's cache if None.
    """

    pattern: str = "**"
    format: Literal["table", "json"] = "table"
    rows: int = 8
    tokens: int = 64
    num_classes: int = 2
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "num_classes"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")
        if layers_of(self.pattern) is not None:
            raise BadInput(
                f"pattern {self.pattern!r} takes layers of a stack, and a weight is "
                "shown with all its layers: leave the bracket out"
            )


def survey(config: Mapping[str, Any]) -> dict[str, Any]:
    """Traces a base and tells about each of its weights.

    Args:
      config: `base` and the fields of `Survey`, composed and resolved.

    Returns:
      Plain data of version `SCHEMA`: base, inputs and one row per weight, in the order
      of the tree. FLOPs are those of a forward pass of the correction over the whole
      batch, per component; a loop without a known end has none.

    Raises:
      BadInput: A setting does not fit, the base cannot be loaded, or its function does
        not take these inputs.
      UnknownName: The pattern covers no weight.
    """
    check_groups(config, ("base", "plugins", *fields_of(Survey)))
    load_plugins(config.get("plugins"))
    wanted = plain(BaseSpec, config.get("base"), "base")
    fields = {name: config[name] for name in fields_of(Survey) if name in config}
    asked = plain(Survey, fields, "sites")
    shape = (asked.rows, asked.tokens)
    base, inputs = open_any(wanted, asked.num_classes, asked.cache, shape)
    own = isinstance(base, Base) and base.example is not None
    if asked.tokens > base.max_length and not own:
        raise BadInput(
            f"{asked.tokens} tokens are more than {base.max_length}, the longest "
            f"input that {base.name} was made for"
        )
    leaves, _ = flatten(base.params)
    shown = select(asked.pattern, leaves)
    sites = _discovered(base, inputs)
    return {
        "schema": SCHEMA,
        "base": {
            "name": wanted.name,
            "source": wanted.source,
            "fingerprint": base.fingerprint,
        },
        "inputs": {
            path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
            for path, leaf in flatten(inputs)[0].items()
        },
        "pattern": asked.pattern,
        "weights": [_row(path, leaves[path], sites.get(path)) for path in shown],
    }


def _discovered(base: Base | Language, inputs: Any) -> Mapping[str, Site]:
    try:
        return discover(base.outputs, base.params, inputs)
    # A model of the user's may raise anything.
    except Exception as error:
        if isinstance(error, BadInput) or base.spec is not None:
            raise
        raise BadInput(
            f"base {base.name!r} cannot be traced with inputs of the shapes "
            f"{jax.tree.map(lambda x: x.shape, inputs)}: {type(error).__name__}: "
            f"{error}. Let its function return Base(..., example=...) with inputs that "
            "it takes."
        ) from error


def _row(path: str, leaf: Any, site: Site | None) -> dict[str, Any]:
    row = {
        "path": path,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "parameters": math.prod(leaf.shape),
    }
    if site is None:
        small = "is not an array of two or more axes that holds real numbers"
        return {**row, "adaptable": False, "obstacle": small, **_NOTHING}
    row |= {"adaptable": not site.obstacle, "obstacle": site.obstacle or None}
    uses = [_use(use) for use in site.uses]
    if not (site.ins and site.outs):
        return {**row, **_NOTHING, "uses": uses}
    name = site.layer_paths[0] if site.stacks else None
    return {
        **row,
        "axes": {
            "in": list(site.ins),
            "out": list(site.outs),
            "stack": list(site.stacks),
        },
        "d_in": site.d_in,
        "d_out": site.d_out,
        "layers": site.num_layers,
        "first_layer": name,
        "largest_rank": site.largest_rank,
        "parameters_per_rank": site.parameters_per_rank,
        "flops_per_rank": _finite(site.flops_per_rank),
        "uses": uses,
    }


#: What a weight that no product uses has.
_NOTHING: Mapping[str, Any] = {
    "axes": None,
    "d_in": None,
    "d_out": None,
    "layers": None,
    "first_layer": None,
    "largest_rank": None,
    "parameters_per_rank": None,
    "flops_per_rank": None,
    "uses": [],
}


def _use(use: Any) -> dict[str, Any]:
    told = dataclasses.asdict(use)
    return {
        "kind": told["kind"],
        "primitive": told["primitive"],
        "trips": _finite(told["trips"]),
        "contracted": list(told["contracted"]),
        "produced": list(told["produced"]),
        "batched": list(told["batched"]),
        "flops_per_rank": _finite(told["flops_per_rank"]),
    }


def _finite(value: float) -> float | int | None:
    """A number that JSON knows; whole where it is whole."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value
