"""Training with a rank per layer of a stack: closed components stand still.

The oracle is the same model unrolled, each layer with a weight of its own and factors
that hold what is open and nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax import lax

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Freeze, Rule, Train
from lowrank.deltas.lora import LoRA
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step

LAYERS, STEPS, SEEDS = 4, 5, (0, 1)
RANKS = (2, 0, 1, 4)
#: Clipping and decay reach everything that moves, and must reach nothing else.
OPTIM = AdamW(lr=0.05, weight_decay=0.3, clip=0.2, warmup=0.0, schedule="constant")


def pooled(params, batch):
    x = params["embed"][batch["ids"]]
    mask = batch["mask"][..., None].astype(x.dtype)
    return (x * mask).sum(axis=1) / mask.sum(axis=1)


def layer(x, w):
    return x + jnp.tanh(x @ w["kernel"]), None


def scanned(params, batch):
    x, _ = lax.scan(layer, pooled(params, batch), params["layer"])
    return x @ params["head"]


def unrolled(params, batch):
    x = pooled(params, batch)
    for number in range(LAYERS):
        x, _ = layer(x, params[f"layer_{number}"])
    return x @ params["head"]


def models():
    """The scanned and the unrolled model, adapted alike."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
    shared = {
        "embed": draw(toy.VOCAB, toy.WIDTH),
        "head": jnp.zeros((toy.WIDTH, toy.CLASSES)),
    }
    stack = draw(LAYERS, toy.WIDTH, toy.WIDTH)
    example = {"ids": toy.batch(0)["ids"], "mask": toy.batch(0)["mask"]}
    head, delta = Train("head", init="dense"), LoRA(alpha=8.0)
    rules = [
        head,
        Freeze("layer[1]/**"),
        Rule("layer[0]/*", delta, rank=2),
        Rule("layer[3]/*", delta, rank=4),
        Rule("layer/*", delta, rank=1),
    ]
    one = attach(scanned, {**shared, "layer": {"kernel": stack}}, example, rules=rules)
    layers = {f"layer_{n}": {"kernel": stack[n]} for n in range(LAYERS)}
    rules = [head] + [
        Rule(f"layer_{n}/*", delta, rank=rank) for n, rank in enumerate(RANKS) if rank
    ]
    two = attach(unrolled, {**shared, **layers}, example, rules=rules)
    return one, two


def apart(tree):
    """A tree of the scanned pack as the unrolled pack holds it."""
    found = {path: leaf for path, leaf in tree.items() if path != "layer/kernel"}
    for n, rank in enumerate(RANKS):
        if rank:
            factors = tree["layer/kernel"].items()
            found[f"layer_{n}/kernel"] = {k: v[:, n, :rank] for k, v in factors}
    return found


def train(adapted, start, optim=OPTIM):
    """States before and after a few steps of a pack, and the losses."""
    step = make_step(
        toy.model_of(adapted), cross_entropy, optim, STEPS, adapted.draws,
        adapted.active,
    )  # fmt: skip
    pack = jax.jit(over_trials(step, len(SEEDS)))
    dials, optims = adapted.dials(), [optim] * len(SEEDS)
    first = state = states.start(adapted.init_trained, dials, optims, SEEDS)
    if start is not None:
        state = state.replace(trained=start)
    frozen, losses = adapted.frozen(), []
    for number in range(STEPS):
        batches = [toy.batch(number + 10 * seed) for seed in SEEDS]
        state, metrics = pack(frozen, state, toy.on_device(toy.stack(batches)))
        losses.append(metrics["loss"])
    return first, state, np.asarray(losses)


def close(one, two, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1e-6)
        ),
        one,
        two,
    )


@pytest.mark.slow  # Of outputs and gradients tests/adapt/test_layers.py shows it.
def test_a_scanned_run_equals_the_unrolled_run():
    """Trained weights, both moments and losses after steps of AdamW."""
    one, two = models()
    first, ours, losses = train(one, None)
    _, theirs, expected = train(two, apart(first.trained))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(apart(ours.trained), theirs.trained, 2e-5)
    for name in ("mu", "nu"):
        moments = [
            next(getattr(part, name) for part in state.opt if hasattr(part, name))
            for state in (ours, theirs)
        ]
        close(apart(moments[0]), moments[1], 2e-4)


def test_closed_components_stand_still():
    """Not even decay moves them, and their moments stay at zero."""
    adapted, _ = models()
    before, after, _ = train(adapted, None)
    (adam,) = [part for part in after.opt if hasattr(part, "mu")]
    for name in ("a", "b"):
        pick = lambda tree, name=name: np.asarray(tree["layer/kernel"][name])
        old, new = pick(before.trained), pick(after.trained)
        mu, nu = pick(adam.mu), pick(adam.nu)
        for n, rank in enumerate(RANKS):
            np.testing.assert_array_equal(old[:, n, rank:], new[:, n, rank:])
            assert not mu[:, n, rank:].any()
            assert not nu[:, n, rank:].any()
            assert (old[:, n, :rank] != new[:, n, :rank]).any(axis=-1).all()
    # They do start somewhere: standing still at zero would prove nothing.
    assert np.abs(np.asarray(before.trained["layer/kernel"]["a"])).min(axis=-1).all()


def test_a_component_that_closes_keeps_its_moments():
    adapted, _ = models()
    _, state, _ = train(adapted, None)
    gate = state.dials["layer/kernel"]["gate"]
    dials = {"layer/kernel": {**state.dials["layer/kernel"]}}
    dials["layer/kernel"]["gate"] = gate.at[:, 3, 2].set(0.0)
    step = make_step(
        toy.model_of(adapted), cross_entropy, OPTIM, STEPS, False, adapted.active
    )
    pack = jax.jit(over_trials(step, len(SEEDS)))
    batches = toy.on_device(toy.stack([toy.batch(seed) for seed in SEEDS]))
    after, _ = pack(adapted.frozen(), state.replace(dials=dials), batches)
    moments = lambda s: next(part for part in s.opt if hasattr(part, "mu"))
    for tree in (
        lambda s: s.trained,
        lambda s: moments(s).mu,
        lambda s: moments(s).nu,
    ):
        for name in ("a", "b"):
            old, new = (tree(s)["layer/kernel"][name][:, 3] for s in (state, after))
            np.testing.assert_array_equal(old[:, 2], new[:, 2])
            assert (old[:, 1] != new[:, 1]).any(axis=-1).all()
