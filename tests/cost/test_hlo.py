"""Exchanges are read from a program's text: what, between whom, how often, how much."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank.cost.hlo import Array, Exchange, traffic

#: As XLA prints programs, with loops, tuples and layouts of its own.
WRITTEN = Path(__file__).with_name("written.hlo").read_text()


def test_a_loop_is_counted_by_its_trips_and_a_moved_argument_is_known():
    found = traffic(WRITTEN, 16)
    gather, reduce, permute = found.exchanges
    assert gather == Exchange(
        "all-gather", (Array("bf16", (32, 40)),), ("frozen['w']",), 4, 7.0,
        "jit(packed)/dot",
    )  # fmt: skip
    assert gather.bytes == 7 * 32 * 40 * 2 * 3 / 4
    assert (reduce.kind, reduce.group, reduce.times) == ("all-reduce", 2, 7.0)
    assert reduce.origins == (None,)
    assert reduce.bytes == 7 * 2 * (5 * 24 * 4) / 2
    assert (permute.kind, permute.arrays) == (
        "collective-permute", (Array("f32", (5, 24)),),
    )  # fmt: skip
    assert permute.bytes == 5 * 24 * 4
    assert found.unbounded == 0


def test_a_loop_that_does_not_say_how_often_it_runs_is_told():
    found = traffic(WRITTEN.replace("constant(7)", "parameter(1)"), 16)
    assert found.unbounded == 1
    assert found.exchanges[0].times == 1.0
    known = WRITTEN.replace(
        "body=%body", 'body=%body, x={"known_trip_count":{"n":"9"}}'
    )
    assert traffic(known, 16).exchanges[0].times == 9.0


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ("[4,4]<=[16]", 4), ("[2,8]<=[4,4]T(1,0)", 8), ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{}", 16), ("{{0},{1}}", None),
    ],
)  # fmt: skip
def test_groups_are_read_in_every_form(groups, count):
    found = traffic(WRITTEN.replace("[4,4]<=[16]", groups), 16)
    gathers = [one for one in found.exchanges if one.kind == "all-gather"]
    assert [one.group for one in gathers] == ([] if count is None else [count])


def mesh(**axes):
    devices = np.array(jax.devices()[: int(np.prod([*axes.values()]))])
    return Mesh(
        devices.reshape(*axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


LAYERS, WIDTH, ROWS = 5, 24, 16


def model(frozen, x):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(body, x, frozen["w"])[0]


@functools.cache
def compiled(gradient):
    where = mesh(fsdp=8)
    lay = lambda *spec: NamedSharding(where, P(*spec))
    shape = lambda *size, at: jax.ShapeDtypeStruct(size, jnp.float32, sharding=at)
    w = shape(LAYERS, WIDTH, WIDTH, at=lay(None, "fsdp"))
    x = shape(ROWS, WIDTH, at=lay("fsdp"))

    def whole(frozen, x):
        return model(frozen, x)

    def slope(frozen, x):
        return jax.grad(lambda frozen: (model(frozen, x) ** 2).mean())(frozen)

    run = jax.jit(slope if gradient else whole, out_shardings=lay())
    return traffic(run.lower({"w": w}, x).compile().as_text(), 8)


def test_a_scanned_weight_is_gathered_in_every_trip():
    found = compiled(False)
    gathers = [one for one in found.exchanges if one.origins == ("frozen['w']",)]
    moved = sum(one.bytes for one in gathers)
    assert moved == pytest.approx(LAYERS * WIDTH * WIDTH * 4 * 7 / 8)
    assert {one.group for one in gathers} == {8}


def test_a_gradient_is_computed_and_what_is_kept_for_it_is_told():
    found = compiled(True)
    summed = [o for o in found.exchanges if o.kind in ("all-reduce", "reduce-scatter")]
    assert summed
    assert all(one.origins == (None,) * len(one.origins) for one in summed)
    # Each layer's answer, of this device's rows, at the least.
    assert found.stacked >= LAYERS * ROWS // 8 * WIDTH * 4


def test_one_device_says_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    found = traffic(text, 1)
    assert found.exchanges == ()
    assert found.stacked == 0
