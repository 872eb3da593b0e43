"""A pack of N equals N runs, shares one base, and compiles once per shape."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.sharding.mesh import MeshSpec, batch_shapes, place_batch, replicate
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import ENTRIES_AT_ONCE, Pack, on_devices, over_trials
from lowrank.train.step import make_step

pytestmark = pytest.mark.long

STEPS = 4
OPTIMS = [
    AdamW(lr=1e-2),
    AdamW(lr=3e-3, label_smoothing=0.1),
    AdamW(lr=1e-2, b1=0.8, weight_decay=0.1),
]


def run(optims, seeds, batches, dropout, entries_at_once=None):
    """Trains a pack on `batches`: one list of batches per step, one per trial."""
    adapted = toy.make(dropout)
    step = make_step(
        toy.model_of(adapted), cross_entropy, optims[0], STEPS, draws=adapted.draws
    )
    state = states.start(adapted.init_trained, adapted.dials(), optims, seeds)
    packed = jax.jit(over_trials(step, len(seeds), entries_at_once=entries_at_once))
    losses = []
    for one in batches:
        state, metrics = packed(adapted.frozen(), state, toy.on_device(toy.stack(one)))
        losses.append(np.asarray(metrics["loss"]))
    return state, np.array(losses)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_trials_in_a_pack_equal_trials_alone(dropout):
    seeds = [3, 1, 4]
    batches = [[toy.batch(10 * s + seed) for seed in seeds] for s in range(STEPS)]
    together, losses = run(OPTIMS, seeds, batches, dropout)
    for trial, (optim, seed) in enumerate(zip(OPTIMS, seeds, strict=True)):
        own = [[one[trial]] for one in batches]
        alone, own_losses = run([optim], [seed], own, dropout)
        np.testing.assert_allclose(losses[:, trial], own_losses[:, 0], rtol=1e-5)
        pairs = zip(
            jax.tree.leaves(together.trained),
            jax.tree.leaves(alone.trained),
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(a[trial], b[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("entries_at_once", [1, 100, 144])
def test_trials_that_take_turns_are_the_trials_side_by_side(entries_at_once):
    # 48 entries a trial: one, two and three of six at a time.
    optims, seeds = OPTIMS * 2, [3, 1, 4, 1, 5, 9]
    batches = [[toy.batch(10 * s + seed) for seed in seeds] for s in range(STEPS)]
    side_by_side, losses = run(optims, seeds, batches, 0.3)
    in_turns, own = run(optims, seeds, batches, 0.3, entries_at_once)
    np.testing.assert_allclose(own, losses, rtol=1e-5)
    assert int(in_turns.step) == STEPS
    assert jax.tree.structure(in_turns) == jax.tree.structure(side_by_side)
    for a, b in zip(
        jax.tree.leaves(in_turns.trained),
        jax.tree.leaves(side_by_side.trained),
        strict=True,
    ):
        # 1e-4: sums of a narrower product come in another order, as in a pack alone.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_turns_are_as_wide_as_entries_allow_and_come_out_even():
    mesh = MeshSpec().build()
    adapted = toy.make()
    step = make_step(
        toy.model_of(adapted), cross_entropy, OPTIMS[0], STEPS, draws=False
    )

    def text(num_trials, rows):
        seeds = list(range(num_trials))
        optims = OPTIMS[:1] * num_trials
        state = states.start(adapted.init_trained, adapted.dials(), optims, seeds)
        batch = toy.stack([toy.batch(s, rows, 64) for s in seeds])
        packed = on_devices(step, num_trials, mesh)
        return str(jax.make_jaxpr(packed)(adapted.frozen(), state, batch))

    def loops(*given):
        return [int(n) for n in re.findall(r"length=(\d+)", text(*given))]

    def batched(*given):
        """Products with a batch axis, as those of several trials are."""
        return re.findall(r"\(\[\d+(?:, \d+)*\], \[\d+[\d, ]*\]\)\)", text(*given))

    assert ENTRIES_AT_ONCE == 1024
    assert loops(4, 4) == [], "4 x 256: all side by side"
    assert loops(8, 4) == [2], "8 x 256: two turns of four"
    assert loops(10, 4) == [5], "five would be 1280, and four do not divide ten"
    assert loops(3, 64) == [3], "one of 4096 at a time"
    assert batched(8, 4)
    assert not batched(3, 64), "one at a time is one alone"
    assert not batched(1, 64)


def test_a_trial_that_diverges_harms_no_other():
    batches = [[toy.batch(s), toy.batch(s + 50)] for s in range(STEPS)]
    clean, _ = run(OPTIMS[:2], [0, 1], batches, 0.0)
    batches[1][0]["weight"][0] = np.nan
    mixed, _ = run(OPTIMS[:2], [0, 1], batches, 0.0)
    np.testing.assert_array_equal(mixed.skipped, [1, 0])
    for a, b in zip(
        jax.tree.leaves(mixed.trained), jax.tree.leaves(clean.trained), strict=True
    ):
        np.testing.assert_array_equal(a[1], b[1])


def lowered(num_trials):
    adapted = toy.make()
    step = make_step(
        toy.model_of(adapted), cross_entropy, OPTIMS[0], STEPS, draws=False
    )
    optims = OPTIMS[:1] * num_trials
    seeds = list(range(num_trials))
    state = states.start(adapted.init_trained, adapted.dials(), optims, seeds)
    batch = toy.on_device(toy.stack([toy.batch(s) for s in seeds]))
    jitted = jax.jit(over_trials(step, num_trials))
    return jitted.lower(adapted.frozen(), state, batch), step, adapted, state, batch


def test_a_pack_holds_the_base_once():
    text = lowered(3)[0].as_text()
    frozen = {f"{toy.VOCAB}x{toy.WIDTH}", f"{toy.WIDTH}x{toy.HIDDEN}"}
    shapes = set(re.findall(r"tensor<([\dx]+)xf32>", text))
    assert frozen <= shapes, "the base must be seen for the test to mean anything"
    assert not {f"3x{shape}" for shape in frozen} & shapes


def test_a_pack_of_one_costs_what_the_bare_step_costs():
    packed, step, adapted, state, batch = lowered(1)
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    alone = first(state.replace(step=jnp.int32(0)[None]))
    bare = jax.jit(step).lower(adapted.frozen(), alone, first(batch))
    flops = lambda low: low.compile().cost_analysis()["flops"]
    # A few element-wise operations are fused another way.
    assert flops(packed) == pytest.approx(flops(bare), rel=5e-3)


def test_steps_compile_once_per_shape_and_never_later(monkeypatch):
    # Where there are other processes, all of them have compiled before one begins.
    rejoined = []
    monkeypatch.setattr("lowrank.train.pack.rejoin", lambda: rejoined.append(1))
    mesh = MeshSpec().build()
    adapted = toy.make()
    frozen = replicate(adapted.frozen(), mesh)
    step = make_step(
        toy.model_of(adapted), cross_entropy, OPTIMS[0], STEPS, draws=False
    )
    state = states.start(adapted.init_trained, adapted.dials(), OPTIMS[:1], [0])
    state = replicate(state, mesh)
    batches = [toy.stack([toy.batch(0, seq=6)]), toy.stack([toy.batch(1, seq=9)])]
    shapes = [batch_shapes(batch, mesh, 1) for batch in batches]
    put = lambda batch: place_batch(batch, mesh, 1)
    pack = Pack(step, frozen, state, shapes, put, 1, mesh)
    assert set(pack.compiled) == {(8, 6), (8, 9)}
    assert len(rejoined) == 1
    pointer = frozen["embed"].unsafe_buffer_pointer()
    state, _ = pack(state, batches[0])
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", None)
        for number in range(6):
            state, metrics = pack(state, batches[number % 2])
    assert np.isfinite(metrics["loss"]).all()
    assert int(state.step) == 7
    # The base is neither donated nor copied.
    assert frozen["embed"].unsafe_buffer_pointer() == pointer
    assert pack.frozen["embed"] is frozen["embed"]
    with pytest.raises(KeyError):
        pack(state, toy.stack([toy.batch(0, seq=7)]))
