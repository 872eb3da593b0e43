"""Split over eight devices, a run is the run on one: its losses, factors and ranks."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_language import talking_run
from tiny_run import composed

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.allocate.recipes import Norm
from lowrank.core.errors import BadInput, Preempted
from lowrank.core.trees import flatten
from lowrank.deltas.lora import LoRA
from lowrank.run.fit import fit
from lowrank.run.placing import place
from lowrank.run.prepare import prepare
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial
from lowrank.sharding.mesh import MeshSpec, put
from lowrank.train.batches import shape_of
from lowrank.train.loop import LoopSpec
from lowrank.train.losses import squared_error
from lowrank.train.optim import AdamW

pytestmark = pytest.mark.long

STEPS = 10
MESHES = {
    "data 8": MeshSpec(data=8, small=0),
    "fsdp 2 x tensor 4": MeshSpec(fsdp=2, tensor=4, small=0),
    "data 2 x fsdp 2 x tensor 2": MeshSpec(data=2, fsdp=2, tensor=2, small=0),
}
LOOP = LoopSpec(log_every=1, checkpoint_every=4)
WINDOW = {"begin": 1, "end": 8, "every": 3, "measure_every": 2}


class Given:
    """Batches that are there, each once, alike for every trial or not."""

    steps_per_epoch = num_steps = STEPS

    def __init__(self, batches, seeds):
        self._seeds = list(seeds)
        self._batches = [
            {name: np.stack([x] * len(self._seeds)) for name, x in one.items()}
            for one in batches
        ]

    def iterate(self, start_step=0):
        yield from list(enumerate(self._batches))[start_step:]

    def shapes(self):
        return [shape_of(one) for one in self.examples()]

    def examples(self):
        return self._batches[:1]

    def state(self, step):
        return {"trial_seeds": self._seeds, "step": step}

    def check_state(self, state):
        assert state["trial_seeds"] == self._seeds


@dataclasses.dataclass
class Job:
    """A model and its batches."""

    adapted: object
    partition: object
    batches: list
    options: dict

    def fit(self, mesh=MeshSpec(), seeds=(0,), **more):
        rows = []
        options = {
            # No entry is moved by the noise of its gradient alone.
            "optim": AdamW(lr=0.01, warmup=0.0, eps=1e-5),
            "loop": LOOP,
            "log": lambda position, row: rows.append([one for one in row]),
            **self.options,
            **more,
        }
        found = fit(
            self.adapted, Given(self.batches, seeds), seeds=seeds, mesh=mesh,
            partition=self.partition, progress=False, **options,
        )  # fmt: skip
        return found, [[one["train/loss"] for one in row] for row in rows]


#: Of a small run of an encoder.
ENCODER = ("data.batching.buckets=[16]", "data.batching.batch_size=16", "ranks=norm")


def first_ten(prepared):
    """The first batches of a problem, of one trial, as many as there are, and again."""
    found = [
        {name: x[0] for name, x in batch.items()}
        for _, batch in prepared.problem.batches([0]).iterate()
    ]
    return [found[n % len(found)] for n in range(STEPS)]


def of_problem(prepared):
    problem = prepared.problem
    options = {"loss": problem.loss, "judge": problem.judge, "inputs": problem.inputs}
    return Job(prepared.adapted, problem.base.partition, first_ten(prepared), options)


@pytest.fixture(scope="module")
def encoder(world):
    return of_problem(prepare(read(world.config(*ENCODER))))


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """Arguments of a small run of a language model."""
    return talking_run(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def decoder(talking):
    return of_problem(prepare(read(composed("config", *talking, "ranks=norm"))))


def plain_job(widen=lambda tree: tree, apply=None):
    """A function that nobody here wrote, split by patterns."""
    keys = jax.random.split(jax.random.key(3), 3)
    params = {
        "in": jax.random.normal(keys[0], (8, 16)) / 3,
        "layers": {"w": jax.random.normal(keys[1], (3, 16, 16)) / 4},
        "out": jax.random.normal(keys[2], (16, 4)) / 4,
    }

    def plain(params, batch):
        x = jnp.tanh(batch["x"] @ params["in"])
        body = lambda x, w: (x + jnp.tanh(x @ w), None)
        return jax.lax.scan(body, x, params["layers"]["w"])[0] @ params["out"]

    rng = np.random.default_rng(0)
    batches = [
        {
            "x": rng.normal(size=(16, 8)).astype(np.float32),
            "y": rng.normal(size=(16, 4)).astype(np.float32),
            "weight": np.ones(16, np.float32),
        }
        for _ in range(STEPS)
    ]
    batches, params = widen(batches), widen(params)
    example = {"x": batches[0]["x"]}
    rules = [Rule("layers/w", LoRA(), 3, 6)]
    adapted = attach(apply or plain, params, example, rules=rules)
    rules = (("in", (None, "tensor")), ("layers/w", ("tensor", "fsdp")))
    options = {"loss": squared_error, "inputs": lambda batch: {"x": batch["x"]}}
    return Job(adapted, rules, batches, options)


@pytest.fixture(scope="module")
def plain():
    return plain_job()


@pytest.fixture(scope="module")
def alone(encoder, decoder, plain):
    """What one device does."""
    jobs = {"encoder": encoder, "decoder": decoder, "plain": plain}
    return {name: (job, *job.fit()) for name, job in jobs.items()}


def check_alike(found, wanted, losses, expected):
    assert len(expected) == STEPS
    assert expected[-1][0] < expected[0][0], "nothing is learned: no test"
    # Sums of float32 in another order: relative 1e-5 of a loss, and of factors after
    # ten steps of Adam, which divides by roots of small moments, 1e-3 of the largest.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    (a, _), (b, _) = flatten(found.state.trained), flatten(wanted.state.trained)
    assert a.keys() == b.keys()
    for path in a:
        scale = float(np.abs(b[path]).max())
        np.testing.assert_allclose(
            a[path], b[path], rtol=0, atol=1e-3 * scale, err_msg=path
        )


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("family", ["encoder", "decoder", "plain"])
def test_eight_devices_do_what_one_does(alone, family, mesh):
    job, wanted, expected = alone[family]
    found, losses = job.fit(mesh)
    check_alike(found, wanted, losses, expected)
    cut = [
        path
        for path, leaf in found.frozen.items()
        if leaf.addressable_shards[0].data.shape != leaf.shape
    ]
    assert bool(cut) == (mesh.data < 8)


@pytest.mark.parametrize("family", ["encoder", "decoder", "plain"])
def test_trials_have_devices_of_their_own_and_share_them_out_again(alone, family):
    job, *_ = alone[family]
    mesh, seeds = MeshSpec(trial=2, fsdp=2, tensor=2, small=0), (0, 1)
    wanted, expected = job.fit(seeds=seeds)
    found, losses = job.fit(mesh, seeds)
    check_alike(found, wanted, losses, expected)
    assert expected[0][0] != expected[0][1] or expected[-1][0] != expected[-1][1]


def explicit(params, batch):
    """The function of `plain_job`, which says itself where everything lies."""
    rows = ("fsdp", "data")

    def inside(params, x):
        at = lambda spec: {"out_sharding": P(rows, spec)}
        x = jnp.tanh(jnp.matmul(x, params["in"], **at("tensor")))

        def body(x, w):
            w = jax.sharding.reshard(w, P("tensor", None))
            y = jnp.tanh(jnp.matmul(x, w, **at(None)))
            return x + jax.sharding.reshard(y, P(rows, "tensor")), None

        x, _ = jax.lax.scan(body, x, params["layers"]["w"])
        return jnp.matmul(x, params["out"], **at(None))

    weights = {
        "in": P(None, "tensor"),
        "layers": {"w": P(None, "tensor", "fsdp")},
        "out": P("tensor"),
    }
    own = jax.sharding.explicit_axes(inside, in_sharding=(weights, P(rows)))
    return own(params, batch["x"])


def test_a_function_may_be_explicit_about_the_mesh(plain):
    mesh, seeds = MESHES["data 2 x fsdp 2 x tensor 2"], (0, 1)
    own = {"ranks": Norm(**WINDOW)}
    wanted, expected = plain.fit(seeds=seeds, **own)
    with jax.set_mesh(mesh.build()):
        found, losses = plain_job(apply=explicit).fit(mesh, seeds, **own)
        logits = found.logits(plain.batches[0])
    check_alike(found, wanted, losses, expected)
    np.testing.assert_allclose(logits, wanted.logits(plain.batches[0]), atol=1e-5)
    for path, dials in wanted.dials().items():
        np.testing.assert_array_equal(found.dials()[path]["gate"], dials["gate"])


def test_weights_factors_and_moments_lie_in_parts(encoder):
    found, _ = encoder.fit(MESHES["fsdp 2 x tensor 4"])
    path = "encoder/layer/attention/query/kernel"
    parts = lambda leaf: {shard.data.shape for shard in leaf.addressable_shards}
    whole = found.frozen[path].shape
    assert parts(found.frozen[path]) == {(whole[0], whole[1] // 2, whole[2] // 4)}
    a, b = (found.state.trained[path][name] for name in "ab")
    assert parts(a) == {(*a.shape[:-1], a.shape[-1] // 2)}
    assert parts(b) == {(*b.shape[:-1], b.shape[-1] // 4)}
    moments = [
        leaf
        for name, leaf in flatten(found.state.opt)[0].items()
        if name.endswith(f"{path}/b")
    ]
    assert len(moments) == 2
    assert all(parts(leaf) == parts(b) for leaf in moments)


def test_every_device_computes_its_own_rows(encoder):
    found, _ = encoder.fit(MeshSpec(fsdp=8, small=0))
    (compiled,) = found.pack.compiled.values()
    shapes = set(re.findall(r"f32\[(\d+),16,24\]", compiled.as_text()))
    assert "2" in shapes
    assert "16" not in shapes, "activations of all rows are on every device"


@pytest.mark.parametrize("family", ["encoder", "decoder", "plain"])
@pytest.mark.parametrize("mesh", list(MESHES.values())[1:], ids=list(MESHES)[1:])
def test_ranks_that_move_are_chosen_alike(alone, family, mesh):
    job, ranks = alone[family][0], Norm(**WINDOW)
    wanted, _ = job.fit(ranks=ranks)
    found, _ = job.fit(mesh, ranks=ranks)
    for path, dials in wanted.dials().items():
        np.testing.assert_array_equal(found.dials()[path]["gate"], dials["gate"])
    history = [one.state.ranks["history"]["ranks"] for one in (found, wanted)]
    np.testing.assert_array_equal(*history)
    assert len(np.unique(np.asarray(history[0]))) > 1


def test_a_run_goes_on_with_another_mesh(encoder, alone, tmp_path):
    _, wanted, expected = alone["encoder"]
    with pytest.raises(Preempted):
        encoder.fit(
            MESHES["data 2 x fsdp 2 x tensor 2"], directory=tmp_path,
            loop=dataclasses.replace(LOOP, stop_after=6),
        )  # fmt: skip
    found, losses = encoder.fit(MESHES["fsdp 2 x tensor 4"], directory=tmp_path)
    assert len(losses) == STEPS - 6
    check_alike(found, wanted, [*expected[:6], *losses], expected)


SPLIT = ("mesh.fsdp=2", "mesh.tensor=4", "mesh.small=0")


def close(found, wanted, names):
    for split in ("validation", "test"):
        for name in names:
            one, other = (
                result["scores"][split]["metrics"][name]["estimate"]
                for result in (found, wanted)
            )
            assert one == pytest.approx(other, rel=1e-3), (split, name)


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_weights_come_to_their_devices_as_they_are_read(world, talking, family):
    """And lie whole nowhere, as one chip could not hold them."""
    asked = ("mesh.fsdp=2", "mesh.tensor=4", "mesh.small=0", "evaluate.batch_size=8")
    config = world.config if family == "encoder" else composed
    given = () if family == "encoder" else ("config", *talking)
    prepared = prepare(read(config(*given, *asked)))
    spec, base = prepared.settings.mesh, prepared.problem.base
    wanted = place(prepared.adapted, spec, rules=base.partition).frozen
    frozen = prepared.adapted.frozen()
    split = [path for path, leaf in frozen.items() if not leaf.is_fully_replicated]
    assert len(split) > len(frozen) / 3
    for path, leaf in frozen.items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
    # Training then brings nothing anywhere.
    placed = put(frozen, wanted)
    pointers = lambda leaf: [
        shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards
    ]
    assert all(pointers(placed[path]) == pointers(frozen[path]) for path in split)
    alone = prepare(read(config(*given))).adapted.frozen()
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, alone[path])


def test_a_whole_run_is_judged_shipped_and_opened_alike(world):
    own = ("evaluate.latency=true", "data.batching.buckets=[16]")
    wanted, found = (
        run_trial(world.config(f"run.directory={world.runs / name}", *own, *more))
        for name, more in (("on one", ()), ("on eight", SPLIT))
    )
    assert found["trial"] == wanted["trial"], "the mesh is no part of what a trial is"
    close(found, wanted, ["accuracy", "log_loss"])
    assert set(found["costs"]["inference"]) == set(wanted["costs"]["inference"])
    text = "cat word1 word2"
    runs = [load_run(world.runs / name) for name in ("on one", "on eight")]
    ours, theirs = (predict(run, [text])[0] for run in runs)
    assert ours["label"] == theirs["label"]


def test_a_language_model_is_judged_and_speaks_alike(talking, tmp_path):
    wanted, found = (
        run_trial(
            composed("config", *talking, f"run.directory={tmp_path / name}", *own)
        )
        for name, own in (("one", ()), ("eight", SPLIT))
    )
    close(found, wanted, ["loss"])
    said = [
        np.load(tmp_path / name / "predictions" / "test.npz")
        for name in ("one", "eight")
    ]
    assert said[0].files == said[1].files


def test_rows_that_a_mesh_cannot_share_out_are_refused_before_compiling(encoder):
    with pytest.raises(BadInput, match=r"16 cannot be shared out to the 3 devices"):
        encoder.fit(MeshSpec(fsdp=3, small=0))
