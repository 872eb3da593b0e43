"""Every component has the bias correction of its own age, and optax does it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.trees import flatten
from lowrank.train.aging import Aged, reborn
from lowrank.train.optim import AdamW, init, rate, transformation

LAYERS, RANK, D_IN, D_OUT, STEPS = 3, 4, 5, 7, 20
#: Two that are laid out as LoRA's, and one as none is: axes in no order, a factor that
#: all layers share, one of a whole layer, one of nothing.
ROLES = {
    "plain": {"a": ("rank", "in"), "b": ("rank", "out")},
    "stack": {"a": ("stack", "rank", "in"), "b": ("stack", "rank", "out")},
    "odd": {
        "a": ("in", "rank", "stack"),
        "b": ("stack", "out", "rank"),
        "all": ("rank", "in"),
        "m": ("out", "stack"),
        "v": ("out",),
    },
}
SIZES = {"stack": LAYERS, "rank": RANK, "in": D_IN, "out": D_OUT}
SHAPES = {
    "head": (D_OUT, 3),
    "bias": (3,),
    **{
        path: {name: tuple(SIZES[role] for role in own) for name, own in part.items()}
        for path, part in ROLES.items()
    },
}
GATES = {"plain": (RANK,), "stack": (LAYERS, RANK), "odd": (LAYERS, RANK)}
#: Matrices decay: by what their axes are for, and what has no roles by their number.
DECAYS = {
    "head": True,
    "bias": False,
    "plain": {"a": True, "b": True},
    "stack": {"a": True, "b": True},
    "odd": {"a": True, "b": True, "all": True, "m": False, "v": False},
}
SEED = st.integers(0, 2**31 - 1)


def constants(optim):
    return {name: jnp.float32(value) for name, value in optim.constants().items()}


def draw(rng):
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def aged(opt):
    (found,) = [part for part in opt if isinstance(part, Aged)]
    return found


def laid(own, gate, over_layers=np.any):
    """A mask of components, ([stack,] rank), along the axes of a factor."""
    roles = ["stack", "rank"][-gate.ndim :]
    if "rank" not in own:
        gate, roles = gate.any(axis=-1), roles[:-1]
    if "stack" in roles and "stack" not in own:
        gate, roles = over_layers(gate, axis=0), roles[1:]
    kept = [role for role in own if role in roles]
    gate = np.transpose(gate, [roles.index(role) for role in kept])
    return np.expand_dims(gate, [d for d, role in enumerate(own) if role not in roles])


def masks(gates):
    """What `Adapted.active` makes of gates."""
    return {
        path: {name: jnp.asarray(laid(own, gates[path])) for name, own in part.items()}
        for path, part in ROLES.items()
    }


def spread(own, age):
    """Ages of a factor, one per entry but for axes along which they are one."""
    lone = [d for d, role in enumerate(own) if role not in ("stack", "rank")]
    return np.expand_dims(age, lone)


def opened():
    return {path: np.ones(shape, bool) for path, shape in GATES.items()}


def nobody():
    return {path: jnp.zeros(shape, bool) for path, shape in GATES.items()}


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def close(one, two, rtol, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, two
    )


# A run in which nothing is born and nothing ends.


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_it_equals_plain_adamw_when_nothing_changes(schedule):
    """20 steps with decay, warm-up and schedule: moments to the bit, updates to 3e-7.

    The last bits of an update differ because XLA divides by one number for all entries
    as a product with its inverse, and by one per component as it is written.
    """
    optim = AdamW(lr=0.03, weight_decay=0.2, schedule=schedule, warmup=0.25, clip=None)
    c = constants(optim)
    theirs = optax.adamw(
        rate(optim, c["lr"], STEPS), c["b1"], c["b2"], c["eps"],
        weight_decay=c["weight_decay"],
        mask=DECAYS,
    )  # fmt: skip
    ours = transformation(optim, c, STEPS, None, ROLES, ages=True)
    rng = np.random.default_rng(0)
    params = draw(rng)
    state, expected = init(optim, params, ROLES, ages=True), theirs.init(params)
    update, oracle = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(STEPS):
        grads = draw(rng)
        moved, state = update(grads, state, params)
        wanted, expected = oracle(grads, expected, params)
        close(moved, wanted, rtol=3e-7, atol=0.03 * 3e-7)
        params = optax.apply_updates(params, moved)
    same(aged(state).mu, expected[0].mu)
    same(aged(state).nu, expected[0].nu)
    ages = jnp.concatenate([x.ravel() for x in jax.tree.leaves(aged(state).age)])
    np.testing.assert_array_equal(ages, STEPS)


def test_ages_are_counted_along_stack_and_rank():
    state = aged(init(AdamW(), draw(np.random.default_rng(0)), ROLES, ages=True))
    shapes = jax.tree.map(jnp.shape, state.age, is_leaf=lambda x: hasattr(x, "shape"))
    assert shapes == {
        "head": (),
        "bias": (),
        "plain": {"a": (RANK,), "b": (RANK,)},
        "stack": {"a": (LAYERS, RANK), "b": (LAYERS, RANK)},
        "odd": {
            "a": (RANK, LAYERS), "b": (LAYERS, RANK), "all": (RANK,), "m": (LAYERS,),
            "v": (),
        },
    }  # fmt: skip
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(state.age))


def test_a_run_of_fixed_ranks_compiles_and_holds_what_it_did():
    """Knowing the roles costs nothing: the same jaxpr, the same leaves."""
    optim, params = AdamW(weight_decay=0.1), draw(np.random.default_rng(0))
    # A vector of every layer looks like a matrix to who knows no roles.
    params = {**params, "odd": {n: x for n, x in params["odd"].items() if n != "m"}}
    plain = transformation(optim, constants(optim), STEPS)
    told = transformation(optim, constants(optim), STEPS, None, ROLES)
    text = lambda tx: str(
        jax.make_jaxpr(tx.update)(params, init(optim, params), params)
    )
    assert text(plain) == text(told)
    assert [*flatten(init(optim, params))[0]] == [
        *flatten(init(optim, params, ROLES))[0]
    ]
    assert sum("count" in name for name in flatten(init(optim, params))[0]) == 2


# Components that close, open, and are born.


def reference(optim, params, events):
    """AdamW in NumPy and float64, every entry with a count, moments and gate."""
    c = optim.constants()
    params = jax.tree.map(lambda x: np.array(x, np.float64), params)
    age, mu, nu = (jax.tree.map(np.zeros_like, params) for _ in range(3))

    def one(own, decays, on, new, lr, x, g, t, m, v):
        on, new = np.broadcast_to(on, x.shape), np.broadcast_to(new, x.shape)
        for slot in (t, m, v):
            slot[new] = 0
        g = np.asarray(g, np.float64)
        m[on] = (c["b1"] * m + (1 - c["b1"]) * g)[on]
        v[on] = (c["b2"] * v + (1 - c["b2"]) * g * g)[on]
        t[on] += 1
        # Float32, as the run has them: 1 - 0.999 is not 0.001 there.
        b1, b2 = np.float64(np.float32(c["b1"])), np.float64(np.float32(c["b2"]))
        root = np.sqrt(v[on] / (1 - b2 ** t[on])) + c["eps"]
        move = m[on] / (1 - b1 ** t[on]) / root
        move += (c["weight_decay"] if decays else 0) * x[on]
        x[on] -= lr * (c["b_ratio"] if {"rank", "out"} <= {*own} else 1) * move

    for step, (grads, gates, born) in enumerate(events):
        lr = float(rate(optim, jnp.float32(c["lr"]), STEPS)(jnp.int32(step)))
        trees = (params, grads, age, mu, nu)
        for path in ("head", "bias"):
            one((), DECAYS[path], True, False, lr, *(tree[path] for tree in trees))
        for path, part in ROLES.items():
            for name, own in part.items():
                new = (
                    laid(own, born[path], np.all) if "rank" in own else np.array(False)
                )
                on = laid(own, gates[path])
                own_trees = (tree[path][name] for tree in trees)
                one(own, DECAYS[path][name], on, new, lr, *own_trees)
    return params, age, mu, nu


OPTIM = AdamW(lr=0.02, weight_decay=0.3, clip=None, warmup=0.1, b_ratio=3.0)


@jax.jit
def event(params, opt, grads, gates, born):
    opt = reborn(opt, born, ROLES)
    tx = transformation(OPTIM, constants(OPTIM), STEPS, gates, ROLES, ages=True)
    moved, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, moved), opt


@settings(max_examples=15, deadline=None)
@given(SEED)
def test_any_course_of_gates_and_births_is_that_of_each_component_by_itself(seed):
    rng = np.random.default_rng(seed)
    params, events = draw(rng), []
    for _ in range(8):
        gates = {path: rng.random(shape) < 0.7 for path, shape in GATES.items()}
        born = {p: gate & (rng.random(gate.shape) < 0.3) for p, gate in gates.items()}
        events.append((draw(rng), gates, born))
    wanted, ages, *moments = reference(OPTIM, params, events)
    opt = init(OPTIM, params, ROLES, ages=True)
    for grads, gates, born in events:
        new = jax.tree.map(jnp.asarray, born)
        params, opt = event(params, opt, grads, masks(gates), new)
    state = aged(opt)
    close(params, wanted, rtol=1e-4, atol=2e-6)
    close([state.mu, state.nu], moments, rtol=1e-4, atol=1e-6)
    for path, part in ROLES.items():
        for name, own in part.items():
            found = np.broadcast_to(
                spread(own, state.age[path][name]), SHAPES[path][name]
            )
            np.testing.assert_array_equal(found, ages[path][name])


def test_what_is_closed_keeps_its_bits_under_decay():
    """Factors, both moments and ages, over several steps; the open ones all move."""
    rng = np.random.default_rng(1)
    params = draw(rng)
    opt = init(OPTIM, params, ROLES, ages=True)
    params, opt = event(params, opt, draw(rng), masks(opened()), nobody())
    before = (params, *aged(opt))
    gates = {path: rng.random(shape) < 0.5 for path, shape in GATES.items()}
    for _ in range(6):
        params, opt = event(params, opt, draw(rng), masks(gates), nobody())
    after = (params, *aged(opt))
    for path, part in ROLES.items():
        for name, own in part.items():
            for old, new in zip(before, after, strict=True):
                old, new = old[path][name], new[path][name]
                if old.ndim < len(own):
                    old, new = spread(own, old), spread(own, new)
                    assert {*np.unique(new)} <= {1, 7}
                on = np.broadcast_to(laid(own, gates[path]), old.shape)
                np.testing.assert_array_equal(old != new, on)


def born_alone(opt, updates, ages=True):
    """Updates of one component under a constant gradient, in units of the rate."""
    optim = AdamW(lr=1e-2, schedule="constant", warmup=0.0, clip=None)
    roles = {"site": {"a": ("rank", "in"), "b": ("rank", "out")}}
    params = {"site": {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 5))}}
    grads = jax.tree.map(lambda x: 0.37 * x, params)
    tx = transformation(optim, constants(optim), STEPS, None, roles, ages)
    update, found = jax.jit(tx.update), []
    state = opt(init(optim, params, roles, ages), roles)
    for _ in range(updates):
        moved, state = update(grads, state, params)
        found.append(np.abs(moved["site"]["b"][1]) / 1e-2)
    return np.array(found)


def old(state, age):
    """The state after so many updates with the same gradient."""
    full = lambda tree, value: jax.tree.map(lambda x: jnp.full_like(x, value), tree)
    mu, nu = 0.37 * (1 - 0.9**age), 0.37**2 * (1 - 0.999**age)
    (place,) = [n for n, part in enumerate(state) if hasattr(part, "mu")]
    part = state[place]
    counts = {type(part)._fields[0]: full(part[0], age)}
    part = part._replace(mu=full(part.mu, mu), nu=full(part.nu, nu), **counts)
    return (*state[:place], part, *state[place + 1 :])


def test_the_first_update_after_a_birth_is_the_learning_rate():
    born = {"site": jnp.array([False, True])}
    found = born_alone(lambda s, roles: reborn(old(s, 10000), born, roles), 40)
    np.testing.assert_allclose(found, 1, rtol=1e-4)


def test_with_one_count_for_all_it_would_be_three_times_that_and_then_six():
    """What ages are for: (1 - b1) / sqrt(1 - b2) = 3.16, and 6.57 at the twelfth."""

    def cleared(state, roles):
        aged = old(state, 10000)
        zero = lambda x: x.at[1].set(0.0) if x.ndim else x
        return jax.tree.map(zero, aged)

    found = born_alone(cleared, 40, ages=False)
    np.testing.assert_allclose(found[0], 0.1 / np.sqrt(0.001), rtol=1e-3)
    assert found[:, 0].argmax() == 11
    np.testing.assert_allclose(found[11], 6.57, atol=0.01)


def test_a_birth_touches_nothing_else():
    rng = np.random.default_rng(2)
    params = draw(rng)
    opt = init(OPTIM, params, ROLES, ages=True)
    for _ in range(3):
        params, opt = event(params, opt, draw(rng), masks(opened()), nobody())
    same(reborn(opt, {}, ROLES), opt)
    same(reborn(opt, nobody(), ROLES), opt)
    born = {"stack": jnp.zeros((LAYERS, RANK), bool).at[1, 2].set(True)}
    found = reborn(opt, born, ROLES)
    assert jax.tree.structure(found) == jax.tree.structure(opt)
    for name in ("a", "b"):
        for was, is_ in zip(aged(opt), aged(found), strict=True):
            was, is_ = np.array(was["stack"][name]), np.array(is_["stack"][name])
            assert not is_[1, 2].any()
            was[1, 2] = 0
            np.testing.assert_array_equal(was, is_)
    for path in ("plain", "odd", "head", "bias"):
        same([f[path] for f in aged(opt)], [f[path] for f in aged(found)])
    same(opt[-1], found[-1])


# Packs.


def test_trials_in_a_vmap_equal_trials_alone():
    """Rates, moments' decays, ratios, gates and births of their own."""
    optims = [OPTIM, AdamW(lr=0.1, b1=0.8, clip=None), AdamW(b2=0.9, clip=None)]
    tables = [{"b_ratio": 1.0, **one.constants()} for one in optims]
    rng = np.random.default_rng(3)
    stacked = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    each = [draw(rng) for _ in optims]
    numbers = [{n: jnp.float32(v) for n, v in table.items()} for table in tables]

    def steps(params, numbers, grads, gates, born):
        opt = init(OPTIM, params, ROLES, ages=True)
        for grad, gate, new in zip(grads, gates, born, strict=True):
            opt = reborn(opt, new, ROLES)
            tx = transformation(OPTIM, numbers, STEPS, gate, ROLES, ages=True)
            moved, opt = tx.update(grad, opt, params)
            params = optax.apply_updates(params, moved)
        return params, opt

    random = lambda part: {p: rng.random(shape) < part for p, shape in GATES.items()}
    given = [
        (
            [draw(rng) for _ in range(3)],
            [masks(random(0.6)) for _ in range(3)],
            [jax.tree.map(jnp.asarray, random(0.3)) for _ in range(3)],
        )
        for _ in optims
    ]
    apart = [
        jax.jit(steps)(one, own, *more)
        for one, own, more in zip(each, numbers, given, strict=True)
    ]
    packed = jax.jit(jax.vmap(steps))
    together = packed(stacked(each), stacked(numbers), *stacked(given))
    # Some rounding more than 1e-6: jax 0.12 without LLVM's optimizer fuses otherwise.
    close(together, stacked(apart), rtol=1e-5, atol=1e-6)
    same(aged(together[1]).age, stacked([aged(opt).age for _, opt in apart]))


# What is refused.


def test_a_factor_of_unknown_axes_has_no_ages():
    params = draw(np.random.default_rng(0))
    few = {path: own for path, own in ROLES.items() if path != "odd"}
    with pytest.raises(BadInput, match=r"odd/a .*roles=adapted\.roles\(\)"):
        init(AdamW(), params, few, ages=True)
    with pytest.raises(BadInput, match=r"roles=adapted\.roles\(\)"):
        init(AdamW(), params, ages=True)


def test_births_that_cannot_be_are_refused():
    params = draw(np.random.default_rng(0))
    opt = init(AdamW(), params, ROLES, ages=True)
    new = jnp.ones((LAYERS, RANK), bool)
    with pytest.raises(BadInput, match="ages=True"):
        reborn(init(AdamW(), params), {"stack": new}, ROLES)
    with pytest.raises(UnknownName, match=r"born\['stak'\].*'stack'"):
        reborn(opt, {"stak": new}, ROLES)
    with pytest.raises(BadInput, match=r"\(3, 5\) for stack/a.*\(3, 4\)"):
        reborn(opt, {"stack": jnp.ones((LAYERS, RANK + 1), bool)}, ROLES)
