"""A step whose components have ages: the plain step until ranks move, then theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.train import state as states
from lowrank.train.aging import Aged, reborn
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step


def aged(opt):
    (found,) = [part for part in opt if isinstance(part, Aged)]
    return found


def close(one, two, rtol, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, two
    )


@pytest.mark.parametrize("clip", [1.0, 1e-2])
def test_a_step_with_ages_is_the_step_without_while_nothing_changes(clip):
    """With gradients that are clipped, too: the norm is of all components together."""
    adapted = toy.make()
    optim = AdamW(lr=1e-2, weight_decay=0.1, warmup=0.4, clip=clip)
    frozen, found = adapted.frozen(), []
    for ages in (True, False):
        known = {"roles": adapted.roles(), "ages": ages}
        step = make_step(
            toy.model_of(adapted), cross_entropy, optim, 6, False, adapted.active,
            **known,
        )  # fmt: skip
        start = adapted.init_trained
        state = states.start(start, adapted.dials(), [optim], [0], **known)
        pack = jax.jit(over_trials(step, 1))
        for number in range(6):
            batch = toy.on_device(toy.stack([toy.batch(number)]))
            state, metrics = pack(frozen, state, batch)
        assert (float(metrics["grad_norm"][0]) > clip) == (clip < 1.0)
        found.append((state.trained, state.opt[1].mu, metrics))
    close(*found, rtol=1e-5, atol=1e-7)


def test_a_step_ages_what_is_open_and_compiles_once():
    """Gates that change between steps of a pack, a birth among them."""
    adapted = toy.make(rank=4)
    kw = {"lr": 1e-2, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0}
    optims = [AdamW(b_ratio=2.0, **kw), AdamW(**kw)]
    known = {"roles": adapted.roles(), "ages": True}
    assert known["roles"] == {"up": {"a": ("rank", "in"), "b": ("rank", "out")}}
    step = make_step(
        toy.model_of(adapted), cross_entropy, optims[0], 10, adapted.draws,
        adapted.active, **known,
    )  # fmt: skip
    seeds = (0, 1)
    state = states.start(adapted.init_trained, adapted.dials(), optims, seeds, **known)
    frozen, pack = adapted.frozen(), jax.jit(over_trials(step, 2))

    def after(state, gate, poison=1.0):
        dials = {"up": {**state.dials["up"], "gate": jnp.asarray(gate, jnp.float32)}}
        batches = [toy.batch(int(state.step) + 7 * seed) for seed in seeds]
        batches[1]["weight"][0] *= poison
        stacked = toy.on_device(toy.stack(batches))
        return pack(frozen, state.replace(dials=dials), stacked)[0]

    first = [[1, 1, 0, 0], [1, 0, 0, 0]]
    second = [[1, 0, 1, 0], [1, 1, 0, 0]]
    for _ in range(3):
        state = after(state, first)
    born = {"up": jnp.array([[False] * 4, [False, True, False, False]])}
    opt = jax.vmap(lambda opt, new: reborn(opt, new, known["roles"]))(state.opt, born)
    before = state = state.replace(opt=opt)
    state = after(state, second)
    moved = np.abs(state.trained["up"]["b"] - before.trained["up"]["b"])
    # b is zero where a component never was open: no decay, and a gradient for b alone.
    for trial, component, ratio in ((0, 2, 2), (1, 1, 1)):
        np.testing.assert_allclose(moved[trial, component], ratio * 1e-2, rtol=1e-3)
    pairs = zip(
        (before.trained, *aged(before.opt)), (state.trained, *aged(state.opt)),
        strict=True,
    )  # fmt: skip
    for old_tree, new_tree in pairs:
        for name in ("a", "b"):
            was, is_ = old_tree["up"][name], new_tree["up"][name]
            np.testing.assert_array_equal(was[0, 1], is_[0, 1])
            np.testing.assert_array_equal(was[:, 3], is_[:, 3])
            np.testing.assert_array_equal(was[1, 2], is_[1, 2])
    state = after(state, second, poison=np.nan)
    ages = aged(state.opt).age
    for name in ("a", "b"):
        np.testing.assert_array_equal(ages["up"][name], [[5, 3, 2, 0], [4, 1, 0, 0]])
    np.testing.assert_array_equal(ages["head"], [5, 4])
    np.testing.assert_array_equal(state.skipped, [0, 1])
    assert pack._cache_size() == 1
