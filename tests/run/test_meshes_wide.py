"""In float64 a split step is that of one device to eight digits: no term is lost."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_meshes import ENCODER, MESHES, STEPS, WINDOW, Job, first_ten, plain_job
from tiny_language import talking_run
from tiny_run import composed

from lowrank.allocate.recipes import Norm
from lowrank.core.trees import flatten
from lowrank.run.prepare import adapt, prepare
from lowrank.run.settings import read
from lowrank.sharding.mesh import MeshSpec, put
from lowrank.train.optim import AdamW

pytestmark = pytest.mark.long

TRIALS = MeshSpec(trial=2, fsdp=2, tensor=2, small=0)


def widen(tree):
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(np.float64) if floats(x) else x, tree)


@pytest.fixture(scope="module", autouse=True)
def wide():
    """Everything is computed in float64, whatever it is stored in."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        # What a run begins with: its base, its factors, and their moments.
        fitting = importlib.import_module("lowrank.run.fit")
        patch.setattr(fitting, "put", lambda tree, where: put(widen(tree), where))
        yield


def of_settings(settings):
    prepared = prepare(settings)
    problem = prepared.problem
    base = dataclasses.replace(problem.base, params=widen(problem.base.params))
    batches = first_ten(prepared)
    example = problem.inputs(batches[0])
    (adapted,) = adapt(base, [settings], example).alone
    options = {"loss": problem.loss, "judge": problem.judge, "inputs": problem.inputs}
    return Job(adapted, base.partition, batches, options)


@pytest.fixture(scope="module")
def jobs(wide, world, tmp_path_factory):
    with jax.enable_x64(False):  # Files hold float32.
        talking = talking_run(tmp_path_factory.mktemp("decoder"))
    exact = "base.dtype=float64"
    return {
        "encoder": of_settings(read(world.config(*ENCODER, exact))),
        "decoder": of_settings(read(composed("config", *talking, exact))),
        "plain": plain_job(widen),
    }


@pytest.fixture(scope="module")
def alone(jobs):
    """What one device does, of one trial and of two."""
    found = {name: trained(job) for name, job in jobs.items()}
    return found | {"two": trained(jobs["encoder"], seeds=(0, 1))}


def trained(job, mesh=MeshSpec(), **more):
    # No entry is moved by the noise of its gradient alone.
    found, losses = job.fit(mesh, optim=AdamW(lr=0.01, warmup=0.0, eps=1e-5), **more)
    return found, np.array(losses)


def far(found, wanted):
    """The largest relative distance of losses and factors."""
    (ours, losses), (theirs, expected) = found, wanted
    assert len(expected) == STEPS
    assert losses.dtype == np.float64
    distance = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
    (a, _), (b, _) = flatten(ours.state.trained), flatten(theirs.state.trained)
    assert a.keys() == b.keys()
    assert all(leaf.dtype == np.float64 for leaf in b.values())
    own = [distance(np.asarray(a[path]), np.asarray(b[path])) for path in b]
    return max([distance(losses, expected), *own])


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("family", ["encoder", "decoder", "plain"])
def test_eight_devices_do_what_one_does(jobs, alone, family, mesh):
    assert far(trained(jobs[family], mesh), alone[family]) <= 1e-8


def test_trials_with_devices_of_their_own_do_so(jobs, alone):
    assert far(trained(jobs["encoder"], TRIALS, seeds=(0, 1)), alone["two"]) <= 1e-8


def test_ranks_that_move_do_so(jobs):
    ranks = {"ranks": Norm(**WINDOW)}
    wanted = trained(jobs["encoder"], **ranks)
    found = trained(jobs["encoder"], MESHES["data 2 x fsdp 2 x tensor 2"], **ranks)
    assert far(found, wanted) <= 1e-8
    one, other = (fit.state.ranks["history"]["ranks"] for fit, _ in (found, wanted))
    np.testing.assert_array_equal(one, other)
