"""A strategy for programs: weights put through rearrangements, used in every way.

A weight is built backwards, from what its use needs to what is stored. Its axes keep
their role ("i" contracted, "o" produced, "s" stacked), and only what has a factored
form is drawn, so a refusal is a failure like a wrong number.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

WIDTH, ROWS = 6, 3


@dataclasses.dataclass
class Program:
    """A chain of stages, each (params, x) -> x, with the shapes of its weights.

    Attributes:
      shapes: Of the weights.
      stages: In order.
      words: What was drawn, for the report of a failure.
    """

    shapes: dict
    stages: list
    words: list

    def apply(self, params, x):
        for stage in self.stages:
            x = jnp.sin(stage(params, x))
        return x

    def __repr__(self):
        return f"{' '.join(self.words)} {self.shapes}"


class Maker:
    def __init__(self, draw, only=()):
        self.draw = draw
        self.only = only
        self.program = Program({}, [], [])

    def pick(self, options):
        return self.draw(st.sampled_from(list(options)))

    def number(self, low, high):
        return self.draw(st.integers(low, high))

    def numbers(self, *shape):
        rng = np.random.default_rng(self.number(0, 99))
        return rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)

    def leaf(self, axes):
        name = f"w{len(self.program.shapes)}"
        self.program.shapes[name] = tuple(size for _, size in axes)
        return lambda p: p[name]

    # Weights: (axes, depth) -> params -> array with these axes.

    def weight(self, axes, depth=None, join=True):
        depth = self.number(0, 3) if depth is None else depth
        axes = tuple(axes)
        if depth == 0:
            return self.leaf(axes)
        routes = [
            self.permuted, self.merged, self.parted, self.sliced, self.moved,
            self.reversed, self.scaled, self.scaled, self.picked, self.grown,
            self.named,
        ]  # fmt: skip
        # What is joined can be cut and merged along the joined axis only in part.
        routes += [self.joined, self.joined] if join else []
        route = self.pick(routes)
        self.program.words.append(route.__name__)
        return route(axes, depth - 1)

    def permuted(self, axes, depth):
        order = self.draw(st.permutations(range(len(axes))))
        # Axes of one role keep their order: they may be parts of one stored axis.
        for role in "ios":
            own = [d for d in range(len(axes)) if axes[d][0] == role]
            places = [k for k, d in enumerate(order) if d in own]
            order = [
                own[places.index(k)] if k in places else d for k, d in enumerate(order)
            ]
        inner = self.weight([axes[d] for d in order], depth, join=False)
        back = np.argsort(order)
        return lambda p: inner(p).transpose(*back)

    def merged(self, axes, depth):
        """Two stored axes become one."""
        d = self.number(0, len(axes) - 1)
        role, size = axes[d]
        if size % 2 or size == 2:
            return self.leaf(axes)
        pair = [(role, 2), (role, size // 2)]
        inner = self.weight([*axes[:d], *pair, *axes[d + 1 :]], depth, join=False)
        shape = [size for _, size in axes]
        return lambda p: inner(p).reshape(shape)

    def parted(self, axes, depth):
        """One stored axis becomes two."""
        pairs = [d for d in range(len(axes) - 1) if axes[d][0] == axes[d + 1][0]]
        if not pairs:
            return self.leaf(axes)
        d = self.pick(pairs)
        one = (axes[d][0], axes[d][1] * axes[d + 1][1])
        inner = self.weight([*axes[:d], one, *axes[d + 2 :]], depth, join=False)
        shape = [size for _, size in axes]
        return lambda p: inner(p).reshape(shape)

    def sliced(self, axes, depth):
        d, start, stride = self.number(0, len(axes) - 1), self.number(0, 2), 1
        role, size = axes[d]
        stride = self.number(1, 2)
        full = start + size * stride
        inner = self.weight([*axes[:d], (role, full), *axes[d + 1 :]], depth, False)
        if stride == 1 and start and self.pick([True, False]):
            return lambda p: jnp.split(inner(p), [start], axis=d)[1]
        return lambda p: lax.slice_in_dim(inner(p), start, full, stride, d)

    def moved(self, axes, depth):
        d, start = self.number(0, len(axes) - 1), self.number(0, 2)
        role, size = axes[d]
        inner = self.weight([*axes[:d], (role, size + 2), *axes[d + 1 :]], depth, False)
        at = jnp.int32(start)
        return lambda p: lax.dynamic_slice_in_dim(inner(p), at, size, d)

    def reversed(self, axes, depth):
        d = self.number(0, len(axes) - 1)
        inner = self.weight(axes, depth, join=False)
        return lambda p: jnp.flip(inner(p), d)

    def scaled(self, axes, depth):
        inner = self.weight(axes, depth, join=False)
        d = self.number(-1, len(axes) - 1)
        shape = [size if k == d else 1 for k, (_, size) in enumerate(axes)]
        by = self.numbers(*shape) if d >= 0 else self.numbers()
        how = self.pick([jnp.multiply, jnp.divide, lambda w, by: by * -w])
        return lambda p: how(inner(p), jnp.asarray(by, inner(p).dtype))

    def picked(self, axes, depth):
        inner = self.weight([("s", 3), *axes], depth, join=False)
        i = self.number(-3, 2)
        return lambda p: inner(p)[i]

    def grown(self, axes, depth):
        inner = self.weight(axes, depth, join=False)
        d = self.number(0, len(axes))
        return lambda p: jnp.squeeze(jnp.expand_dims(inner(p), d), d)

    def named(self, axes, depth):
        inner = self.weight(axes, depth)
        how = self.pick(
            [jax.jit(lambda w: w), lambda w: checkpoint_name(w, "w"),
             lambda w: lax.optimization_barrier((w, jnp.zeros(1)))[0]]
        )  # fmt: skip
        return lambda p: how(inner(p))

    def joined(self, axes, depth):
        wide = [d for d, (_, size) in enumerate(axes) if size > 1]
        if not wide:
            return self.leaf(axes)
        d = self.pick(wide)
        role, size = axes[d]
        cut = self.number(1, size - 1)
        part = lambda n: self.weight(
            [*axes[:d], (role, n), *axes[d + 1 :]], depth, False
        )
        left, right = part(cut), part(size - cut)
        return lambda p: jnp.concatenate([left(p), right(p)], axis=d)

    # Uses: a stage (params, x) -> x.

    def product(self):
        w = self.weight([("i", WIDTH), ("o", WIDTH)])
        if self.pick([True, False]):
            return lambda p, x: x @ w(p)
        return lambda p, x: jnp.sin(x @ w(p)) @ w(p).T

    def heads(self):
        axes = [("i", 2), ("i", 3), ("o", 3), ("o", 2)]
        w = self.weight(axes)
        return lambda p, x: jnp.einsum(
            "bij,ijkl->bkl", x.reshape(-1, 2, 3), w(p)
        ).reshape(-1, WIDTH)

    def experts(self):
        w = self.weight([("s", 2), ("i", WIDTH), ("o", WIDTH)])
        if self.pick([True, False]):
            return lambda p, x: jnp.einsum("bi,eio->ebo", x, w(p)).sum(0)
        both = lambda x: jnp.stack([x, jnp.cos(x)])
        return lambda p, x: jnp.einsum(
            "ebo,eio->ebi", jnp.sin(jnp.einsum("ebi,eio->ebo", both(x), w(p))), w(p)
        ).sum(0)

    def convolution(self):
        groups = self.pick([1, 2])
        w = self.weight([("i", 3), ("i", WIDTH // groups), ("o", WIDTH)], join=False)
        dilation = self.number(1, 2)
        return lambda p, x: lax.conv_general_dilated(
            x[None], w(p), (1,), "SAME", rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups,
        )[0]  # fmt: skip

    def lookup(self):
        w = self.weight([("i", 5), ("o", WIDTH)], join=False)
        ids = jnp.asarray([self.number(0, 4) for _ in range(ROWS)])
        return lambda p, x: x + w(p)[ids]

    def ragged(self):
        w = self.weight([("s", 3), ("i", WIDTH), ("o", WIDTH)], join=False)
        cut = self.number(0, ROWS)
        sizes = jnp.asarray([cut, 0, ROWS - cut])
        return lambda p, x: lax.ragged_dot(x, w(p), sizes)

    def layers(self):
        w = self.weight([("s", 3), ("i", WIDTH), ("o", WIDTH)], join=False)
        backwards = self.pick([True, False])
        tied = self.pick([True, False])
        back = lambda y, w: jnp.sin(y) @ w.T if tied else y
        step = lambda c, w: (jnp.sin(back(c @ w, w)), None)
        return lambda p, x: lax.scan(step, x, w(p), reverse=backwards)[0]

    # Wrappers: a stage inside something that runs a program of its own.

    def wrapped(self, stage, can_map):
        ways = {
            "jit": lambda p, x: jax.jit(stage)(p, x),
            "remat": lambda p, x: jax.checkpoint(stage)(p, x),
            "scan": lambda p, x: lax.scan(
                lambda c, _: (jnp.sin(stage(p, c)), None), x, None, length=2
            )[0],
            "cond": lambda p, x: lax.cond(
                x[0, 0] > 0, lambda: stage(p, x), lambda: jnp.cos(stage(p, 2 * x))
            ),
            "plain": stage,
        }
        if can_map:
            ways["vmap"] = lambda p, x: jax.vmap(lambda x: stage(p, x[None])[0])(x)
        name = self.pick(ways)
        self.program.words.append(f"| {name}")
        return ways[name]

    def stage(self):
        rows = [self.product, self.heads]
        uses = [
            *rows, self.experts, self.convolution, self.lookup, self.ragged, self.layers
        ]  # fmt: skip
        uses = [use for use in uses if not self.only or use.__name__ in self.only]
        use = self.pick(uses)
        self.program.words.append(f"; {use.__name__}:")
        return self.wrapped(use(), use in rows)


@st.composite
def programs(draw, only=()) -> Program:
    """One stage, or two in a row; of the uses named in `only`, if any are."""
    maker = Maker(draw, only)
    for _ in range(maker.pick([1, 1, 2])):
        maker.program.stages.append(maker.stage())
    return maker.program


def made(program: Program, dtype) -> tuple[Callable, dict, tuple]:
    """(apply, params, inputs), with weights that keep activations near one."""
    rng = np.random.default_rng(5)
    params = {
        name: jnp.asarray(rng.normal(0, 0.4, shape), dtype)
        for name, shape in program.shapes.items()
    }
    assert all(math.prod(shape) for shape in program.shapes.values())
    return (
        program.apply,
        params,
        (jnp.asarray(rng.normal(0, 0.7, (ROWS, WIDTH)), dtype),),
    )
