"""What every delta of the catalogue promises, whatever its options and its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.base import Call, Delta, Site, View
from lowrank.deltas.catalogue import CATALOGUE

#: Every option of every delta; a new delta adds its line here.
OPTIONS = {
    "lora": [
        {},
        {"scaling": "rsqrt", "alpha": 3.0},
        {"dropout": 0.4},
        {"rank_dropout": 0.4},
    ],
    "triplet": [{"alpha": 3.0, "dropout": 0.4}],
}
DELTAS = [(name, options) for name in CATALOGUE for options in OPTIONS[name]]
IDS = [f"{name}-{options}" for name, options in DELTAS]
D_IN, D_OUT, LAYERS, RANK, MAX_RANK = 6, 5, 3, 2, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, D_IN)), jnp.float32)
TOKENS = jnp.array([[0, 3, 1], [5, 5, 2]])


def product(p, x):
    return x @ p["w"]


def transposed(p, x):
    return x @ p["w"].T


def lookup(p, ids):
    return p["w"][ids]


def stacked(p, x):
    return lax.scan(lambda c, w: (c, jnp.sin(x @ w)), 0.0, p["w"])[1]


PLACES = {
    "product": (product, (D_IN, D_OUT), X),
    "transposed": (transposed, (D_OUT, D_IN), X),
    "lookup": (lookup, (D_IN, D_OUT), TOKENS),
    "stacked": (stacked, (LAYERS, D_IN, D_OUT), X),
}


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly():
    """Everything here runs once or twice: optimizing it costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


each_delta = pytest.mark.parametrize(("name", "options"), DELTAS, ids=IDS)
each_place = pytest.mark.parametrize("place", PLACES)


class Case:
    """One delta in one place, with factors that are not silent."""

    def __init__(self, name, options, place, dtype, max_rank):
        self.apply, shape, self.x = PLACES[place]
        rng = np.random.default_rng(1)
        self.params = {"w": jnp.asarray(rng.normal(0, 0.5, shape), dtype)}
        if jnp.issubdtype(self.x.dtype, jnp.floating):
            self.x = self.x.astype(dtype)
        self.delta = CATALOGUE[name](**options)
        rule = Rule("w", self.delta, rank=RANK, max_rank=max_rank)
        self.adapted = attach(self.apply, self.params, self.x, rules=[rule])
        self.frozen = self.adapted.frozen()
        self.start = jax.jit(self.adapted.init_trained)(jax.random.key(0))
        self.trained = jax.tree.map(
            lambda v: v + jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype), self.start
        )
        self.dials = self.adapted.dials()
        gate = self.dials["w"]["gate"]
        self.gate = jnp.asarray(rng.uniform(0.2, 1, gate.shape), jnp.float32)

    def dialled(self, gate):
        return {"w": {**self.dials["w"], "gate": gate}}

    def loss(self, trained, gate):
        dials = self.dialled(gate)
        y = self.adapted.apply(self.frozen, trained, self.x, dials=dials)
        return self.weighed(y)

    @staticmethod
    def weighed(y):
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@functools.cache
def _cached(name, options, place, dtype, max_rank):
    return Case(name, dict(options), place, dtype, max_rank)


def case_of(name, options, place="product", dtype=jnp.float32, max_rank=MAX_RANK):
    return _cached(name, tuple(options.items()), place, dtype, max_rank)


def close(ours, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)


def test_every_entry_of_the_catalogue_is_tested():
    assert set(OPTIONS) == set(CATALOGUE)
    assert all(issubclass(delta, Delta) for delta in CATALOGUE.values())


@each_delta
@each_place
def test_silent_at_initialization(name, options, place):
    case = case_of(name, options, place)
    y = case.adapted.apply(case.frozen, case.start, case.x)
    close(y, case.apply(case.params, case.x), 1e-6)
    for leaf in jax.tree.leaves(case.start):
        assert jnp.isfinite(leaf).all()


@each_delta
@each_place
def test_a_use_equals_the_product_with_the_dense_weight(name, options, place):
    case = case_of(name, options, place)

    def dense(trained, gate):
        tree = case.adapted._merged(case.frozen, trained, case.dialled(gate))
        return case.weighed(case.apply(tree, case.x))

    given = (case.trained, case.gate)
    graded = lambda loss: jax.value_and_grad(loss, argnums=(0, 1))(*given)
    ours, expected = jax.jit(lambda: (graded(case.loss), graded(dense)))()
    close(ours, expected, 2e-5)
    silent = case.loss(case.start, case.gate)
    assert abs(float(ours[0] - silent)) > 1e-3


@each_delta
@each_place
def test_gate_gradients_equal_finite_differences(name, options, place):
    case = case_of(name, options, place)
    gradient = jax.grad(case.loss, argnums=1)(case.trained, case.gate)
    flat, loss = case.gate.reshape(-1), jax.jit(case.loss)
    for i in range(0, flat.size, 3):
        step = jnp.zeros_like(flat).at[i].set(0.01)
        ahead, back = ((flat + s * step).reshape(case.gate.shape) for s in (1, -1))
        slope = (loss(case.trained, ahead) - loss(case.trained, back)) / 0.02
        scale = float(jnp.abs(gradient).max())
        assert float(gradient.reshape(-1)[i]) == pytest.approx(
            float(slope), abs=5e-3 * scale
        )


@each_delta
@each_place
def test_a_shut_component_is_silent(name, options, place):
    case = case_of(name, options, place)
    shut = case.gate.at[..., 1].set(0.0)
    gradient = jax.grad(case.loss)(case.trained, shut)
    for role, leaf in gradient["w"].items():
        if "rank" not in case.delta.axes[role]:
            continue
        at = int("stack" in case.delta.axes[role] and place == "stacked")
        by_component = jnp.moveaxis(leaf, at, 0)
        assert not jnp.any(by_component[1])
        assert jnp.any(by_component[0])
    before = case.loss(case.trained, shut)
    noisy = {
        role: v.at[(slice(None),) * (place == "stacked") + (1,)].add(7.0)
        if "rank" in case.delta.axes[role]
        else v
        for role, v in case.trained["w"].items()
    }
    assert case.loss({"w": noisy}, shut) == before


@each_delta
@each_place
def test_shut_gates_leave_the_base_as_it_is(name, options, place):
    """However loud the factors are: the same program gives the same bits as with silent
    ones, and merged weights are the base's."""
    case = case_of(name, options, place)
    dials = case.dialled(jnp.zeros_like(case.gate))
    loud = jax.tree.map(lambda x: 1e3 * x, case.trained)
    y = case.adapted.apply(case.frozen, loud, case.x, dials=dials)
    silent = case.adapted.apply(case.frozen, case.start, case.x, dials=dials)
    np.testing.assert_array_equal(y, silent)
    close(y, case.apply(case.params, case.x), 1e-6)
    merged = case.adapted.merge(case.frozen, loud, dials)
    np.testing.assert_array_equal(merged["w"], case.params["w"])


@each_delta
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@each_place
def test_the_base_dtype_comes_out(name, options, place, dtype):
    case = case_of(name, options, place, dtype)
    y = case.adapted.apply(case.frozen, case.trained, case.x)
    assert y.dtype == case.apply(case.params, case.x).dtype == dtype
    assert case.adapted.merge(case.frozen, case.trained)["w"].dtype == dtype
    gradient = jax.grad(case.loss)(case.trained, case.gate)
    dtypes = lambda tree: jax.tree.map(lambda v: v.dtype, tree)
    assert dtypes(gradient) == dtypes(case.trained)


@each_delta
@each_place
def test_a_start_does_not_depend_on_max_rank(name, options, place):
    few = case_of(name, options, place, max_rank=2)
    many = case_of(name, options, place, max_rank=5)
    for role, small in few.start["w"].items():
        large = many.start["w"][role]
        if "rank" in few.delta.axes[role]:
            at = int("stack" in few.delta.axes[role] and place == "stacked")
            large = jnp.take(large, jnp.arange(2), axis=at)
        np.testing.assert_array_equal(small, large)


@each_delta
@each_place
def test_factors_and_dials_have_the_axes_they_declare(name, options, place):
    case = case_of(name, options, place)
    site = case.adapted.sites["w"]
    sizes = {
        "stack": site.stack_shape,
        "rank": (MAX_RANK,),
        "in": tuple(site.shape[d] for d in site.ins),
        "out": tuple(site.shape[d] for d in site.outs),
    }
    parts = {**case.start["w"], **case.dials["w"]}
    named, optional = set(case.delta.axes), case.delta.optional
    assert named - optional <= set(parts) <= named
    assert set(case.adapted.active(case.dials)["w"]) == set(case.start["w"])
    for role, part in parts.items():
        expected = sum((sizes[axis] for axis in case.delta.axes[role]), ())
        assert part.shape == expected, role


@each_delta
@each_place
def test_gates_open_up_to_the_rank(name, options, place):
    gate = case_of(name, options, place).dials["w"]["gate"]
    assert jnp.array_equal(gate[..., :RANK], jnp.ones_like(gate[..., :RANK]))
    assert not jnp.any(gate[..., RANK:])


@each_delta
def test_trials_are_an_axis_of_factors_dials_and_keys(name, options):
    case = case_of(name, options)
    trials = [jax.tree.map(lambda v, n=n: v * n, case.trained) for n in (1.0, 0.5, 2.0)]
    gates = [case.gate * n for n in (0.1, 1.0, 0.7)]
    keys = jax.random.split(jax.random.key(0), 3)

    def run(trained, gate, key):
        dials = case.dialled(gate)
        return case.adapted.apply(case.frozen, trained, case.x, dials=dials, key=key)

    stack = lambda trees: jax.tree.map(lambda *v: jnp.stack(v), *trees)
    pack = jax.vmap(run)(stack(trials), jnp.stack(gates), keys)
    alone = [run(*one) for one in zip(trials, gates, keys, strict=True)]
    close(pack, jnp.stack(alone), 2e-6)


@each_delta
def test_keys_matter_only_to_deltas_that_draw(name, options):
    case = case_of(name, options)
    run = lambda key: case.adapted.apply(case.frozen, case.trained, case.x, key=key)
    one, same, other = (run(jax.random.key(n)) for n in (0, 0, 1))
    assert jnp.array_equal(one, same)
    assert bool(jnp.array_equal(one, other)) is not case.delta.draws
    if not case.delta.draws:
        assert jnp.array_equal(one, run(None))


@each_delta
def test_views_and_calls_speak_the_protocols(name, options):
    case = case_of(name, options)
    seen = []

    class Spy(type(case.delta)):
        def __call__(self, call):
            seen.append(call)
            return super().__call__(call)

        def weight(self, view):
            seen.append(view)
            return super().weight(view)

    rules = [Rule("w", Spy(**options), rank=RANK, max_rank=MAX_RANK)]
    adapted = attach(case.apply, case.params, case.x, rules=rules)
    seen.clear()
    adapted.apply(case.frozen, case.trained, case.x)
    adapted.merge(case.frozen, case.trained)
    call, view = seen
    assert isinstance(call, Call)
    assert isinstance(call, Site)
    assert isinstance(view, View)
    assert call.fan_in == view.fan_in == D_IN
    assert call.shape("rank", "in") == (MAX_RANK, D_IN)
    assert view.shape("rank", "out") == (MAX_RANK, D_OUT)
    assert jnp.array_equal(call.product(), case.x @ case.params["w"])
    assert call.onto_x(jnp.arange(6.0)).shape == (1, D_IN)
    assert call.onto_y(jnp.arange(5.0)).shape == (1, D_OUT)
