"""A cut to the nearest correction: by singular values, of all layers together."""

import jax
import numpy as np
import pytest
from test_ranks import HELD, OPTIM, WINDOW, World

from lowrank.allocate.recipes import Squeeze
from lowrank.core.errors import BadInput
from lowrank.deltas.triplet import Triplet
from lowrank.train.aging import Aged

pytestmark = pytest.mark.long


def dense(state, path):
    """Every layer's correction, in NumPy."""
    own = {n: np.asarray(x[0], np.float64) for n, x in state.trained[path].items()}
    c = np.asarray(state.dials[path]["gate"][0] * state.dials[path]["scale"][0])
    found = np.einsum("...r,...ri,...ro->...io", c, own["a"], own["b"])
    return found.reshape(-1, *found.shape[-2:])


def ranks(state, path):
    gates = np.asarray(state.dials[path]["gate"][0]).reshape(-1, HELD) != 0
    counts = gates.sum(axis=-1)
    np.testing.assert_array_equal(gates, np.arange(HELD) < counts[:, None])
    return counts


def nearest(matrix, rank):
    u, values, v = np.linalg.svd(matrix)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


@pytest.mark.parametrize(
    "window", [{"begin": 16, "end": 16}, {"begin": 2, "end": 17}], ids=["once", "often"]
)
def test_what_is_left_is_the_nearest_correction_of_its_rank(window):
    world = World(Squeeze(**{**WINDOW, **window, "measure_every": 1, "budget": 7}))
    constants, cuts, latest = world.constants(), 0, None
    before_it = jax.jit(world.ranks.before)
    for at, before, _, _ in world.states():
        moved = before_it(before)
        if constants["due"][at]:
            cuts += 1
            budget = int(constants["budget"][at])
            kept = np.concatenate([ranks(moved, path) for path in ("stack", "up")])
            # The largest of what the last step measured, all layers together.
            assert kept.sum() == budget
            bound = np.sort(latest.reshape(-1))[::-1][budget - 1]
            np.testing.assert_array_equal((latest >= bound).sum(axis=-1), kept)
            for path in ("stack", "up"):
                whole, left = dense(before, path), dense(moved, path)
                for one, cut, rank in zip(whole, left, ranks(moved, path), strict=True):
                    size = np.abs(one).max()
                    np.testing.assert_allclose(
                        cut, nearest(one, rank), rtol=0, atol=2e-5 * size
                    )
        elif at:
            for path in ("stack", "up"):
                np.testing.assert_array_equal(dense(moved, path), dense(before, path))
        latest = np.concatenate([
            np.linalg.svd(dense(moved, path), compute_uv=False)[:, :HELD]
            for path in ("stack", "up")
        ])  # fmt: skip
    assert cuts == (1 if window["begin"] == window["end"] else 5)
    assert kept.sum() == 7
    assert world.traced == 1


def test_factors_come_out_balanced_and_their_moments_begin_anew():
    world = World(Squeeze(begin=16, end=16, every=3, measure_every=3))
    world.run(steps=16)
    before = world.state
    moved = jax.jit(world.ranks.before)(before)
    for path in ("stack", "up"):
        a, b = (np.asarray(moved.trained[path][n][0]) for n in ("a", "b"))
        gram = lambda x: np.einsum("...ri,...si->...rs", x, x)
        np.testing.assert_allclose(gram(a), gram(b), atol=1e-5)
        assert np.abs(np.triu(gram(a), 1)).max() < 1e-5
    is_aged = lambda part: isinstance(part, Aged)
    (aged,) = filter(is_aged, jax.tree.leaves(moved.opt, is_leaf=is_aged))
    (old,) = filter(is_aged, jax.tree.leaves(before.opt, is_leaf=is_aged))
    for path in ("stack", "up"):
        for part in aged:
            assert not any(np.asarray(x).any() for x in part[path].values())
        assert all(np.asarray(x).all() for x in old.age[path].values())
    np.testing.assert_array_equal(aged.age["head"], old.age["head"])
    # So the first update is of the learning rate, beside decay.
    (_, _, after, _) = next(world.states(start=16, steps=17))
    for path in ("stack", "up"):
        open_ = np.asarray(moved.dials[path]["gate"][0]) != 0
        for name in ("a", "b"):
            old, new = (np.asarray(s.trained[path][name][0]) for s in (moved, after))
            step = np.abs(new - old * (1 - OPTIM.lr * OPTIM.weight_decay))[open_]
            np.testing.assert_allclose(np.median(step), OPTIM.lr, rtol=1e-2)


def test_squeezing_goes_by_singular_values_of_two_factors_alone():
    with pytest.raises(BadInput, match="either goes with the other alone"):
        Squeeze(importance="norm")
    with pytest.raises(BadInput, match="either goes with the other alone"):
        Squeeze(mode="hard")
    with pytest.raises(BadInput, match=r"selector = .grow. opens gates"):
        Squeeze(selector="grow")
    with pytest.raises(BadInput, match=r"Triplet .*'diagonal'.*delta=lora"):
        World(Squeeze(**WINDOW), delta=Triplet())
