"""In float64 a pack of trials with dials of their own equals the trials alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step

STEPS = 12
SEEDS = (5, 2)
RATES = (0.1, 0.4)
SCALES = (1.0, 4.0)
OPTIMS = (AdamW(lr=1e-2, label_smoothing=0.1), AdamW(lr=3e-3, weight_decay=0.1))


def wide(tree):
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if floats(x) else x, tree)


def run(trials):
    """Losses and trained leaves of the trials of these numbers, as one pack."""
    adapted = toy.make(dropout=0.2)
    step = make_step(
        toy.model_of(adapted), cross_entropy, OPTIMS[0], STEPS, draws=adapted.draws
    )
    pick = lambda values: [values[trial] for trial in trials]
    state = states.start(
        adapted.init_trained, adapted.dials(), pick(OPTIMS), pick(SEEDS)
    )
    own = {"dropout": jnp.array(pick(RATES)), "scale": jnp.array(pick(SCALES))}
    state = state.replace(dials={"up": {**state.dials["up"], **own}})
    state, frozen = wide(state), wide(adapted.frozen())
    packed = jax.jit(over_trials(step, len(trials)))
    losses = []
    for number in range(STEPS):
        batches = [toy.batch(10 * number + trial) for trial in trials]
        state, metrics = packed(frozen, state, toy.on_device(toy.stack(batches)))
        losses.append(np.asarray(metrics["loss"]))
    return np.array(losses), [np.asarray(x) for x in jax.tree.leaves(state.trained)]


def gaps():
    """How far the pack is from its trials alone, and its trials from each other."""
    losses, trained = run([0, 1])
    far = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
    found = []
    for trial in range(2):
        own_losses, own = run([trial])
        assert own[0].dtype == np.float64
        found.append(far(losses[:, trial], own_losses[:, 0]))
        found += [far(a[trial], b[0]) for a, b in zip(trained, own, strict=True)]
    return {"alone": max(found), "between": far(losses[:, 0], losses[:, 1])}


@pytest.mark.slow  # In float32 test_pack shows it.
def test_a_pack_equals_its_trials_to_eight_digits():
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, test_pack_wide; print(json.dumps(test_pack_wide.gaps()))",
        ],
        env={
            **os.environ,
            "JAX_ENABLE_X64": "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["alone"] <= 1e-8
    assert found["between"] > 1e-2, "trials that do not differ prove nothing"
