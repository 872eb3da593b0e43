"""Trials on several devices: the same numbers, and nothing said between the devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.sharding.mesh import (
    MeshSpec,
    batch_shapes,
    check_trials,
    place_batch,
    replicate,
    replicated,
    trial_axis,
)
from lowrank.train import state as states
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW
from lowrank.train.pack import Pack, jitted, over_trials
from lowrank.train.step import make_step

STEPS = 4
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast)(?:-start)?\("
)


class World:
    """A pack on a mesh; every trial has a seed, a rate and an order of its own.

    A trial's are the same in every pack, so that a pack's first trials are another's.
    """

    def __init__(self, num_trials, **axes):
        self.mesh, self.seeds = MeshSpec(**axes).build(), range(num_trials)
        adapted = toy.make(dropout=0.2)
        optims = [AdamW(lr=1e-2 / (1 + n), label_smoothing=0.1) for n in self.seeds]
        self.step = make_step(
            toy.model_of(adapted), cross_entropy, optims[0], STEPS, adapted.draws,
            adapted.active,
        )  # fmt: skip
        self.frozen = replicate(adapted.frozen(), self.mesh)
        state = states.start(adapted.init_trained, adapted.dials(), optims, self.seeds)
        self.state = jax.device_put(state, states.on_mesh(state, self.mesh))
        self.shapes = batch_shapes(self.batch(0), self.mesh, 1)

    def batch(self, number):
        return toy.stack([toy.batch(100 * number + seed) for seed in self.seeds])

    def trained(self):
        """The state after some steps and two validations, and the metrics of each."""
        put = lambda batch: place_batch(batch, self.mesh, 1)
        pack = Pack(
            self.step, self.frozen, self.state, [self.shapes], put, len(self.seeds),
            self.mesh,
        )  # fmt: skip
        state, rows = self.state, []
        number = jnp.arange(len(self.seeds))
        for at in range(STEPS):
            state, metrics = pack(state, self.batch(at))
            rows.append(jax.device_get(metrics))
            if at == 1:
                # The odd ones have their best here; the second trial ends.
                values = jnp.where(number % 2, 2.0, 0.0)
                state = states.settle(state, values, number != 1)
        ones = jnp.ones(len(self.seeds))
        state = states.settle(state, ones, ones > 0)
        return state, rows, pack.compiled[(8, 6)].as_text()


@functools.cache
def trained(num_trials, trial=1, data=1):
    return World(num_trials, trial=trial, data=data).trained()


def plain(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def test_the_program_of_one_device_does_not_know_of_a_trial_axis():
    world = World(1)
    given = (world.frozen, world.state, world.shapes)
    before = jax.jit(
        over_trials(world.step, 1), donate_argnums=1,
        out_shardings=replicated(world.mesh),
    )  # fmt: skip
    packed = over_trials(world.step, 1, trial_axis(world.mesh))
    now = jitted(packed, world.mesh, world.state).lower(*given).as_text()
    assert now == before.lower(*given).as_text()
    assert "trial" not in now


@pytest.mark.parametrize(("trial", "data"), [(8, 1), (4, 2)])
def test_trials_on_devices_of_their_own_are_the_trials_on_one(trial, data):
    spread, rows, _ = trained(trial, trial, data)
    one, expected, _ = trained(4)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_allclose(
                row[name][:4], other[name], rtol=1e-5, err_msg=name
            )
    (found, _), (wanted, _) = flatten(spread), flatten(one)
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        assert len(leaf.sharding.device_set) == 8, path
        a = plain(leaf)
        if path != "step":
            assert {s.data.shape[0] for s in leaf.addressable_shards} == {1}, path
            a = a[:4]
        # Sums of float32 in another order, divided by roots of small moments: of the
        # largest entry, 1e-5.
        b = plain(wanted[path])
        scale = float(np.abs(b.astype(np.float64)).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=path)
    assert plain(found["best_step"]).tolist()[:4] == [4, 2, 4, 2]
    assert plain(found["live"]).tolist()[:4] == [True, False, True, True]


def test_devices_with_trials_of_their_own_do_not_talk():
    _, _, text = trained(8, 8)
    assert COLLECTIVE.findall(text) == []
    frozen = {f"{toy.VOCAB},{toy.WIDTH}", f"{toy.WIDTH},{toy.HIDDEN}"}
    shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
    assert frozen <= shapes, "the base must be seen for the test to mean anything"
    assert not {f"{n},{shape}" for shape in frozen for n in (1, 8)} & shapes
    # The count is not blind: devices that share rows do talk, about sums over them.
    assert set(COLLECTIVE.findall(trained(4, 4, 2)[2])) == {"all-reduce"}


def test_a_pack_that_does_not_come_out_even_is_refused():
    mesh = MeshSpec(trial=4).build()
    check_trials(mesh, 8)
    check_trials(MeshSpec().build(), 5)
    with pytest.raises(BadInput, match=r"a pack of 6 .* the 4 devices"):
        check_trials(mesh, 6)
