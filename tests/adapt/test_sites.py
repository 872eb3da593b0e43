"""Discovery: uses, axes and obstacles, from shapes alone."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.adapt.sites import discover
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA

X = jax.ShapeDtypeStruct((3, 6), jnp.float32)
W = jax.ShapeDtypeStruct((6, 6), jnp.float32)


def site(apply, shape=W, x=X):
    return discover(lambda p, x: apply(p["w"], x), {"w": shape}, x)["w"]


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_axes_come_from_what_the_program_contracts():
    found = site(lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), shaped(6, 2, 4))
    assert (found.ins, found.outs, found.stacks) == ((0,), (1, 2), ())
    assert (found.d_in, found.d_out, found.largest_rank) == (6, 8, 6)
    assert found.flops_per_rank == 2 * 3 * (6 + 8)
    found = site(lambda w, x: w @ x.T, shaped(8, 6))
    assert (found.ins, found.outs) == ((1,), (0,))


def test_loops_count_their_trips():
    step = lambda w: lambda c, _: (jnp.sin(c @ w), None)
    once = site(lambda w, x: step(w)(x, None)[0])
    looped = site(lambda w, x: lax.scan(step(w), x, None, length=4)[0])
    nested = site(
        lambda w, x: lax.scan(
            lambda c, _: lax.scan(step(w), c, None, length=4), x, None, length=3
        )[0]
    )
    stacked = site(
        lambda w, x: lax.scan(lambda c, v: (jnp.sin(c @ v), None), x, w)[0],
        shaped(4, 6, 6),
    )
    counts = [s.flops_per_rank / once.flops_per_rank for s in (looped, nested, stacked)]
    assert counts == [4, 12, 4]
    assert [use.trips for use in nested.uses] == [12]
    assert (stacked.stacks, stacked.num_layers) == ((0,), 4)


def test_a_loop_with_a_counter_is_not_counted_twice():
    found = site(lambda w, x: lax.fori_loop(0, 4, lambda i, c: c @ w + i, x))
    assert len(found.uses) == 1


def test_lookups_orient_tied_tables():
    found = site(
        lambda w, ids: jnp.tanh(w[ids]) @ w.T,
        shaped(11, 6),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    assert (found.ins, found.outs, found.fan_in) == ((0,), (1,), 1)
    assert {use.kind for use in found.uses} == {"gather", "dot"}
    assert found.obstacle == ""


OBSTACLES = [
    ("mul", lambda w, x: x @ (w * w)),
    ("sqrt|mul|reduce", lambda w, x: x @ w / jnp.linalg.norm(w)),
    ("mul", lambda w, x: x @ (w * jnp.tri(6))),
    ("div", lambda w, x: x @ (1 / w)),
    ("add", lambda w, x: x @ (w + jnp.eye(6))),
    ("pad", lambda w, x: x @ jnp.pad(w, 1)[1:7, 1:7]),
    ("select_n", lambda w, x: x @ jnp.where(jnp.tri(6) > 0, w, 0)),
    ("stop_gradient", lambda w, x: x @ lax.stop_gradient(w)),
    ("convert_element_type", lambda w, x: x @ w.astype(jnp.int32).astype(x.dtype)),
    ("dot_general", lambda w, x: x @ (w @ w)),
    ("cond", lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, w)),
    ("while", lambda w, x: x @ lax.while_loop(lambda c: c[0, 0] < 1, jnp.sin, w)),
    ("output of the model", lambda w, x: (x @ w, w)),
    (
        "scan",
        lambda w, x: lax.scan(lambda c, _: (c * 2, x @ c), w, None, length=2)[1],
    ),
    ("output of a loop", lambda w, x: lax.scan(lambda c, _: (c, w), x, None, 2)[1]),
    ("reshape", lambda w, x: x @ jnp.repeat(w, 2, axis=1)),
]


@pytest.mark.parametrize(("primitive", "use"), OBSTACLES, ids=[o[0] for o in OBSTACLES])
def test_an_obstacle_names_weight_and_primitive(primitive, use):
    apply = lambda p, x: use(p["w"], x)
    params = {"w": jnp.ones((6, 6))}
    found = discover(apply, params, X)["w"]
    assert re.search(primitive, found.obstacle)
    with pytest.raises(BadInput, match=rf"(?s)'w'.*({primitive})"):
        attach(apply, params, X, rules=[Rule("w", LoRA(), rank=1)])


def test_an_unused_weight_says_so():
    assert "not used" in site(lambda w, x: x).obstacle
    assert "not used" in site(lambda w, x: (x @ w, x)[1]).obstacle


def test_dead_uses_do_not_obstruct():
    found = site(lambda w, x: (jnp.linalg.norm(w * w), x @ w)[1])
    assert found.obstacle == ""
    scanned = lambda w, x: lax.scan(lambda c, v: (c @ v, (v * 2)), x, w)[0]
    assert site(scanned, shaped(3, 6, 6)).obstacle == ""


def test_a_half_contracted_axis_is_no_site():
    found = site(
        lambda w, x: jnp.einsum("bk,dhk->bdh", x, w.reshape(4, 2, 6)), shaped(4, 12)
    )
    assert "one part is contracted" in found.obstacle
    assert not found.outs


def test_uses_that_disagree_are_an_obstacle():
    apply = lambda w, x: (
        x @ w[None].reshape(6, 6),
        jnp.einsum("ab,ab->", x[:, :6], w[:3]),
    )
    assert site(apply).obstacle
    both = lambda w, x: (jnp.einsum("a,abc", x[0], w), jnp.einsum("b,abc", x[0], w))
    assert "different axes" in site(both, shaped(6, 6, 6)).obstacle


def test_only_the_weights_asked_for_stand_in_each_others_way():
    apply = lambda p, x: x @ (p["q"] @ p["w"])
    params = {"q": W, "w": W}
    assert "dot_general" in discover(apply, params, X)["w"].obstacle
    assert discover(apply, params, X, among=["w"])["w"].obstacle == ""


def test_parameters_are_arrays():
    with pytest.raises(BadInput, match=r"params\['eps'\] must be an array"):
        discover(lambda p, x: x @ p["w"] * p["eps"], {"w": W, "eps": 2.0}, X)
