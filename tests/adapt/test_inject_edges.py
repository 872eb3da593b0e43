"""Quantised leaves, mutable collections, keywords, meshes: the border of the walk."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Freeze, Rule, Train
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA

X = jnp.linspace(-1, 1, 18).reshape(3, 6)
W = jnp.linspace(-1, 1, 48).reshape(6, 8)
RULES = [Rule("w", LoRA(), rank=2)]
QUANTISED = {
    "w": jnp.asarray(np.random.default_rng(0).integers(-9, 9, (6, 8)), jnp.int8),
    "scale": jnp.linspace(0.1, 0.3, 8),
}


def dequantised(p, x):
    return x @ (p["w"].astype(x.dtype) * p["scale"][None])


def equal(apply, params, inputs, rules=RULES, **options):
    adapted = attach(apply, params, *inputs, rules=rules, **options)
    trained, dials = oracle.loud(adapted, 2)
    both = oracle.both(adapted, apply, params, inputs, trained, dials)
    assert oracle.leafwise(*both) <= 1e-5
    return adapted, trained, dials


def test_a_quantised_leaf_is_corrected_in_its_own_units(monkeypatch):
    real = lambda xp, s, w, f, d: dense(xp, s, w.astype(jnp.float32), f, d)
    dense = oracle.dense_weight
    monkeypatch.setattr(oracle, "dense_weight", real)
    adapted, trained, dials = equal(dequantised, QUANTISED, (X,))
    assert trained["w"]["a"].dtype == jnp.float32
    merged = adapted.merge(adapted.frozen(), trained, dials)
    assert merged["w"].dtype == jnp.float32
    ours = adapted.apply(adapted.frozen(), trained, X, dials=dials)
    np.testing.assert_allclose(ours, dequantised(merged, X), rtol=1e-4, atol=1e-5)
    text = jax.jit(adapted.apply).lower(adapted.frozen(), trained, X).as_text()
    assert "tensor<6x8xi8>" in text


@pytest.mark.parametrize("dense", [False, True])
def test_whole_numbers_that_stay_whole_are_refused(dense):
    def apply(p, x):
        return x @ (p["w"] + p["w"]).astype(x.dtype)

    with pytest.raises(BadInput, match=r"(?s)'w'.*add"):
        attach(apply, QUANTISED, X, rules=RULES, allow_dense=dense)
    wide = {**QUANTISED, "w": QUANTISED["w"].astype(jnp.int32)}
    with pytest.raises(BadInput, match="at most 8 bits"):
        attach(dequantised, wide, X, rules=RULES)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_updates_that_depend_on_a_weight_are_handed_back():
    model, x = Normed(), jax.random.normal(jax.random.key(1), (32, 6))
    params = model.init(jax.random.key(0), x, train=False)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    rules = [Rule("**/kernel", LoRA(), rank=2)]
    adapted, trained, dials = equal(apply, params, (x,), rules)
    _, updates = adapted.apply(adapted.frozen(), trained, x, dials=dials)
    assert set(updates) == {"batch_stats"}
    with pytest.raises(BadInput, match=r"batch_stats/.*which the model itself updates"):
        attach(apply, params, x, rules=[*rules, Train("batch_stats/**")])
    still = functools.partial(model.apply, train=False)
    attach(still, params, x, rules=[*rules, Train("batch_stats/**")])


def test_keywords_that_change_are_an_input():
    def model(p, x, *, gain):
        return gain * (x @ p["w"])

    apply = lambda p, x, given: model(p, x, **given)
    equal(apply, {"w": W}, (X, {"gain": jnp.float32(3)}))


def test_what_no_rule_follows_is_exact_when_allowed():
    def apply(p, x):
        return x @ jnp.where(jnp.tri(6, 8) > 0, p["w"], 0) + x @ p["w"]

    equal(apply, {"w": W}, (X,), allow_dense=True)


@pytest.mark.parametrize("spec", [P(None, "m"), P("m", None)], ids=["out", "in"])
def test_an_explicit_mesh_with_either_axis_sharded(spec):
    """Contracting a sharded axis needs to be told where the result lives."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    host = np.asarray(X[:2])

    def apply(p, x):
        return jnp.matmul(x, p["w"], out_sharding=P("d", spec[1]))

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        params, x = {"w": put(np.asarray(W), spec)}, put(host, P("d", spec[0]))
        adapted = attach(apply, params, x, rules=RULES)
        trained, dials = oracle.loud(adapted, 2)
        loss = lambda t: jnp.sum(
            adapted.apply(adapted.frozen(), t, x, dials=dials) ** 2
        )
        ours = jax.jit(jax.value_and_grad(loss))(trained)
    trained, dials = jax.tree.map(np.asarray, (trained, dials))
    tree = lambda t: oracle.merged(jnp, adapted, {"w": W}, t, dials)
    plain = lambda t: jnp.sum((host @ tree(t)["w"]) ** 2)
    dense = jax.value_and_grad(plain)(jax.tree.map(jnp.asarray, trained))
    assert oracle.leafwise(ours, dense) <= 1e-5


def test_a_part_that_is_explicit_inside_automatic_axes():
    """Factors go along where it says where its weights lie, keys of dropout as well."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    x, rules = X[:2], [Rule("w", LoRA(dropout=0.5), rank=2)]

    def inside(w, x):
        w = jax.sharding.reshard(w, P(None, "m"))
        return jnp.tanh(jnp.matmul(x, w, out_sharding=P("d", "m")))

    def apply(p, x):
        where = (P("m", "d"), P("d"))
        return jax.sharding.explicit_axes(inside, in_sharding=where)(p["w"], x)

    def both(adapted):
        loss = lambda t: jnp.sum(
            adapted.apply({"w": W}, t, x, dials=dials, key=jax.random.key(1)) ** 2
        )
        return jax.jit(jax.value_and_grad(loss))(trained)

    plain = attach(lambda p, x: jnp.tanh(x @ p["w"]), {"w": W}, x, rules=rules)
    trained, dials = oracle.loud(plain, 2)
    wanted = both(plain)
    with jax.set_mesh(mesh):
        found = both(attach(apply, {"w": W}, x, rules=rules))
    assert oracle.leafwise(found, wanted) <= 1e-5


def test_factors_lie_on_an_explicit_mesh_as_their_weight_does():
    """Each axis that they have of it is split as it is, and the rank is whole."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    x, seen = X[:2], {}

    def inside(w, x):
        return jnp.matmul(x, jax.sharding.reshard(w, P("m", "d")), out_sharding=P())

    def apply(p, x):
        where = (P(), P(None, "m"))
        return jax.sharding.explicit_axes(inside, in_sharding=where)(p["w"], x)

    def look(program):
        for equation in program.eqns:
            for inner in jax.core.jaxprs_in_params(equation.params):
                look(inner)
            if equation.primitive.name == "reshard":
                (out,) = equation.outvars
                seen[out.aval.shape] = out.aval.sharding.spec

    with jax.set_mesh(mesh):
        adapted = attach(apply, {"w": W}, x, rules=[Rule("w", LoRA(), rank=3)])
        trained, dials = oracle.loud(adapted, 2)
        run = lambda t: adapted.apply({"w": W}, t, x, dials=dials)
        look(jax.make_jaxpr(run)(trained).jaxpr)
    assert seen[6, 8] == P("m", "d")
    assert seen[3, 6] == P(None, "m")
    assert seen[3, 8] == P(None, "d")


def test_a_frozen_neighbour_may_be_anything():
    apply = lambda p, x: x @ (p["w"] * jnp.linalg.norm(p["v"], axis=0)[None])
    params = {"w": W, "v": W + 1}
    equal(apply, params, (X,), [Freeze("v"), *RULES])


def iterated(p, x):
    """As solvers are written: a loop of unknown length with a derivative of its own."""

    @jax.custom_vjp
    def run(w, x):
        step = lambda c: (c[0] + 1, jnp.sin(c[1] @ w))
        return jax.lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]

    def forward(w, x):
        return run(w, x), (w, x)

    def backward(kept, dy):
        unrolled = lambda w, x: jnp.sin(jnp.sin(jnp.sin(x @ w) @ w) @ w)
        return jax.vjp(unrolled, *kept)[1](dy)

    run.defvjp(forward, backward)
    return run(p["w"], x @ p["w"])


def test_a_loop_with_its_own_derivative_is_refused_or_exact_by_its_own_rule():
    square = {"w": W[:, :6]}
    with pytest.raises(BadInput, match=r"custom_vjp_call.*allow_dense=True"):
        attach(iterated, square, X, rules=RULES)
    equal(iterated, square, (X,), allow_dense=True)


@pytest.mark.parametrize("lay", [None, lambda x: x])
def test_a_rule_of_its_own_holds_for_weights_that_nothing_corrects(lay, caplog):
    @jax.custom_vjp
    def doubled(w, x):
        return x @ w

    # A rule that is no derivative shows whether it was used.
    doubled.defvjp(lambda w, x: (x @ w, w), lambda w, dy: (None, 2 * dy @ w.T))
    apply = lambda p, x: jnp.sum(doubled(p["frozen"], x @ p["w"]))
    params = {"w": W, "frozen": W.T}
    with caplog.at_level(logging.WARNING, "lowrank"):
        adapted = attach(apply, params, X, rules=[Freeze("frozen"), *RULES])
        frozen, trained = adapted.init(jax.random.key(0))
        slope = jax.grad(lambda t: adapted.apply(frozen, t, X, lay=lay))(trained)
    plain = lambda p, x: jnp.sum(x @ p["w"] @ p["frozen"])
    other = attach(plain, params, X, rules=[Freeze("frozen"), *RULES])
    once = jax.grad(lambda t: other.apply(frozen, t, X))(trained)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-5), slope, once
    )
    assert np.abs(once["w"]["b"]).max() > 0
    assert not caplog.records
