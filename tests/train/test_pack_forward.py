"""The trials of a pack are judged as they are trained: a few at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.deltas.lora import LoRA
from lowrank.run.forward import Forward, inputs_of
from lowrank.sharding.mesh import MeshSpec
from lowrank.train import state as states
from lowrank.train.optim import AdamW

TRIALS = 8


def apply(params, batch):
    """Every token by itself through a corrected weight, and then their mean."""
    x = jnp.tanh(params["embed"][batch["ids"]] @ params["up"])
    return x.mean(axis=1) @ params["head"]


def make():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "embed": jax.random.normal(keys[0], (toy.VOCAB, toy.WIDTH)),
        "up": jax.random.normal(keys[1], (toy.WIDTH, toy.HIDDEN)),
        "head": jnp.zeros((toy.HIDDEN, toy.CLASSES)),
    }
    rules = [Train("head", init="dense"), Rule("up", LoRA(), rank=3)]
    return attach(apply, params, inputs_of(toy.batch(0)), rules=rules)


def forward(trials):
    """Inference of these trials, with corrections that say something."""
    adapted = make()
    state = states.start(
        adapted.init_trained, adapted.dials(), [AdamW()] * TRIALS, range(TRIALS)
    )
    pick = lambda tree: jax.tree.map(lambda x: x[np.array(trials)], tree)
    trained = jax.tree.map(lambda x: x + 0.1, pick(state.trained))
    run = Forward(toy.model_of(adapted), adapted.frozen(), MeshSpec().build())
    return run, lambda batch: run(trained, pick(state.dials), batch)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_trial_among_others_says_what_it_says_alone(rows):
    # 8 trials of 256 tokens in two turns, of 1024 one by one.
    batch = toy.batch(0, rows, 64)
    _, together = forward(range(TRIALS))
    logits = np.asarray(together(batch))
    assert logits.shape == (TRIALS, rows, toy.CLASSES)
    _, alone = forward([5])
    # Sums of some twenty products in another order, in float32.
    np.testing.assert_allclose(logits[5], alone(batch)[0], rtol=1e-5, atol=1e-6)


def test_processes_wait_for_each_other_where_something_was_compiled(monkeypatch):
    rejoined = []
    monkeypatch.setattr("lowrank.run.forward.rejoin", lambda: rejoined.append(1))
    run, judge = forward([0])
    for rows, times in ((4, 1), (4, 1), (8, 2)):
        judge(toy.batch(0, rows, 64))
        assert len(rejoined) == len(run._compiled) == times


def test_a_pack_holds_what_a_few_trials_hold():
    batch = toy.batch(0, 64, 64)
    held = []
    for trials in ([0], range(TRIALS)):
        run, judge = forward(trials)
        judge(batch)
        (compiled,) = run._compiled.values()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    # What all trials share, the embedded tokens, is held beside one trial's own.
    assert held[1] < 3 * held[0], "one by one, and not eight at once"
