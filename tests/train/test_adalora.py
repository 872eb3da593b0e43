"""AdaLoRA as published, beside a reference in NumPy: factors, scores and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.allocate.recipes import AdaLoRA
from lowrank.deltas.triplet import Triplet
from lowrank.run.ranks import gauges, rank_events, slots_of
from lowrank.train import state as states
from lowrank.train.losses import squared_error
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.penalties import Penalties, impose
from lowrank.train.step import make_step

pytestmark = pytest.mark.long

STEPS, ROWS, RANK, HELD, LR, GAMMA, ALPHA = 20, 12, 2, 4, 0.02, 0.1, 4.0
SIZES = {"first": (6, 8), "second": (8, 5)}
BEGIN, END, EVERY, BETA = 4, 16, 3, 0.85
NAMES = ("a", "b", "diagonal")


def apply(params, batch):
    return jnp.tanh(batch["x"] @ params["first"]) @ params["second"]


def data(rng):
    x = rng.normal(size=(STEPS, ROWS, SIZES["first"][0]))
    y = rng.normal(size=(STEPS, ROWS, SIZES["second"][1]))
    return x.astype(np.float32), y.astype(np.float32)


def reference(params, start, x, y, mode):
    """The paper's algorithm in NumPy and float64: (gates, kept, factors) of each step.

    Gradients by the chain rule, Adam as in its paper, scores as in eqs. 8 to 12, the
    budget as in the code of AdaLoRA. Scores see the task's gradient alone.
    """
    wide = lambda v: np.asarray(v, np.float64)
    w = {path: wide(v) for path, v in params.items()}
    f = {path: {n: wide(start[path][n]) for n in NAMES} for path in w}
    zeros = lambda: {
        p: {n: np.zeros_like(v) for n, v in own.items()} for p, own in f.items()
    }
    mu, nu, mean, dev = (zeros() for _ in range(4))
    gates = {path: np.ones(HELD) for path in w}
    scale, total, target = ALPHA / RANK, 2 * HELD, 2 * RANK
    for t in range(STEPS):
        due = t == END or (BEGIN < t < END and (t - BEGIN) % EVERY == 0)
        if due:
            scores = np.concatenate([
                sum(
                    (mean[p][n] * dev[p][n]).reshape(HELD, -1).mean(axis=1)
                    for n in NAMES
                )
                for p in w
            ])  # fmt: skip
            past = (t - BEGIN) / (END - BEGIN)
            budget = int(np.floor(target + (total - target) * (1 - past) ** 3 + 1e-9))
            kept = np.zeros(total)
            kept[np.argsort(-scores, kind="stable")[:budget]] = 1
            for path, own in zip(w, np.split(kept, 2), strict=True):
                if mode == "revivable":
                    f[path]["diagonal"] = f[path]["diagonal"] * own
                if mode == "hard" or t == END:
                    gates[path] = own
        yield {path: gates[path].copy() for path in w}, f
        change = {
            p: scale
            * f[p]["a"].T
            @ ((f[p]["diagonal"] * gates[p])[:, None] * f[p]["b"])
            for p in w
        }
        one, two = (w[p] + change[p] for p in w)
        h = np.tanh(x[t] @ one)
        dy = 2 * (h @ two - y[t]) / y[t].size
        dense = {"second": h.T @ dy}
        dense["first"] = wide(x[t]).T @ ((dy @ two.T) * (1 - h**2))
        for p in w:
            a, b, d = (f[p][n] for n in NAMES)
            c = scale * d * gates[p]
            open_ = gates[p][:, None]
            grads = {
                "a": c[:, None] * (b @ dense[p].T),
                "b": c[:, None] * (a @ dense[p]),
                "diagonal": scale * gates[p] * np.sum((a @ dense[p]) * b, axis=1),
            }
            if t < END:
                for n in NAMES:
                    size = np.abs(f[p][n] * grads[n])
                    mean[p][n] = BETA * mean[p][n] + (1 - BETA) * size
                    off = np.abs(size - mean[p][n])
                    dev[p][n] = BETA * dev[p][n] + (1 - BETA) * off
            for n, v in (("a", a), ("b", b)):
                rows = open_ * v
                gram = rows @ rows.T - np.diag(gates[p])
                grads[n] = grads[n] + GAMMA * 4 * gram @ rows
            for n in NAMES:
                g, moves = grads[n], gates[p].reshape(HELD, *[1] * (f[p][n].ndim - 1))
                mu[p][n] = np.where(moves, 0.9 * mu[p][n] + 0.1 * g, mu[p][n])
                nu[p][n] = np.where(moves, 0.999 * nu[p][n] + 0.001 * g**2, nu[p][n])
                m, v = (
                    mu[p][n] / (1 - 0.9 ** (t + 1)),
                    nu[p][n] / (1 - 0.999 ** (t + 1)),
                )
                f[p][n] = f[p][n] - moves * LR * m / (np.sqrt(v) + 1e-8)


@pytest.mark.parametrize("mode", ["revivable", "hard"])
def test_adalora_follows_the_paper_for_20_steps(mode):
    rng = np.random.default_rng(1)
    x, y = data(rng)
    params = {
        path: jnp.asarray(rng.normal(size=size) / np.sqrt(size[0]), jnp.float32)
        for path, size in SIZES.items()
    }

    delta = Triplet(alpha=ALPHA)
    rules = [Rule(path, delta, rank=RANK, max_rank=HELD) for path in SIZES]
    adapted = attach(apply, params, {"x": jnp.asarray(x[0])}, rules=rules)

    def model(frozen, trained, batch, dials, key):
        own = {"x": batch["x"]}
        return adapted.apply(frozen, trained, own, dials=dials, key=key)

    allocator = AdaLoRA(
        begin=BEGIN, end=END, every=EVERY, mode=mode, start=float(HELD / RANK)
    )
    moving = rank_events(
        adapted, [allocator], [slots_of(adapted)], STEPS, gauges(model, squared_error)
    )
    optim = AdamW(lr=LR, warmup=0.0, schedule="constant", weight_decay=0.0, clip=None)
    penalties = [Penalties(orthogonality=GAMMA)]
    imposed = impose(penalties, adapted.sites, adapted.thin)
    step = make_step(
        model, squared_error, optim, STEPS, False, adapted.active, imposed,
        adapted.roles(), tells=moving.of_step,
    )  # fmt: skip
    state = states.start(
        adapted.init_trained, moving.opened([adapted.dials()]), [optim], [0],
        weights=imposed.weights(penalties), roles=adapted.roles(), ranks=moving.begin,
    )  # fmt: skip
    start = jax.tree.map(lambda v: v[0], state.trained)
    assert not start["first"]["diagonal"].any()
    pack = jax.jit(over_trials(step, 1, ranks=moving))
    event = jax.jit(moving.before)
    expected = reference(params, start, x, y, mode)
    revived = 0
    for t, (gates, factors) in enumerate(expected):
        due = event(state)
        for path in SIZES:
            np.testing.assert_array_equal(due.dials[path]["gate"][0], gates[path])
            shown = np.asarray(due.dials[path]["gate"][0]) != 0
            lost = shown & (np.asarray(due.ranks["memory"]["kept"][path][0]) == 0)
            revived += int((state.trained[path]["diagonal"][0][lost] != 0).sum())
            for name in NAMES:
                # Adam divides small sums by their own size: float32 is off by more
                # than its last digit where a gradient nearly vanishes.
                np.testing.assert_allclose(
                    due.trained[path][name][0], factors[path][name],
                    rtol=1e-3, atol=2e-4,
                )  # fmt: skip
        batch = {"x": x[t], "y": y[t], "weight": np.ones(ROWS, np.float32)}
        wide = {name: jnp.asarray(v)[None] for name, v in batch.items()}
        state, metrics = pack(adapted.frozen(), state, wide)
        assert bool(metrics["finite"][0])
    assert sum(int(g.sum()) for g in gates.values()) == 2 * RANK
    assert {int(g.sum()) for g in gates.values()} != {RANK}, "nothing was allocated"
    assert (revived > 0) == (mode == "revivable")
