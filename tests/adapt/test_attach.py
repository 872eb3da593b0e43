"""The adapted model as its callers see it: trees, previews, merging, refusals."""

import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import programs
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.core.errors import BadInput, LowrankError
from lowrank.core.trees import fingerprint
from lowrank.deltas.lora import LoRA

X = jnp.linspace(-1, 1, 18).reshape(3, 6)
W = jnp.linspace(-1, 1, 48).reshape(6, 8)
RULES = [Rule("w", LoRA(), rank=2)]


def product(p, x):
    return x @ p["w"]


def loud(adapted):
    trained, dials = oracle.loud(adapted, 2)
    return adapted.frozen(), trained, dials


def test_the_start_is_the_base_to_the_bit():
    adapted = attach(product, {"w": W}, X, rules=RULES)
    frozen, trained = adapted.init(jax.random.key(0))
    assert jnp.array_equal(adapted.apply(frozen, trained, X), product({"w": W}, X))
    assert jnp.array_equal(adapted.merge(frozen, trained)["w"], W)


def test_the_base_is_shared_and_never_changed():
    params = {"w": W, "v": jnp.ones((8, 2))}
    apply = lambda p, x: x @ p["w"] @ p["v"]
    before = fingerprint(params)
    adapted = attach(apply, params, X, rules=[*RULES, Train("v")])
    assert adapted.frozen() == {"w": params["w"]}
    assert adapted.frozen()["w"] is params["w"]
    frozen, trained, dials = loud(adapted)
    merged = adapted.merge(frozen, trained, dials)
    adapted.verify(jax.random.key(0), X)
    assert fingerprint(params) == before
    assert fingerprint(merged) != before
    assert merged["v"] is trained["v"]


def test_merging_refuses_what_is_not_finite():
    adapted = attach(product, {"w": W}, X, rules=RULES)
    frozen, trained = adapted.init(jax.random.key(0))
    for poison in (jnp.nan, jnp.inf):
        broken = {"w": {**trained["w"], "b": trained["w"]["b"] + poison}}
        with pytest.raises(LowrankError, match=r"merging 'w'.*not finite"):
            adapted.merge(frozen, broken)


def test_shapes_are_enough_for_a_preview():
    apply = lambda p, x: lax.scan(lambda c, v: (c @ v, None), x, p["s"])[0] @ p["w"]
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    params = {"s": shape(4, 6, 6), "w": shape(6, 8)}
    rules = [Rule("s", LoRA(), rank=2), Train("w")]
    adapted = attach(apply, params, shape(3, 6), rules=rules)
    found = adapted.trained_shapes()
    assert found["s"]["a"].shape == (4, 2, 6)
    assert found["w"] == params["w"]
    out = jax.eval_shape(adapted.apply, adapted.frozen(), found, shape(3, 6))
    assert (out.shape, out.dtype) == ((3, 8), jnp.bfloat16)
    with pytest.raises(BadInput, match="needs the weights themselves"):
        adapted.init_trained(jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen": {}}, "frozen lacks 'w'"),
        ({"trained": {}}, "trained lacks 'w'"),
        ({"dials": {}}, "dials lacks 'w'"),
    ],
)
def test_a_tree_that_lacks_a_path_is_refused(changes, words):
    adapted = attach(product, {"w": W}, X, rules=RULES)
    frozen, trained = adapted.init(jax.random.key(0))
    trees = {"frozen": frozen, "trained": trained, "dials": adapted.dials(), **changes}
    with pytest.raises(BadInput, match=words):
        adapted.apply(trees["frozen"], trees["trained"], X, dials=trees["dials"])


def test_raw_key_data_is_refused():
    adapted = attach(product, {"w": W}, X, rules=RULES)
    with pytest.raises(BadInput, match=r"jax\.random\.key\(seed\)"):
        adapted.init(jax.random.PRNGKey(0))


INPUTS = [
    np.asarray(X, np.float64),
    np.asarray(X),
    X.astype(jnp.bfloat16),
    np.ones((3, 6), np.int64),
]


@pytest.mark.parametrize("x", INPUTS, ids=lambda x: f"{type(x).__name__}-{x.dtype}")
def test_inputs_of_any_kind_give_what_the_model_gives(x):
    params = {"w": W.astype(jnp.bfloat16)}
    apply = lambda p, x, half: (x.astype(jnp.bfloat16) * half) @ p["w"]
    adapted = attach(apply, params, x, 0.5, rules=RULES)
    trees = adapted.init(jax.random.key(0))
    for half in (0.5, jnp.float32(0.5), np.float32(0.5)):
        expected = apply(params, jnp.asarray(x), half)
        ours = adapted.apply(*trees, x, half)
        assert ours.dtype == expected.dtype
        assert jnp.array_equal(ours, expected)


def test_parameters_may_be_numpy_arrays():
    adapted = attach(product, {"w": np.asarray(W, np.float64)}, X, rules=RULES)
    adapted.verify(jax.random.key(0), X)
    frozen, trained = adapted.init(jax.random.key(0))
    assert adapted.apply(frozen, trained, X).dtype == jnp.float32


def test_the_ambient_matmul_precision_is_obeyed():
    adapted = attach(product, {"w": W}, X, rules=RULES)
    trees = adapted.init(jax.random.key(0))

    def precise():
        text = jax.jit(adapted.apply).lower(*trees, X).as_text()
        return ["HIGHEST" in t for t in text.splitlines() if "dot_general" in t]

    assert precise() == [False] * 3
    with jax.default_matmul_precision("highest"):
        assert precise() == [True] * 3


def test_allow_dense_is_exact():
    def apply(p, x):
        joined = jnp.concatenate([p["w"], p["w"] ** 2], axis=1)
        return jnp.sin(x @ p["w"]) @ jnp.ones((8, 16)) + x @ joined

    adapted = attach(apply, {"w": W}, X, rules=RULES, allow_dense=True)
    _, trained, dials = loud(adapted)
    ours, dense = oracle.both(adapted, apply, {"w": W}, (X,), trained, dials)
    assert oracle.leafwise(ours, dense) <= 1e-5
    with pytest.raises(BadInput, match="allow_dense=True"):
        attach(apply, {"w": W}, X, rules=RULES)


def test_uses_over_different_axes_are_exact_when_allowed():
    def apply(p, x):
        one = jnp.einsum("ba,acd->bcd", x, p["w"])
        return one, jnp.einsum("bc,acd->bad", x, p["w"])

    params = {"w": jnp.linspace(-1, 1, 144).reshape(6, 6, 4)}
    adapted = attach(apply, params, X, rules=RULES, allow_dense=True)
    _, trained, dials = loud(adapted)
    ours, dense = oracle.both(adapted, apply, params, (X,), trained, dials)
    assert oracle.leafwise(ours, dense) <= 1e-5


def test_remat_policies_are_kept():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    step = jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=policy, prevent_cse=False)
    adapted = attach(lambda p, x: step(p["w"], x), {"w": W}, X, rules=RULES)
    trees = adapted.init(jax.random.key(0))
    (found,) = [
        eqn
        for eqn in jax.make_jaxpr(adapted.apply)(*trees, X).eqns
        if eqn.primitive.name in ("checkpoint", "remat", "remat2")
    ]
    assert found.params["policy"] is policy
    assert found.params["prevent_cse"] is False


def test_a_custom_rule_fed_by_a_weight_is_reported(caplog):
    for name in ("inside_custom_vjp", "inside_custom_jvp"):
        apply, params, inputs = programs.made(name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lowrank"):
            attach(apply, params, *inputs, rules=RULES)
        assert any("'w'" in r.getMessage() for r in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lowrank"):
        attach(lambda p, x: jax.nn.relu(x @ p["w"]), {"w": W}, X, rules=RULES)
    assert not caplog.records


def test_attach_checks_one_use_of_each_kind_and_apply_computes_all():
    met = []

    class Picky(LoRA):
        def __call__(self, call):
            met.append(call.transposed)
            if call.transposed:
                raise BadInput("not along its outputs")
            return super().__call__(call)

    weights = {name: jnp.eye(6) * size for size, name in enumerate("abcd", 2)}
    rules = [Rule("*", Picky(), rank=2)]
    like = lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"]
    adapted = attach(like, weights, X, rules=rules)
    assert len(met) == 1, "four products of one shape are one kind"
    frozen, trained, dials = loud(adapted)
    adapted.apply(frozen, trained, X, dials=dials)
    assert len(met) == 5
    # Of the same shape all over, but a weight is summed along its other axis.
    tied = lambda p, x: lax.dot_general(like(p, x), p["d"], (((1,), (1,)), ((), ())))
    with pytest.raises(BadInput, match="not along its outputs"):
        attach(tied, weights, X, rules=rules)
    # Another input, another kind: a delta may look at it.
    met.clear()
    attach(lambda p, x: like(p, x) + like(p, x[:1]), weights, X, rules=rules)
    assert len(met) == 2


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda y: y.astype(jnp.bfloat16), r"bfloat16\[5, 4\]"),
        (lambda y: y[:, :1], r"float32\[5, 1\]"),
    ],
)
def test_an_answer_of_another_kind_is_refused_before_anything_follows(spoil, found):
    class Spoiled(LoRA):
        def __call__(self, call):
            return spoil(super().__call__(call))

    # Both would go on: broadcast, or widened by the sum.
    model = lambda p, x: x @ p["w"] + jnp.ones((5, 4))
    params, x = {"w": jnp.ones((6, 4))}, jnp.ones((5, 6))
    with pytest.raises(BadInput, match=rf"Spoiled gives {found}.*'w'.*\[5, 4\]"):
        attach(model, params, x, rules=[Rule("w", Spoiled(), rank=2)])


def test_a_start_depends_on_nothing_but_its_name():
    """Not on max_rank, not on what else is adapted, not on other layers' number."""
    params = {"w": W, "v": W.T, "s": jnp.ones((3, 6, 6))}

    def apply(p, x):
        return lax.scan(lambda c, w: (c @ w, None), x, p["s"])[0] @ p["w"] @ p["v"]

    small = attach(apply, params, X, rules=[Rule("{w,s}", LoRA(), rank=2)])
    large = attach(apply, params, X, rules=[Rule("*", LoRA(), rank=2, max_rank=5)])
    key = jax.random.key(4)
    few, many = small.init_trained(key), large.init_trained(key)
    for path in ("w", "s"):
        np.testing.assert_array_equal(few[path]["a"], many[path]["a"][..., :2, :])
    layers = np.asarray(many["s"]["a"])
    assert len({layer.tobytes() for layer in layers}) == 3
    rows = layers.reshape(-1, 6)
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert np.abs(layers).max() <= 6**-0.5


def test_the_start_of_a_stack_on_another_axis_follows_its_layers():
    apply, params, inputs = programs.made("stack_on_another_axis")
    moved, first, _ = programs.made("scanned")
    key = jax.random.key(0)
    ours = attach(apply, params, *inputs, rules=RULES).init_trained(key)
    assert ours["w"]["a"].shape == (4, 2, 6)
    theirs = attach(moved, first, *inputs, rules=RULES).init_trained(key)
    np.testing.assert_array_equal(ours["w"]["a"], theirs["w"]["a"])


def test_trials_are_an_axis():
    """A pack of three equals three single runs."""
    apply, params, inputs = programs.made("scanned")
    rules = [Rule("w", LoRA(dropout=0.3), rank=2, max_rank=3)]
    adapted = attach(apply, params, *inputs, rules=rules)
    frozen = adapted.frozen()
    trials = [oracle.loud(adapted, seed) for seed in range(3)]
    for (_, dials), scale in zip(trials, (0.5, 1.0, 3.0), strict=True):
        dials["w"] |= {"scale": jnp.float32(scale), "dropout": jnp.float32(scale / 9)}
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(trained, dials, key):
        y = adapted.apply(frozen, trained, *inputs, dials=dials, key=key)
        return jnp.sum(y**2)

    step = jax.value_and_grad(loss)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trials)
    pack = jax.jit(jax.vmap(step))(*stacked, keys)
    single = jax.jit(step)
    alone = [single(*trial, key) for trial, key in zip(trials, keys, strict=True)]
    alone = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert oracle.leafwise(pack, alone) <= 1e-5


@pytest.mark.parametrize("wrong", ["W", None, 3])
def test_a_leaf_that_is_no_array_is_refused(wrong):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(LowrankError):
            attach(lambda p, x: x @ p["w"], {"w": W, "z": wrong}, X, rules=[Train("z")])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
