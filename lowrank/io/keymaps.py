"""How our weights and a Hugging Face checkpoint's are called, in both directions.

One table per family pairs a path of ours with a tensor of theirs. Kernels are stored
there as (out, in) and here as (in, out), hence transposed; layers and experts are
numbered tensors there and stacked leaves here. Nothing is dropped in silence: each
tensor of a checkpoint is used or ignored for a reason that is given, and each leaf of
the model is filled.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from lowrank.core.arrays import PyTree
from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.core.trees import flatten, leaf_digest
from lowrank.io.capacity import check_room
from lowrank.io.safetensors import aligned
from lowrank.sharding.mesh import bring

_MOST_LISTED = 20
_NUMBER = r"(?P<{}>0|[1-9]\d*)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      path: Our path, layers stacked.
      tensor: Their name without prefix, with ``{layer}`` and ``{expert}`` where these
        are numbered.
      transpose: Whether theirs is (out, in) where ours is (in, out).
      bare: Whether their name never has the prefix.
    """

    path: str
    tensor: str
    transpose: bool = False
    bare: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor per layer."""
        return "{layer}" in self.tensor

    @property
    def expert(self) -> bool:
        """Whether there is one such tensor per expert."""
        return "{expert}" in self.tensor

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """What their names of it look like, without prefix."""
        text = re.escape(self.tensor)
        for name in ("layer", "expert"):
            text = text.replace(re.escape(f"{{{name}}}"), _NUMBER.format(name))
        return re.compile(text)


def dense(path: str, module: str, *, bare: bool = False) -> tuple[Row, Row]:
    """Kernel and bias of a linear map."""
    return (
        Row(f"{path}/kernel", f"{module}.weight", transpose=True, bare=bare),
        Row(f"{path}/bias", f"{module}.bias", bare=bare),
    )


def norm(path: str, module: str) -> tuple[Row, Row]:
    """Scale and bias of a normalization."""
    return (
        Row(f"{path}/scale", f"{module}.weight"),
        Row(f"{path}/bias", f"{module}.bias"),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """The names of a family of models.

    Attributes:
      name: For messages.
      rows: The table.
      prefix: What their task models and PEFT put before the names of the base.
      unused: Pattern of tensors that a checkpoint may hold without our using them, and
        why.
      renamed: (pattern, text) of names that old checkpoints have.
      new_head: Whether the head is a new one, never a checkpoint's.
    """

    name: str
    rows: Sequence[Row]
    prefix: str
    unused: Mapping[str, str]
    renamed: Sequence[tuple[str, str]] = ()
    new_head: bool = False

    @functools.cached_property
    def _by_path(self) -> dict[str, Row]:
        return {row.path: row for row in self.rows}

    def row(self, path: str) -> Row:
        """The line of one of our paths, stacked or not.

        Raises:
          UnknownName: There is none.
        """
        stacked, _ = stacked_path(path)
        if stacked not in self._by_path:
            raise UnknownName(
                f"no Hugging Face name is known for {path!r}. Nearest: "
                f"{nearest(stacked, self._by_path)}."
            )
        return self._by_path[stacked]

    def tensor(
        self,
        path: str,
        layer: int | None = None,
        prefix: str | None = None,
        expert: int | None = None,
    ) -> str:
        """Their full tensor name for one of our weights.

        Args:
          path: Our path, of a scanned model ("encoder/layer/...") or of an unrolled
            one ("encoder/layer_3/...").
          layer: Which layer of a stacked leaf; None for every other path.
          prefix: What stands before the names of the base; None: the family's.
          expert: Which expert, where these are stacked.

        Raises:
          UnknownName: No such path in the table.
          BadInput: A stacked leaf without `layer`, or a layer where there is none.
        """
        row = self.row(path)
        _, own_layer = stacked_path(path)
        if own_layer is not None and layer is not None:
            raise BadInput(f"{path!r} names its layer itself; leave layer={layer} out")
        layer = own_layer if layer is None else layer
        if row.stacked != (layer is not None):
            needs = "one tensor per layer: say which" if row.stacked else "no layers"
            raise BadInput(f"{path!r} has {needs} (layer={layer})")
        if row.expert != (expert is not None):
            needs = "one tensor per expert: say which" if row.expert else "no experts"
            raise BadInput(f"{path!r} has {needs} (expert={expert})")
        name = row.tensor.format(layer=layer, expert=expert)
        return name if row.bare else (self.prefix if prefix is None else prefix) + name

    def module(
        self, path: str, layer: int | None = None, prefix: str | None = None
    ) -> str:
        """Their module that owns the weight at `path`; PEFT names its targets so."""
        return self.tensor(path, layer, prefix).rpartition(".")[0]

    def path(self, tensor: str, *, scan: bool = True) -> tuple[str, int | None]:
        """Our path for their tensor name, with or without prefix, and the layer in it.

        Args:
          tensor: For example "bert.encoder.layer.3.attention.self.query.weight".
          scan: Whether the model has stacked layers. If not, the path names the layer
            and the second result is None.

        Raises:
          UnknownName: No weight of ours corresponds to it.
        """
        name = self._modern(tensor)
        for row in self.rows:
            if found := row.pattern.fullmatch(name):
                break
        else:
            numbered = re.sub(r"\.[0-9]+\.", ".{layer}.", name, count=1)
            known = [row.tensor for row in self.rows]
            raise UnknownName(
                f"no weight of ours corresponds to tensor {tensor!r}. Nearest: "
                f"{nearest(numbered, known)}."
            )
        if not row.stacked:
            return row.path, None
        layer = int(found["layer"])
        return (row.path, layer) if scan else (unrolled_path(row.path, layer), None)

    def kernel(self, module: str, *, scan: bool = True) -> tuple[str, int | None]:
        """Our path of the weight matrix in their module: inverse of `module`."""
        return self.path(f"{module}.weight", scan=scan)

    def from_hf(
        self,
        names: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        model: PyTree,
        *,
        where: str,
        places: Mapping[str, Sharding] | None = None,
    ) -> tuple[dict[str, jax.Array], str, dict[str, str]]:
        """Fills every leaf of `model` but a new head from a checkpoint, leaf by leaf.

        Args:
          names: Their tensor names and shapes, with or without prefix.
          read: Gives the values of one tensor.
          model: Our params as shapes, scanned or unrolled.
          where: The checkpoint, for messages.
          places: Path -> where a leaf comes to lie; else where JAX puts it.

        Returns:
          Path -> array in the leaf's dtype; a fingerprint of the tensors used, which
          does not depend on scan, dtype or head; and the tensors that were ignored,
          each with its reason.

        Raises:
          BadInput: A tensor of unknown purpose, a leaf without tensor, a wrong shape,
            one tensor under two names, or more than the devices have room for.
        """
        leaves, _ = flatten(model)
        fresh = lambda path: self.new_head and path.startswith("head/")
        leaves = {path: leaf for path, leaf in leaves.items() if not fresh(path)}
        given: dict[str, str] = {}
        for name in names:
            plain = self._modern(name)
            if plain in given:
                raise BadInput(
                    f"{where} holds {plain!r} twice: {given[plain]!r}, {name!r}"
                )
            given[plain] = name
        plan = {path: self._sources(path, leaf.shape) for path, leaf in leaves.items()}
        used = {tensor for tensors in plan.values() for tensor in tensors}
        ignored, unknown = {}, []
        for plain in sorted(set(given) - used):
            reason = self._reason(plain)
            if reason is None:
                unknown.append(given[plain])
            else:
                ignored[given[plain]] = reason
        if unknown or used - set(given):
            raise BadInput(
                f"{where} does not fit the model. Tensors that no weight takes: "
                f"{listed(unknown)}. Tensors that are missing: "
                f"{listed(used - set(given))}. Check that config.json and weights "
                f"belong together and that the model is of the {self.name} family."
            )
        check_room(leaves, places, where)
        params, digests = {}, {}
        for path, tensors in plan.items():
            transpose = self.row(path).transpose
            shape = leaves[path].shape
            piece = shape[len(shape) - _ndim(path) :]
            for tensor in tensors:
                theirs = tuple(names[given[tensor]])
                if theirs != (piece[::-1] if transpose else piece):
                    raise BadInput(
                        f"{where}: tensor {given[tensor]!r} has shape {theirs}, but "
                        f"config.json makes it {piece[::-1] if transpose else piece}"
                    )
            host = aligned(shape, leaves[path].dtype)
            for number, tensor in enumerate(tensors):
                value = read(given[tensor])
                digests[tensor] = leaf_digest(tensor, value)
                host.reshape((len(tensors), *piece))[number] = (
                    value.T if transpose else value
                )
            params[path] = bring(host, (places or {}).get(path))
        text = "".join(digests[tensor] for tensor in sorted(digests))
        return params, hashlib.sha256(text.encode()).hexdigest(), ignored

    def to_hf(self, params: PyTree, prefix: str | None = None) -> "Exported":
        """Our params as their tensors: inverse of `from_hf`, head included."""
        places = {}
        for path, leaf in flatten(params)[0].items():
            names = self._sources(path, leaf.shape, prefix)
            pieces = (len(names), *leaf.shape[leaf.ndim - _ndim(path) :])
            for number, name in enumerate(names):
                places[name] = leaf, pieces, number, self.row(path).transpose
        return Exported(places)

    def _sources(
        self, path: str, shape: Sequence[int], prefix: str | None = ""
    ) -> list[str]:
        """Their tensors that fill the leaf at `path`, in the order of its stacks."""
        row = self.row(path)
        stacks = list(shape[: len(shape) - _ndim(path)])
        over_layers = row.stacked and stacked_path(path)[1] is None
        wanted = over_layers + row.expert
        if len(stacks) != wanted:
            raise BadInput(
                f"{path!r} has shape {tuple(shape)}, but stacks of {wanted} kind(s)"
            )
        layers = range(stacks.pop(0)) if over_layers else [None]
        experts = range(stacks.pop(0)) if row.expert else [None]
        return [
            self.tensor(path, layer, prefix, expert)
            for layer, expert in itertools.product(layers, experts)
        ]

    def _modern(self, tensor: str) -> str:
        name = tensor.removeprefix(self.prefix)
        for pattern, text in self.renamed:
            name = re.sub(pattern, text, name)
        return name

    def _reason(self, tensor: str) -> str | None:
        for pattern, reason in self.unused.items():
            if re.fullmatch(pattern, tensor):
                return reason
        return None


class Exported(Mapping[str, np.ndarray]):
    """Tensors by their names, each made when it is asked for and held by nobody.

    `dict` of it holds all of them, as writers want that only keep addresses.

    Attributes:
      shapes: Name -> shape.
    """

    def __init__(self, places: Mapping[str, tuple[Any, tuple[int, ...], int, bool]]):
        """Names tensors.

        Args:
          places: Name -> (leaf, its shape as a row of pieces, which of them, whether
            it is transposed there).
        """
        self._places = places
        self.shapes: dict[str, tuple[int, ...]] = {
            name: pieces[:0:-1] if transpose else pieces[1:]
            for name, (_, pieces, _, transpose) in places.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        leaf, pieces, number, transpose = self._places[name]
        # The host's own view where the leaf lies there.
        piece = np.asarray(jax.device_get(leaf)).reshape(pieces)[number]
        return np.ascontiguousarray(piece.T if transpose else piece)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def stacked_path(path: str) -> tuple[str, int | None]:
    """Takes the layer out of an unrolled path: its stacked form and the layer."""
    found = re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(.+)", path)
    return (f"{found[1]}/layer/{found[3]}", int(found[2])) if found else (path, None)


def unrolled_path(path: str, layer: int) -> str:
    """Puts a layer into a stacked path."""
    return re.sub(r"^(encoder|decoder)/layer/", rf"\1/layer_{layer}/", path)


def _ndim(path: str) -> int:
    return 2 if path.endswith(("/kernel", "/embedding")) else 1


def listed(names: Any) -> str:
    """Some names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (", ".join(names[:_MOST_LISTED]) or "none") + more
