"""Trials taken out of their packs end as they would have, together from the start."""

import numpy as np
import pytest
import toy

from lowrank.adapt.rules import Rule, Train
from lowrank.adapt.variants import pack
from lowrank.core.errors import BadInput, Corrupt
from lowrank.core.trees import flatten
from lowrank.data.buckets import Batching
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.data.tokens import Tokens
from lowrank.deltas.lora import LoRA
from lowrank.io.checkpoints import Checkpoints
from lowrank.io.integrity import on_host
from lowrank.run.fit import fit
from lowrank.run.storage import Source, Storage
from lowrank.track.jsonl import JsonlTracker
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import AdamW
from lowrank.train.penalties import Penalties

pytestmark = pytest.mark.long

STEPS, RUNG = 8, 4
BATCHING = Batching(batch_size=8, buckets=(8,))
LOOP = LoopSpec(evaluate_every=2, log_every=1)
#: (rank, dropout, seed, rate, penalty): each has something that not all others have.
TRIALS = (
    (2, 0.0, 7, 0.1, Penalties()),
    (5, 0.3, 8, 0.05, Penalties()),
    (3, 0.0, 7, 0.2, Penalties(frobenius=0.1)),
)


def rows(seed, count):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, toy.VOCAB, count * 6).astype(np.int32)
    offsets = np.arange(0, 6 * count + 1, 6)
    labels = rng.integers(0, toy.CLASSES, count).astype(np.int32)
    return Tokens(ids, offsets, 6, 0, 0, 0, f"made from {seed}"), labels


class World:
    """Fits some of the trials as one pack, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.adapted = toy.make()

    def fit(self, trials, name, until=None, sources=(), steps=STEPS):
        own = [TRIALS[trial] for trial in trials]
        rules = [
            [Train("head", init="dense"), Rule("up", LoRA(dropout=drop), rank=rank)]
            for rank, drop, *_ in own
        ]
        variants = pack(self.adapted, rules, [None] * len(own))
        seeds = [seed for _, _, seed, *_ in own]
        tokens, labels = rows(0, 64)
        batches = TrainPipeline(
            tokens, labels, batching=BATCHING, trial_seeds=seeds, num_steps=steps
        )
        files = [JsonlTracker(self.folder / f"{name}-{trial}") for trial in trials]
        storage = Storage(self.checkpoints(name), files, sources)
        return fit(
            variants.together,
            batches,
            validation=list(eval_batches(*rows(1, 16), BATCHING)),
            optim=[AdamW(lr=rate, warmup=0.2) for *_, rate, _ in own],
            penalty=[penalty for *_, penalty in own],
            seeds=seeds,
            dials=variants.dials(),
            loop=LOOP,
            until=until,
            storage=storage,
            progress=False,
        )

    def checkpoints(self, name):
        return Checkpoints(self.folder / name, identity={})

    def source(self, name, row, step=RUNG):
        return Source(self.checkpoints(name), step, row)


@pytest.fixture(scope="module")
def world(tmp_path_factory, compiled):
    """Two packs that wait at the rung: one has room for rank 5, one for rank 3."""
    world = World(tmp_path_factory.mktemp("packs"))
    assert world.fit([0, 1], "a", RUNG).paused == RUNG
    assert world.fit([2], "b", RUNG).paused == RUNG
    return world


def leaves(state):
    return {name: on_host(leaf) for name, leaf in flatten(state)[0].items()}


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param((2, 0), id="narrower", marks=pytest.mark.slow),
        pytest.param((1, 2), id="wider"),
    ],
)
def test_the_state_is_that_of_a_pack_from_the_start(world, kept):
    """Moments, best states, closed components and keys included.

    float32 through 8 steps in packs of other widths: 1e-5 of each number's scale.
    """
    name = f"together {kept}"
    whole = leaves(world.fit(kept, name).state)
    places = {0: ("a", 0), 1: ("a", 1), 2: ("b", 0)}
    sources = [world.source(*places[trial]) for trial in kept]
    for trial in kept:
        text = (world.folder / f"{places[trial][0]}-{trial}").read_bytes()
        (world.folder / f"gathered {kept}-{trial}").write_bytes(text)
    fitted = world.fit(kept, f"gathered {kept}", sources=sources)
    found = leaves(fitted.state)
    assert fitted.paused is None
    head = whole["trained/head"]
    assert np.abs(head[0] - head[1]).max() > 1e-2, "or nobody would tell them apart"
    assert found.keys() == whole.keys()
    for path, leaf in whole.items():
        assert found[path].shape == leaf.shape
        np.testing.assert_allclose(
            found[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path
        )


def test_a_pack_that_paused_goes_on_bit_for_bit(world):
    whole = leaves(world.fit([0, 1], "undisturbed").state)
    world.fit([0, 1], "paused", RUNG)
    again = world.fit([0, 1], "paused", RUNG)
    assert (again.paused, again.pack) == (RUNG, None), "nothing is trained or compiled"
    found = leaves(world.fit([0, 1], "paused").state)
    for path, leaf in whole.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_what_does_not_belong_together_is_not_joined(world):
    with pytest.raises(Corrupt, match="trial_seeds"):
        world.fit([0], "odd seed", sources=[world.source("a", 1)])
    with pytest.raises(Corrupt, match=r"have taken|had taken"):
        world.fit([1, 2], "odd steps", sources=[
            world.source("a", 1), world.source("b", 0, step=2)
        ])  # fmt: skip
    with pytest.raises(Corrupt, match="cannot be read"):
        world.fit([0], "no such step", sources=[world.source("a", 0, step=3)])


@pytest.mark.parametrize("step", [3, 8, 9])
def test_a_pause_that_is_no_validation_is_refused(world, step):
    with pytest.raises(BadInput, match=f"step {step} of 8 has none"):
        world.fit([0], "odd pause", step)
