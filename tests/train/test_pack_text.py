"""What a pack's program may hold, whatever its layout, and what each trial owns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import toy

from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import over_trials
from lowrank.train.step import make_step

#: Prime, and the size of nothing else in the toy.
TRIALS = 7


def prepared(dropout=0.0, num_trials=TRIALS):
    adapted = toy.make(dropout, rank=2)
    optims, seeds = [AdamW()] * num_trials, list(range(num_trials))
    step = make_step(
        toy.model_of(adapted), cross_entropy, optims[0], 4, draws=adapted.draws
    )
    state = states.start(adapted.init_trained, adapted.dials(), optims, seeds)
    return adapted, jax.jit(over_trials(step, num_trials)), state


def dimensions(text):
    """Sizes of every tensor in a lowered program, sorted."""
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]+\d+>", text)
    return {tuple(sorted(map(int, dims[:-1].split("x")))) for dims in found}


def test_no_tensor_holds_a_frozen_weight_per_trial_in_any_order():
    adapted, packed, state = prepared()
    batch = toy.on_device(toy.stack([toy.batch(s) for s in range(TRIALS)]))
    shapes = dimensions(packed.lower(adapted.frozen(), state, batch).as_text())
    frozen = {path: tuple(sorted(x.shape)) for path, x in adapted.frozen().items()}
    assert set(frozen) == {"embed", "up"}
    for path, shape in frozen.items():
        assert shape in shapes, f"{path} must be seen for the test to mean anything"
        assert tuple(sorted((TRIALS, *shape))) not in shapes, path
    whole = (toy.HIDDEN, toy.CLASSES)
    assert tuple(sorted((TRIALS, *whole))) in shapes, "trained weights are per trial"


def test_every_trial_has_a_dropout_rate_of_its_own():
    rates = [0.0, 0.6]
    adapted, packed, state = prepared(dropout=0.3, num_trials=2)
    step = make_step(toy.model_of(adapted), cross_entropy, AdamW(), 4, draws=True)
    single = jax.jit(over_trials(step, 1))
    # Same start, key and data: only the rate tells the trials apart.
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x[0] + 0, x[0] + 0]), tree)
    trained = jax.tree.map(lambda x: x + 0.1, state.trained)
    state = state.replace(
        trained=twice(trained), key=jnp.stack([state.key[0]] * 2),
        dials={"up": {**state.dials["up"], "dropout": jnp.array(rates)}},
    )  # fmt: skip
    batch = toy.batch(0)
    packed_batch = toy.on_device(toy.stack([batch, batch]))
    _, metrics = packed(adapted.frozen(), state, packed_batch)
    losses = np.asarray(metrics["loss"])
    assert losses[0] != losses[1]
    for trial in range(2):
        alone = states.TrainState(**{
            name: value if name == "step" else jax.tree.map(
                lambda x: x[trial : trial + 1], value
            )
            for name, value in vars(state).items()
        })  # fmt: skip
        _, own = single(adapted.frozen(), alone, toy.on_device(toy.stack([batch])))
        np.testing.assert_allclose(losses[trial], own["loss"][0], rtol=1e-5)
