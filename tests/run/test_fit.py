"""Training as a library: the same promises without a config or a command."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny_run import counting_compilations

from lowrank.core.errors import BadInput, Corrupt, Preempted
from lowrank.core.trees import fingerprint, flatten
from lowrank.data.pipeline import TrainPipeline
from lowrank.run.fit import fit
from lowrank.run.prepare import prepare
from lowrank.run.settings import read
from lowrank.sharding.mesh import MeshSpec
from lowrank.train.guard import NonFinitePolicy
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import AdamW
from lowrank.train.penalties import Penalties

pytestmark = pytest.mark.long

OPTIM = AdamW(lr=0.01, epochs=2)
LOOP = LoopSpec(log_every=1, checkpoint_every=4)


@pytest.fixture(scope="module")
def prepared(world):
    # One bucket: a pack has programs of its own, and they take long to compile.
    return prepare(read(world.config("data.batching.buckets=[16]")))


@pytest.fixture(scope="module")
def fitter(prepared):
    """Fits trials of these seeds; returns the pack and what it logged."""

    def fitted(*seeds, **more):
        batches = TrainPipeline(
            prepared.labeled.tokens["train"],
            prepared.labeled.task.splits["train"].labels,
            batching=prepared.settings.batching,
            trial_seeds=seeds,
            num_epochs=2,
        )
        rows = []
        options = {
            "optim": OPTIM,
            "validation": prepared.evaluation("validation"),
            "loop": LOOP,
            "log": lambda position, row: rows.append((position, list(row))),
            **more,
        }
        return fit(prepared.adapted, batches, seeds=seeds, **options), rows

    return fitted


@pytest.fixture(scope="module")
def plain(fitter):
    return fitter(0)


def losses(rows, trial=0):
    """Training losses by step."""
    return {p: r[trial]["train/loss"] for p, r in rows if "train/loss" in r[trial]}


def largest_difference(first, second):
    (a, _), (b, _) = flatten(first), flatten(second)
    assert a.keys() == b.keys()
    return max(
        float(np.abs(np.asarray(a[k]) - np.asarray(b[k])).max() / np.abs(b[k]).max())
        for k in a
    )


def test_nothing_is_kept_without_a_directory(fitter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, rows = fitter(0)
    assert int(found.state.step) == 16
    assert losses(rows)[16] < losses(rows)[1]
    assert list(tmp_path.iterdir()) == []
    batch = {"ids": np.full((16, 8), 5, np.int32), "mask": np.ones((16, 8), bool)}
    assert found.logits(batch).shape == (1, 16, 3)


def test_the_best_state_is_chosen_where_there_is_validation(fitter, plain):
    found, rows = plain
    name = "validation/accuracy"
    scored = {p: r[0][name] for p, r in rows if name in r[0]}
    assert int(found.state.best_step[0]) == max(scored, key=scored.__getitem__)
    assert found.validated
    alone, _ = fitter(0, validation=None)
    assert not alone.validated
    assert fingerprint(alone.trained()) == fingerprint(
        jax.tree.map(lambda x: x[0], alone.state.trained)
    )
    assert fingerprint(alone.state.trained) == fingerprint(found.state.trained)


@pytest.mark.slow
def test_two_seeds_in_one_pack_are_the_two_runs(fitter, plain):
    packed, rows = fitter(0, 1)
    singles = [plain, fitter(1)]
    for trial, (single, own) in enumerate(singles):
        mine = jax.tree.map(lambda x: x[trial], packed.state.trained)
        alone = jax.tree.map(lambda x: x[0], single.state.trained)
        assert largest_difference(mine, alone) < 1e-3
        for step, loss in losses(own).items():
            tolerance = 1e-5 if step <= 5 else 1e-3
            assert losses(rows, trial)[step] == pytest.approx(loss, rel=tolerance), step
    first, second = (packed.trained(trial) for trial in (0, 1))
    assert largest_difference(first, second) > 1e-2, (
        "the seeds differ, or it is no test"
    )


@pytest.mark.slow
def test_trials_of_a_pack_may_differ_in_their_constants(fitter, plain):
    optims = [OPTIM, AdamW(lr=0.001, epochs=2, weight_decay=0.1, b_ratio=2.0)]
    penalty = [Penalties(), Penalties(drift=0.1, frobenius=1e-3)]
    packed, rows = fitter(0, 0, optim=optims, penalty=penalty)
    assert losses(rows, 0) == pytest.approx(losses(plain[1]), rel=1e-3)
    assert losses(rows, 1)[10] > losses(rows, 0)[10]
    assert packed.state.constants["lr"].tolist() == pytest.approx([0.01, 0.001])
    assert packed.state.constants["drift"].tolist() == pytest.approx([0.0, 0.1])
    assert packed.state.constants["b_ratio"].tolist() == [1.0, 2.0]
    assert "b_ratio" not in plain[0].state.constants
    name = "train/penalty/frobenius"
    sizes = [[row[name] for row in one] for _, one in rows if name in one[0]][-1]
    assert sizes[0] > sizes[1] > 0


def test_several_devices_do_what_one_does(fitter, plain):
    spread, rows = fitter(0, mesh=MeshSpec(data=4))
    one = losses(plain[1])
    for step in range(1, 11):
        assert losses(rows)[step] == pytest.approx(one[step], rel=1e-5, abs=1e-6)
    assert largest_difference(spread.state.trained, plain[0].state.trained) < 1e-3
    devices = {d for x in jax.tree.leaves(spread.frozen) for d in x.devices()}
    assert len(devices) == 4


@pytest.mark.slow
def test_trials_on_devices_of_their_own_do_what_one_device_does(
    fitter, plain, tmp_path
):
    seeds, mesh = (0, 1), MeshSpec(trial=2, data=2)
    spread, rows = fitter(*seeds, mesh=mesh)
    one = losses(plain[1])
    for step in range(1, 11):
        assert losses(rows)[step] == pytest.approx(one[step], rel=1e-5, abs=1e-6)
    name = "validation/accuracy"
    scored = [
        [r[0][name] for _, r in told if name in r[0]] for told in (rows, plain[1])
    ]
    assert scored[0] == scored[1]
    for tree in ("trained", "best"):
        mine, alone = (
            jax.tree.map(lambda x: x[0], getattr(one.state, tree))
            for one in (spread, plain[0])
        )
        assert largest_difference(mine, alone) < 1e-3
    assert int(spread.state.best_step[0]) == int(plain[0].state.best_step[0])
    # Stopped, it goes on bit for bit; on other devices, as close as they compute.
    here, there = tmp_path / "here", tmp_path / "there"
    with pytest.raises(Preempted):
        fitter(
            *seeds, mesh=mesh, directory=here,
            loop=dataclasses.replace(LOOP, stop_after=7),
        )  # fmt: skip
    shutil.copytree(here, there)
    again, _ = fitter(*seeds, mesh=mesh, directory=here)
    assert fingerprint(again.state) == fingerprint(spread.state)
    moved, _ = fitter(*seeds, mesh=MeshSpec(), directory=there)
    assert largest_difference(moved.state.trained, spread.state.trained) < 1e-3


def test_micro_batches_add_up_to_the_batch(fitter, plain):
    parts, rows = fitter(0, optim=dataclasses.replace(OPTIM, accumulate=4))
    one = losses(plain[1])
    for step in range(1, 11):
        assert losses(rows)[step] == pytest.approx(one[step], rel=1e-5, abs=1e-6)
    assert largest_difference(parts.state.trained, plain[0].state.trained) < 1e-3


def test_a_directory_continues_bit_for_bit(fitter, plain, tmp_path):
    with pytest.raises(Preempted):
        fitter(0, directory=tmp_path, loop=dataclasses.replace(LOOP, stop_after=7))
    found, rows = fitter(0, directory=tmp_path)
    assert [position for position, _ in rows][0] == 8
    assert fingerprint(found.state.trained) == fingerprint(plain[0].state.trained)
    assert fingerprint(found.state.opt) == fingerprint(plain[0].state.opt)
    done = losses(rows)
    assert done == {step: loss for step, loss in losses(plain[1]).items() if step > 7}
    with counting_compilations() as compiled:
        again, rows = fitter(0, directory=tmp_path)
    assert rows == []
    assert again.pack is None
    assert not [name for name in compiled if "packed" in name]
    assert fingerprint(again.state.trained) == fingerprint(found.state.trained)


def test_a_directory_of_another_run_is_refused(fitter, prepared, tmp_path):
    with pytest.raises(Preempted):
        fitter(0, directory=tmp_path, loop=dataclasses.replace(LOOP, stop_after=2))
    for other in (
        {"optim": dataclasses.replace(OPTIM, lr=0.02)},
        {"optim": dataclasses.replace(OPTIM, b_ratio=2.0)},
        {"identity": {"note": "other"}},
    ):
        with pytest.raises(Corrupt, match="belongs to another run"):
            fitter(0, directory=tmp_path, **other)
    with pytest.raises(Corrupt):
        fitter(1, directory=tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"non_finite": NonFinitePolicy(action="rollback")}, "needs a directory"),
        ({"optim": [OPTIM, OPTIM]}, "1 trials have 2 settings"),
        ({"penalty": [Penalties()] * 2}, "1 trials have 2 sets of penalties"),
        ({"mesh": MeshSpec(data=3)}, "cannot be shared out"),
        ({"mesh": MeshSpec(trial=2)}, "a pack of 1 cannot be shared out to the 2"),
        ({"loop": LoopSpec(select="beauty")}, "'beauty' is not a number"),
        ({"optim": dataclasses.replace(OPTIM, accumulate=3)}, "accumulate = 3"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_compiling(fitter, options, said):
    with counting_compilations() as compiled, pytest.raises(BadInput, match=said):
        fitter(0, **options)
    assert not [name for name in compiled if "packed" in name]


def test_the_seeds_of_batches_and_trials_agree(prepared):
    with pytest.raises(BadInput, match=r"seeds \[0\] and the trials have \[5\]"):
        fit(prepared.adapted, prepared.batches, seeds=(5,))
    mixed = [OPTIM, dataclasses.replace(OPTIM, schedule="cosine")]
    batches = TrainPipeline(
        prepared.labeled.tokens["train"],
        prepared.labeled.task.splits["train"].labels,
        batching=prepared.settings.batching,
        trial_seeds=(0, 1),
        num_epochs=1,
    )
    with pytest.raises(BadInput, match="alike in schedule"):
        fit(prepared.adapted, batches, seeds=(0, 1), optim=mixed)
