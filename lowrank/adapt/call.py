"""One use of a weight, in the verbs that a delta speaks (`deltas.base.Call`)."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from lowrank.adapt.compat import vary_alike
from lowrank.adapt.views import RANK, Label, WeightView, einsum, subscript
from lowrank.core.errors import BadInput
from lowrank.deltas.base import drop
from lowrank.deltas.contraction import contract, has_explicit_axes
from lowrank.deltas.product import Numerics, Subscripts, lowrank

#: The rank a second time, for what has two such axes.
_AGAIN = Label((), "rank again")


class DotCall:
    """A matrix product with the weight on either side, over any number of axes.

    Labels tell everything apart: axes of the input that are contracted carry the
    label of the weight axis they meet, the others are rows.
    """

    def __init__(
        self,
        view: WeightView,
        x: Array | None,
        x_labels: Sequence[Any],
        y_labels: Sequence[Any],
        contracted: Sequence[Label],
        out: Any,
        precision: Any,
        product: Callable[[Array], Array],
        ordinal: int,
    ):
        self.view = view
        self.x = x
        self.x_labels = tuple(x_labels)
        self.y_labels = tuple(y_labels)
        self.contracted = tuple(contracted)
        self.transposed = any(label in view.outs for label in contracted)
        self._out = out
        self._precision = precision
        self._product = product
        self._ordinal = ordinal

    @property
    def batched(self) -> tuple[Label, ...]:
        """Axes of the weight that input and output have as well."""
        both = {*self.x_labels} & {*self.y_labels}
        return tuple(t for t in self.view.labels if t is not None and t in both)

    @functools.cached_property
    def kind(self) -> Hashable:
        """What a delta's answer depends on, values and names apart.

        None where more decides than is told here: every such use is of its own kind.
        """
        if type(self) is not DotCall:
            return None
        own = dataclasses.replace(self.view, path="", trips=1)
        leaves, structure = jax.tree.flatten(own)
        return (
            structure, *map(jax.typeof, [*leaves, self.x]), self.x_labels,
            self.y_labels, self.contracted, self._out, str(self._precision),
        )  # fmt: skip

    def check_answer(self, y: Any) -> None:
        """Raises BadInput if a delta's answer is not of the shape and type of x W."""
        found, wanted = (
            f"{one.dtype}{list(one.shape)}" for one in (jax.typeof(y), self._out)
        )
        if found != wanted:
            raise BadInput(
                f"{type(self.view.delta).__name__} gives {found} for a use of "
                f"{self.view.path!r} where the model has {wanted}: a delta answers in "
                "the shape and type of call.product()"
            )

    @property
    def fan_in(self) -> int:
        return self.view.fan_in

    def shape(self, *roles: str) -> tuple[int, ...]:
        return self.view.shape(*roles)

    def product(self, x: Array | None = None) -> Array:
        given: Any = self.x if x is None else x
        return self._product(given)

    def _input(self, x: Array | None) -> Array:
        given = self.x if x is None else x
        assert given is not None
        return given

    def key(self) -> Array | None:
        rng = self.view.rng
        if rng is None:
            return None
        fold = lambda key: jax.random.fold_in(key, self._ordinal)
        for _ in range(rng.ndim):
            fold = jax.vmap(fold)
        return fold(rng)

    def _one_key(self) -> Array | None:
        key = self.key()
        # A batched product uses all stacked layers at once: one draw covers them.
        return key.reshape(-1)[0] if key is not None and key.ndim else key

    def lowrank(
        self,
        a: Array,
        b: Array,
        gate: Array,
        rate: Any = None,
        x: Array | None = None,
        gram: Array | None = None,
    ) -> Array:
        x, key = self._input(x), self._one_key()
        if rate is not None and key is not None:
            x = drop(x, rate, key)
        own, x_labels = self._own_axes(x)
        a_labels = self.view.part_labels(("stack", "rank", "in"))
        b_labels = self.view.part_labels(("stack", "rank", "out"))
        (lo, lo_labels), (hi, hi_labels) = (a, a_labels), (b, b_labels)
        if self.transposed:
            (lo, lo_labels), (hi, hi_labels) = (b, b_labels), (a, a_labels)
            self._check_unwatched(gram)
        rows = [t for t in x_labels if t not in self.contracted or t in hi_labels]
        others = [t for t in lo_labels if t not in x_labels and t != RANK]
        u_labels = [*rows, *others, RANK]
        kept = [
            d for d, t in enumerate(self.y_labels) if not _added(t) or t in x_labels
        ]
        y_labels = [self.y_labels[d] for d in kept]
        letters: dict[Any, str] = {}
        names = [
            subscript(labels, letters)
            for labels in (x_labels, lo_labels, u_labels, hi_labels, y_labels)
        ]
        gate = self._lay(gate, self.view.part_labels(("stack", "rank")), u_labels)
        numerics = Numerics(str(self._out.dtype), self._precision)
        own, lo, hi, gate = vary_alike(own, lo, hi, gate)
        if gram is not None:
            kept_labels = [*self.view.part_labels(("stack", "rank")), _AGAIN]
            names.append(subscript(kept_labels, letters))
            gram = vary_alike(own, gram)[1]
        y = lowrank(own, lo, hi, gate, Subscripts(*names), numerics, gram)
        if has_explicit_axes() and len(kept) == len(self.y_labels):
            y = jax.sharding.reshard(y, self._out.sharding)
        if len(kept) == len(self.y_labels):
            return y
        return lax.broadcast_in_dim(y, self._out.shape, kept)

    def _check_unwatched(self, gram: Array | None) -> None:
        """Raises BadInput where the second moments of x a^T are not to be had."""
        if gram is not None:
            raise BadInput(
                f"{self.view.path}: the second moments of x a^T are asked for, and the "
                "weight is a table of rows, a kernel, one of experts, or used both "
                "ways: leave it out (delta.targets), or set another ranks.importance"
            )

    def _own_axes(self, x: Array) -> tuple[Array, list[Any]]:
        """The input without axes of the weight that the program added.

        Along those the weight is the same: what is summed there can be summed first,
        and what is batched there is one more row.
        """
        added = [d for d, t in enumerate(self.x_labels) if _added(t)]
        summed = [d for d in added if self.x_labels[d] not in self.y_labels]
        single = [d for d in added if x.shape[d] == 1 and d not in summed]
        x = jnp.sum(x, summed, keepdims=True) if summed else x
        gone = [*summed, *single]
        labels = [t for d, t in enumerate(self.x_labels) if d not in gone]
        return lax.squeeze(x, gone), labels

    def onto_x(self, vector: Array) -> Array:
        role = "out" if self.transposed else "in"
        labels = self.view.part_labels(("stack", role))
        assert self.x is not None
        return self._lay(vector, labels, self.x_labels).astype(self.x.dtype)

    def onto_y(self, vector: Array) -> Array:
        role = "in" if self.transposed else "out"
        labels = self.view.part_labels(("stack", role))
        return self._lay(vector, labels, self.y_labels).astype(self._out.dtype)

    def _lay(self, part: Array, labels: Sequence[Any], onto: Sequence[Any]) -> Array:
        """`part` with an axis for each label of `onto`, of size one if it lacks it."""
        extra = [t for t in labels if t not in onto]
        if extra:
            raise BadInput(
                f"{self.view.path}: the delta scales along {extra}, which this use "
                "sums over; adapt the weight with a low-rank delta instead"
            )
        order = [t for t in onto if t in labels]
        if order != [*labels]:
            part = jnp.transpose(part, [labels.index(t) for t in order])
        sizes = dict(zip(order, part.shape, strict=True))
        return part.reshape([sizes.get(t, 1) for t in onto])


class GatherCall(DotCall):
    """A table lookup: rows of the weight picked by index."""

    def __init__(self, *args: Any, pick: Callable[[Array], Array], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pick = pick

    def lowrank(
        self,
        a: Array,
        b: Array,
        gate: Array,
        rate: Any = None,
        x: Array | None = None,
        gram: Array | None = None,
    ) -> Array:
        del x  # The input is an index.
        self._check_unwatched(gram)
        view, table = self.view, self.contracted[0]
        (lo, lo_role), (hi, hi_role) = (a, "in"), (b, "out")
        if table in view.outs:
            (lo, lo_role), (hi, hi_role) = (b, "out"), (a, "in")
        if view.role(lo_role) != (table,) or view.stacks:
            raise BadInput(
                f"{view.path}: a lookup along one of several input axes, or in a stack "
                "of tables, has no low-rank form; leave this weight out (Freeze)"
            )
        u = self._pick(lo.T).astype(self._out.dtype)
        key = self._one_key()
        if rate is not None and key is not None:
            u = drop(u, rate, key)
        rows = [t for t in self.y_labels if not isinstance(t, Label) and not _added(t)]
        u = u * gate.reshape((1,) * (u.ndim - 1) + (-1,)).astype(u.dtype)
        y_labels = [t for t in self.y_labels if not _added(t)]
        hi_labels = view.part_labels(("rank", hi_role))
        y = einsum(
            y_labels, (u, [*rows, RANK]), (hi.astype(u.dtype), hi_labels),
            precision=self._precision,
        )  # fmt: skip
        return lax.expand_dims(y, [d for d, t in enumerate(self.y_labels) if _added(t)])

    def onto_x(self, vector: Array) -> Array:
        raise BadInput(
            f"{self.view.path}: the delta scales the input of a lookup, which is an "
            "index; adapt the weight with a low-rank delta instead"
        )


class ConvCall(DotCall):
    """A convolution: down to the rank by a kernel of its own, up again by a product.

    In each of G feature groups the same `max_rank` channels are computed,
    `y[g, o] = sum_r (conv_g(x, a))[r] gate[r] b[r, g, o]`.
    """

    def __init__(self, *args: Any, params: Mapping[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._params = params

    def lowrank(
        self,
        a: Array,
        b: Array,
        gate: Array,
        rate: Any = None,
        x: Array | None = None,
        gram: Array | None = None,
    ) -> Array:
        self._check_unwatched(gram)
        view, x, key = self.view, self._input(x), self._one_key()
        if rate is not None and key is not None:
            x = drop(x, rate, key)
        numbers = self._params["dimension_numbers"]
        groups = self._params["feature_group_count"]
        (produced,), channel = view.outs, numbers.rhs_spec[0]
        own = view.part_labels(("rank", "in"))
        order = [RANK if t == produced else t for t in view.labels if t is not None]
        shape = [
            view.max_rank if d == channel else n
            for d, n in enumerate(view.weight.shape)
        ]
        down = jnp.transpose(a, [own.index(t) for t in order]).reshape(shape)
        down = jnp.concatenate([down] * groups, axis=channel)
        plain = {
            name: self._params[name]
            for name in (
                "window_strides", "padding", "lhs_dilation", "rhs_dilation",
                "dimension_numbers", "feature_group_count", "precision",
                "preferred_element_type",
            )
        }  # fmt: skip
        u = lax.conv_general_dilated(x, down.astype(x.dtype), **plain)
        up = b * gate.reshape(-1, 1).astype(b.dtype)
        at, letters = numbers.out_spec[1], "abcdefgh"[: u.ndim]
        spread = lambda array, d, *sizes: array.reshape(
            *array.shape[:d], *sizes, *array.shape[d + 1 :]
        )
        named = lambda last: letters[:at] + last + letters[at + 1 :]
        y = contract(
            named("xr"),
            "rxo",
            named("xo"),
            spread(u, at, groups, view.max_rank),
            spread(up, 1, groups, up.shape[1] // groups).astype(u.dtype),
            self._out.dtype,
            self._precision,
        )
        return y.reshape(self._out.shape)

    def onto_x(self, vector: Array) -> Array:
        raise BadInput(
            f"{self.view.path}: the delta scales each input of each position of a "
            "convolution's window; adapt the kernel with a low-rank delta instead"
        )


class RaggedCall(DotCall):
    """Rows sorted by expert, each times its own expert's weight."""

    def __init__(self, *args: Any, sizes: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sizes = sizes

    @property
    def batched(self) -> tuple[Label, ...]:
        assert self.view.labels[0] is not None
        return (self.view.labels[0],)

    def lowrank(
        self,
        a: Array,
        b: Array,
        gate: Array,
        rate: Any = None,
        x: Array | None = None,
        gram: Array | None = None,
    ) -> Array:
        self._check_unwatched(gram)
        x, key = self._input(x), self._one_key()
        if rate is not None and key is not None:
            x = drop(x, rate, key)
        lo, hi = (b, a) if self.transposed else (a, b)
        u = self._times(x, jnp.swapaxes(lo, 1, 2), x.dtype)
        up = hi * gate[..., None].astype(hi.dtype)
        return self._times(u, up, self._out.dtype)

    def _times(self, x: Array, w: Array, dtype: Any) -> Array:
        return lax.ragged_dot(
            x, w.astype(x.dtype), self._sizes, precision=self._precision,
            preferred_element_type=dtype,
        )  # fmt: skip

    def onto_x(self, vector: Array) -> Array:
        assert self.x is not None
        return self._per_row(vector).astype(self.x.dtype)

    def onto_y(self, vector: Array) -> Array:
        return self._per_row(vector).astype(self._out.dtype)

    def _per_row(self, vector: Array) -> Array:
        count = self._out.shape[0]
        return jnp.repeat(vector, self._sizes, axis=0, total_repeat_length=count)


def _added(label: Any) -> bool:
    """Whether a label marks an axis of size one that only the program knows."""
    return isinstance(label, tuple) and len(label) == 2 and label[0] == "added"
