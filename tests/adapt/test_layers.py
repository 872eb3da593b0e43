"""Layers of a stack by name: which rule takes which, and what that computes."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Freeze, Rule, Train
from lowrank.adapt.sites import discover
from lowrank.core.errors import BadInput, UnknownName
from lowrank.deltas.lora import LoRA

LAYERS, D, HIDDEN = 4, 6, 8
X = jnp.linspace(-1, 1, 3 * D).reshape(3, D)
UP, DOWN = "tower/block/up/kernel", "tower/block/down/kernel"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.4, shape), jnp.float32)


#: The stack is `tower`; below it every array has LAYERS entries on its first axis.
PARAMS = {
    "embed": {"kernel": draw(0, D, D)},
    "tower": {
        "block": {
            "up": {"kernel": draw(1, LAYERS, D, HIDDEN)},
            "down": {"kernel": draw(2, LAYERS, HIDDEN, D)},
        },
        "gain": draw(3, LAYERS, D),
    },
}


def layer(x, weights):
    hidden = jnp.tanh(x @ weights["block"]["up"]["kernel"])
    y = x + hidden @ weights["block"]["down"]["kernel"]
    return y * (1 + weights["gain"])[None], None


def apply(p, x):
    return lax.scan(layer, x @ p["embed"]["kernel"], p["tower"])[0]


def unrolled(p, x):
    x = x @ p["embed"]["kernel"]
    for number in range(LAYERS):
        x, _ = layer(x, p[f"tower_{number}"])
    return x


def attached(*rules, **options):
    return attach(apply, PARAMS, X, rules=rules, **options)


def lora(pattern, rank=2, **options):
    delta = options.pop("delta", LoRA(alpha=6.0))
    return Rule(pattern, delta, rank=rank, **options)


def gates(adapted, path=UP):
    return np.asarray(adapted.dials()[path]["gate"]).sum(axis=-1).astype(int).tolist()


@pytest.fixture
def unhooked():
    """As users run it: the type hook of the tests would speak before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_name_of_a_layer_follows_the_segment_that_holds_the_stack():
    sites = discover(apply, PARAMS, X)
    assert sites[UP].layer_paths == tuple(
        f"tower[{n}]/block/up/kernel" for n in range(LAYERS)
    )
    assert sites["embed/kernel"].layer_paths == ("embed/kernel",)
    bare = {"w": PARAMS["tower"]["block"]["up"]["kernel"][:, :, :D]}
    run = lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]
    assert discover(run, bare, X)["w"].layer_paths[2] == "w[2]"


def test_a_stack_of_two_axes_has_two_numbers():
    inner = lambda x, ws: (lax.scan(lambda c, w: (c @ w, None), x, ws)[0], None)
    run = lambda p, x: lax.scan(inner, x, p["a"]["w"])[0]
    params = {"a": {"w": draw(0, 2, 3, D, D)}}
    adapted = attach(run, params, X, rules=[lora("a/w")])
    assert adapted.ranks["a[1,2]/w"] == 2
    assert len(adapted.ranks) == 6
    with pytest.raises(BadInput, match=r"2 axes, 2 x 3.*leave the bracket out"):
        attach(run, params, X, rules=[lora("a[1]/w")])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([lora("tower[3]/block/up/kernel")], [0, 0, 0, 2]),
        ([lora("tower[-1]/**/up/*")], [0, 0, 0, 2]),
        ([lora("**/up[:2]/kernel")], [2, 2, 0, 0]),
        ([lora("**/up/kernel[::2]", 3)], [3, 0, 3, 0]),
        ([lora("**/*[2:]/up/kernel")], [0, 0, 2, 2]),
        ([lora("**/up[1]/kernel", 5), lora("**/up/kernel")], [2, 5, 2, 2]),
        ([lora("**/up[0:3]/*", 1), lora("**/up[2:4]/*", 4)], [1, 1, 1, 4]),
        ([Freeze("tower[0:2]/**"), lora("**/{up,down}/*", 3)], [0, 0, 3, 3]),
        ([lora("**/up[1]/*", 1), Freeze("**/up/*"), lora("**/down/*")], [0, 1, 0, 0]),
        ([lora("**/up/*")], [2, 2, 2, 2]),
        ([lora("tower[:2]/**", 5, among=("**/up/kernel",))], [5, 5, 0, 0]),
        (
            [
                lora("tower[:]/**", 5, among=("**/up/*",)),
                lora("**/up/*", optional=True),
            ],
            [5, 5, 5, 5],
        ),
    ],
)
def test_the_first_match_wins_layer_by_layer(rules, expected):
    adapted = attached(*rules)
    assert gates(adapted) == expected
    names = discover(apply, PARAMS, X)[UP].layer_paths
    found = adapted.ranks
    assert [found[name] for name in names] == expected
    assert adapted.max_rank(UP) == max(expected)
    assert adapted.trained_shapes()[UP]["a"].shape == (LAYERS, max(expected), D)


def test_every_layer_has_the_rule_that_took_it():
    narrow, wide = lora("**/up[1]/*", 4), lora("**/{up,down}/*")
    rules = attached(narrow, wide).rules
    assert rules["tower[1]/block/up/kernel"] is narrow
    assert rules["tower[0]/block/up/kernel"] is wide
    assert rules[DOWN] is wide
    assert len(rules) == LAYERS + 1


def test_the_scale_is_one_for_all_ranks():
    adapted = attached(lora("**/up[0]/*", 1), lora("**/up/*", 4))
    assert adapted.ref_rank == 4
    assert float(adapted.dials()[UP]["scale"]) == 1.5


def test_a_weight_with_every_layer_frozen_is_no_site():
    adapted = attached(Freeze("**/up[:]/kernel"), lora("**/{up,down}/kernel"))
    assert set(adapted.sites) == {DOWN}
    assert set(adapted.trained_shapes()) == {DOWN}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([lora("tower[4]/**/up/*")], r"\[4\] goes beyond a stack of 4.*0 to 3"),
        ([lora("tower[-5]/**/up/*")], r"\[-5\] goes beyond a stack of 4"),
        ([lora("tower[2:9]/**/up/*")], r"\[2:9\] goes beyond a stack of 4"),
        ([lora("tower[2:2]/**/up/*")], r"\[2:2\] takes none of 4.*not part"),
        ([lora("embed[0]/kernel")], "'embed/kernel': this weight is no stack"),
        ([Freeze("*[0]/**"), lora("embed/*")], "'embed/kernel': this weight is no st"),
        ([Train("tower[0]/gain")], "Train.*'tower/gain'.*trained whole"),
        ([Freeze("tower[0]/**"), Train("tower/**")], "Freeze.*layers of.*whole"),
        ([lora("tower[0]/**/up/*"), Train("**/up/*")], "Rule.*trained whole.*unroll"),
        (
            [lora("**/up[0]/*", delta=LoRA(alpha=2)), lora("**/up/*", delta=LoRA())],
            r"alpha=2.*alpha=16.*rank only.*scan=false",
        ),
        (
            [lora("**/up[0]/*", delta=LoRA(dropout=0.1)), lora("**/up/*")],
            r"dropout=0\.1.*dropout=0\.0.*one loop",
        ),
        ([lora("**/up[:2]/*"), lora("**/up[1]/*", 3)], "shadowed.*all that it selects"),
        ([lora("**/up[:]/*"), lora("**/up/*", 3)], "shadowed"),
        ([lora("**/up/*"), lora("**/up[1]/*", 3)], "shadowed"),
        ([lora("**/up[1]/*"), lora("**/up[1]/*")], "shadowed"),
        ([Freeze("tower[1]/gain"), lora("**/up/*")], "no later rule.*frozen already"),
        ([lora("**/up/*"), Freeze("**/up[1]/*")], "shadowed"),
        ([Freeze("**/up[:]/*"), lora("**/up/*")], "shadowed"),
        ([Freeze("**/up[:]/*"), lora("**/up/*", optional=True)], "nothing is corr"),
        ([lora("**/up[0]/*", 7), lora("**/up/*")], "rank 7 for"),
        ([lora("tower[0]/**")], r"'tower/gain'"),
    ],
)
def test_a_wrong_layer_says_what_is_wrong(rules, words):
    with pytest.raises(BadInput, match=words):
        attached(*rules)


def test_no_weight_in_common_is_an_unknown_name():
    with pytest.raises(UnknownName, match="covers 'embed/kernel' and 0 more, but none"):
        attached(lora("embed/*", among=("**/up/*", "**/down/*")))


def test_layers_of_an_unrolled_model_are_paths_like_others():
    tree = {"embed": PARAMS["embed"]} | {
        f"tower_{n}": jax.tree.map(lambda x, n=n: x[n], PARAMS["tower"])
        for n in range(LAYERS)
    }
    with pytest.raises(UnknownName, match="matches none"):
        attach(unrolled, tree, X, rules=[lora("tower[0]/**/kernel")])
    with pytest.raises(BadInput, match=r"no stack.*named by their paths"):
        attach(unrolled, tree, X, rules=[lora("tower_0[0]/**/kernel")])


RULES = (
    Freeze("tower[1]/**"),
    lora("**/up[0]/*", 1),
    lora("**/up[3]/*", 4),
    lora("**/down[2:]/*", 3),
    lora("**/up/*"),
)
#: Site -> rank by layer, as `RULES` say.
RANKS = {UP: [1, 0, 2, 4], DOWN: [0, 0, 3, 3]}


def apart(trained, dials):
    """The same factors for the unrolled model, closed components cut away."""
    found, gates = {}, {}
    for path, ranks in RANKS.items():
        for n, rank in enumerate(ranks):
            if rank:
                own = path.replace("tower", f"tower_{n}")
                found[own] = {k: v[n, :rank] for k, v in trained[path].items()}
                gates[own] = {**dials[path], "gate": dials[path]["gate"][n, :rank]}
    return found, gates


def test_ranks_by_layer_compute_what_the_unrolled_model_computes():
    """Outputs and gradients, against single layers that hold only what is open."""
    adapted = attached(*RULES)
    assert {path: gates(adapted, path) for path in RANKS} == RANKS
    tree = {"embed": PARAMS["embed"]} | {
        f"tower_{n}": jax.tree.map(lambda x, n=n: x[n], PARAMS["tower"])
        for n in range(LAYERS)
    }
    rules = [
        lora(path.replace("tower", f"tower_{n}"), rank)
        for path, ranks in RANKS.items()
        for n, rank in enumerate(ranks)
        if rank
    ]
    single = attach(unrolled, tree, X, rules=rules)
    trained = oracle.filled(adapted.trained_shapes(), 5)
    dials = adapted.dials()
    alone, alone_dials = apart(trained, dials)
    assert jax.tree.map(jnp.shape, single.dials()) == jax.tree.map(
        jnp.shape, alone_dials
    )

    def loss(model, dials):
        frozen = model.frozen()

        def run(trained):
            y = model.apply(frozen, trained, X, dials=dials)
            return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), y

        return run

    graded = lambda model, t, d: jax.jit(jax.grad(loss(model, d), has_aux=True))(t)
    ours, y = graded(adapted, trained, dials)
    theirs, z = graded(single, alone, alone_dials)
    assert oracle.leafwise(y, z) <= 1e-5
    assert oracle.leafwise(apart(ours, dials)[0], theirs) <= 1e-5
    for path, ranks in RANKS.items():
        for leaf in ours[path].values():
            for n, rank in enumerate(ranks):
                assert not jnp.any(leaf[n, rank:])
                assert rank == 0 or jnp.all(jnp.any(leaf[n, :rank] != 0, axis=-1))


def test_frozen_layers_stay_the_base_in_the_merged_weights():
    adapted = attached(*RULES)
    trained = oracle.filled(adapted.trained_shapes(), 6)
    merged = adapted.merge(adapted.frozen(), trained)["tower"]["block"]
    for name, path in (("up", UP), ("down", DOWN)):
        before = PARAMS["tower"]["block"][name]["kernel"]
        for n, rank in enumerate(RANKS[path]):
            same = jnp.array_equal(merged[name]["kernel"][n], before[n])
            assert bool(same) is (rank == 0)
    assert adapted.verify(jax.random.key(0), X).output_error <= 1e-5


def test_the_start_of_a_layer_does_not_depend_on_its_neighbours_ranks():
    key = jax.random.key(3)
    even = attached(lora("**/up/*", 4)).init_trained(key)
    uneven = attached(*RULES).init_trained(key)
    np.testing.assert_array_equal(even[UP]["a"], uneven[UP]["a"])


def test_roles_tell_what_every_axis_of_a_factor_is_for():
    adapted = attached(*RULES)
    shapes = adapted.trained_shapes()
    for path, one in adapted.roles().items():
        assert one == {"a": ("stack", "rank", "in"), "b": ("stack", "rank", "out")}
        assert {name: len(own) for name, own in one.items()} == {
            name: len(factor.shape) for name, factor in shapes[path].items()
        }
    run = lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"])
    wide = attach(run, {"w": draw(0, D, 2, 3)}, X, rules=[lora("w", 1)])
    assert wide.roles()["w"]["b"] == ("rank", "out", "out")


def test_masks_and_padding_tell_what_is_open():
    adapted = attached(*RULES)
    masks = adapted.active(adapted.dials())
    for path, ranks in RANKS.items():
        most = max(ranks)
        expected = np.arange(most)[None] < np.array(ranks)[:, None]
        for mask in masks[path].values():
            np.testing.assert_array_equal(mask[..., 0], expected)
        closed = LAYERS * most - sum(ranks)
        widths = (D, HIDDEN) if path == UP else (HIDDEN, D)
        assert adapted.padding()[path] == {
            "a": closed * widths[0],
            "b": closed * widths[1],
        }
    assert sum(adapted.ranks.values()) == sum(map(sum, RANKS.values()))


def test_dropout_draws_the_same_whatever_the_ranks():
    def run(*rules):
        adapted = attached(*rules)
        trained = {UP: {k: v + 0.2 for k, v in first[UP].items()}}
        return adapted.apply(adapted.frozen(), trained, X, key=jax.random.key(1))

    delta = LoRA(dropout=0.5)
    first = attached(lora("**/up/*", 3, delta=delta)).init_trained(jax.random.key(0))
    all_open = run(lora("**/up/*", 3, delta=delta))
    split = run(
        lora("**/up[:2]/*", 3, delta=delta), lora("**/up[2:]/*", 3, delta=delta)
    )
    assert jnp.array_equal(all_open, split)
    fewer = run(
        lora("**/up[:2]/*", 3, delta=delta), lora("**/up[2:]/*", 1, delta=delta)
    )
    assert not jnp.allclose(all_open, fewer)
