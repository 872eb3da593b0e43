"""What a model costs, from shapes alone: parameters, bytes and matrix FLOPs.

Nothing here runs a program or needs weights; `jax.ShapeDtypeStruct`s will do.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from lowrank.core import trees
from lowrank.core.errors import BadInput, nearest

#: Primitives that may contract in ways not counted here; they are named, not guessed.
OPAQUE = frozenset(
    {
        "pallas_call", "ffi_call", "tpu_custom_call", "custom_call", "io_callback",
        "pure_callback", "fft", "cholesky", "eig", "eigh", "lu", "qr", "geqrf",
        "householder_product", "schur", "svd", "triangular_solve",
        "tridiagonal_solve", "scaled_matmul_wrapper", "scaled_matmul",
        "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of one trial.

    Attributes:
      trained_parameters: Scalars that are trained: open components of factors, and
        whole weights.
      total_parameters: Those and the frozen ones.
      adapter_bytes: Bytes of what is trained, in the dtypes given.
      base_bytes: Bytes of what is frozen.
      parameters_per_site: Path -> trained scalars there.
      padding_parameters: Scalars of closed components: held beside the trained ones,
        never moved, not part of an adapter, and in none of the other figures.
    """

    trained_parameters: int
    total_parameters: int
    adapter_bytes: int
    base_bytes: int
    parameters_per_site: dict[str, int]
    padding_parameters: int = 0


def count_parameters(
    frozen: Mapping[str, Any],
    trained: Mapping[str, Any],
    padding: Mapping[str, Mapping[str, int]] | None = None,
) -> Counts:
    """Counts the two trees of a trial.

    Args:
      frozen: Path -> weight.
      trained: Path -> factors ``{name: array}``, or a whole weight; of one trial,
        without a trials axis.
      padding: Path -> factor -> how many of its scalars belong to closed components.

    Raises:
      BadInput: A weight is both frozen and trained whole, so that it would be counted
        twice.
    """
    for path, value in trained.items():
        if path in frozen and not isinstance(value, Mapping):
            raise BadInput(
                f"weight {path!r} is in the frozen tree and trained whole; take it out "
                "of the frozen tree, or it counts twice"
            )
    padding = padding or {}
    closed = {path: sum(own.values()) for path, own in padding.items()}
    closed_bytes = sum(
        number * np.dtype(trained[path][name].dtype).itemsize
        for path, own in padding.items()
        for name, number in own.items()
    )
    per_site = {
        path: trees.count(value) - closed.get(path, 0)
        for path, value in trained.items()
    }
    num_trained = sum(per_site.values())
    return Counts(
        trained_parameters=num_trained,
        total_parameters=num_trained + trees.count(dict(frozen)),
        adapter_bytes=trees.nbytes(dict(trained)) - closed_bytes,
        base_bytes=trees.nbytes(dict(frozen)),
        parameters_per_site=per_site,
        padding_parameters=sum(closed.values()),
    )


def lora_parameters(d_in: int, d_out: int, rank: int = 1) -> int:
    """rank (d_in + d_out): scalars of a low-rank pair."""
    return rank * (d_in + d_out)


def lora_flops(d_in: int, d_out: int, rank: int = 1) -> int:
    """2 rank (d_in + d_out): FLOPs of a low-rank pair for one token, forward.

    A backward pass costs twice as much: the gradients of both factors, and of the
    activations on both sides of the rank.
    """
    return 2 * rank * (d_in + d_out)


def lora_flops_per_token(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Path -> forward FLOPs per token of the correction there.

    Args:
      shapes: Path -> (d_in, d_out).
      ranks: Path -> components computed: `max_rank` in training, where closed gates
        are computed too; the active ones in an exported adapter.

    Raises:
      BadInput: A path with a rank has no shape.
    """
    for path in ranks:
        if path not in shapes:
            raise BadInput(
                f"rank given for {path!r}, whose shape is not. Nearest: "
                f"{nearest(path, shapes)}."
            )
    return {path: lora_flops(*shapes[path], rank) for path, rank in ranks.items()}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Matrix FLOPs of a program: 2 for each multiplication and addition.

    Element-wise work, reductions and lookups are left out: they are bound by memory,
    and small beside matrix products. Of a `cond` the dearest branch counts. All
    devices together.

    Attributes:
      flops: The sum.
      per_primitive: Primitive -> its share.
      unbounded: `while` loops whose bodies contract; each is counted as one trip,
        since how often it runs is not in the program.
      uncounted: Primitives that may contract and were counted as nothing.
    """

    flops: float
    per_primitive: dict[str, float]
    unbounded: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether nothing in the program escaped the count."""
        return not self.unbounded and not self.uncounted


def jaxpr_flops(fn: Callable, *args: Any, **kwargs: Any) -> Flops:
    """Counts the matrix FLOPs of ``fn(*args, **kwargs)`` by walking its jaxpr.

    The compiler's own number counts the body of a scan once, however long the scan
    is; here it counts as often as it runs. What a remat computes again counts again.
    What no output needs does not count.

    Args:
      fn: A function of arrays, jitted or not, differentiated or not.
      *args: Arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: The same by name.
    """
    walk = _Walk(lambda equation: equation.primitive.name)
    flops = walk(_needed(fn, *args, **kwargs))
    return Flops(
        flops=float(sum(flops.values())),
        per_primitive={name: float(n) for name, n in sorted(flops.items())},
        unbounded=walk.unbounded,
        uncounted=tuple(sorted(walk.uncounted)),
    )


class Product(NamedTuple):
    """A `dot_general`: what it is called with."""

    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    dimension_numbers: Any
    flops: int


def jaxpr_products(fn: Callable, *args: Any, **kwargs: Any) -> dict[Product, int]:
    """Every matrix product of ``fn(*args, **kwargs)``, and how often it runs.

    Counted as `jaxpr_flops` does.
    """

    def key(equation: Any) -> Any:
        if equation.primitive.name != "dot_general":
            return None
        lhs, rhs = (
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
            for v in equation.invars[:2]
        )
        numbers = equation.params["dimension_numbers"]
        return Product(lhs, rhs, numbers, _dot(equation))

    flops = _Walk(key)(_needed(fn, *args, **kwargs))
    return {
        product: total // product.flops
        for product, total in flops.items()
        # Other contractions have no key, and empty products no FLOPs.
        if product is not None and product.flops
    }


def _needed(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """The jaxpr of a function, less what no output needs."""
    inner = _opened(jax.make_jaxpr(fn)(*args, **kwargs))
    needed, _ = dce_jaxpr(inner, [True] * len(inner.outvars), instantiate=True)
    return needed


class _Walk:
    """One walk over a program; FLOPs come back, what escaped is remembered.

    Args:
      key: What the FLOPs of an equation are filed under.
    """

    def __init__(self, key: Callable[[Any], Hashable]) -> None:
        self.unbounded = 0
        self.uncounted: set[str] = set()
        self._key = key

    def __call__(self, jaxpr: Any) -> collections.Counter[Any]:
        total: collections.Counter[Any] = collections.Counter()
        for equation in _opened(jaxpr).eqns:
            total.update(self._equation(equation))
        return total

    def _equation(self, equation: Any) -> collections.Counter[Any]:
        name, params = equation.primitive.name, equation.params
        if name in OPAQUE:
            self.uncounted.add(name)
            return collections.Counter()
        if rule := _RULES.get(name):
            return collections.Counter({self._key(equation): rule(equation)})
        if name == "scan":
            return _times(self(params["jaxpr"]), params["length"])
        if name == "cond":
            branches = [self(branch) for branch in params["branches"]]
            return max(branches, key=lambda flops: sum(flops.values()))
        if name == "while":
            once = self(params["body_jaxpr"]) + self(params["cond_jaxpr"])
            self.unbounded += bool(once)
            return once
        if name == "shard_map":
            # The body is what one device does.
            axes = params.get("newly_manual_axes", params.get("manual_axes"))
            devices = math.prod(params["mesh"].shape[axis] for axis in axes)
            return _times(self(params["jaxpr"]), devices)
        if name == "custom_linear_solve":
            # Its other programs are for derivatives.
            return self(params["jaxprs"].solve)
        return sum(map(self, _inner(params)), collections.Counter())


def _times(flops: collections.Counter[Any], trips: int) -> collections.Counter[Any]:
    return collections.Counter({key: n * trips for key, n in flops.items()})


def _opened(jaxpr: Any) -> Any:
    """The jaxpr proper; before jax 0.11 a closed one wraps it."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """The programs inside an equation: of a jit, a remat, a custom derivative."""
    items: list[Any] = []
    for value in params.values():
        items.extend(value if isinstance(value, tuple | list) else [value])
    return [item for item in items if hasattr(_opened(item), "eqns")]


def _dot(equation: Any) -> int:
    """2 x output x contracted."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def _ragged_dot(equation: Any) -> int:
    """As if each row met the one group it belongs to, and no other."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, rhs_con), (_, rhs_batch) = numbers.dot_dimension_numbers
    lhs, rhs = (var.aval.shape for var in equation.invars[:2])
    shared = {*rhs_con, *rhs_batch, *numbers.rhs_group_dimensions}
    free = (size for d, size in enumerate(rhs) if d not in shared)
    return 2 * math.prod(lhs) * math.prod(free)


def _convolution(equation: Any) -> int:
    """2 x outputs x inputs that reach each; padding and dilation zeros do not count."""
    params = equation.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (var.aval.shape for var in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    places = 1
    for d, (stride, padding, lhs_dilation, rhs_dilation) in enumerate(
        zip(
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ):
        size, window = lhs[numbers.lhs_spec[d + 2]], rhs[numbers.rhs_spec[d + 2]]
        at = np.arange(out[numbers.out_spec[d + 2]])[:, None] * stride - padding[0]
        at = at + np.arange(window)[None] * rhs_dilation
        inside = (at >= 0) & (at <= (size - 1) * lhs_dilation)
        places *= int((inside & (at % lhs_dilation == 0)).sum())
    batch, features = (out[numbers.out_spec[d]] for d in (0, 1))
    return 2 * batch * features * rhs[numbers.rhs_spec[1]] * places


_RULES: Mapping[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
