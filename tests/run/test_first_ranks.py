"""Ranks chosen before the first step: of what, by whom, and once."""

import importlib

import jax
import numpy as np
import pytest
from test_first_look import batch, make, moments_by_hand
from tiny_run import counting_compilations

from lowrank.allocate.adaptive import Adaptive
from lowrank.allocate.fixed import Uniform
from lowrank.allocate.recipes import EVA
from lowrank.core.errors import BadInput, Preempted
from lowrank.core.trees import fingerprint
from lowrank.data.pipeline import TrainPipeline
from lowrank.run.first_look import first_look
from lowrank.run.fit import fit
from lowrank.run.forward import inputs_of, on_inputs
from lowrank.run.prepare import prepare
from lowrank.run.ranks import gauges, rank_events, slots_of
from lowrank.run.settings import read
from lowrank.sharding.mesh import MeshSpec
from lowrank.train import state as states
from lowrank.train.loop import LoopSpec
from lowrank.train.losses import cross_entropy
from lowrank.train.optim import AdamW

pytestmark = pytest.mark.long

STEPS, SEEN = 5, 3


class Few:
    """Batches of trials whose data differ."""

    num_steps = STEPS

    def __init__(self, seeds):
        self.seeds = seeds

    def of(self, trial, step):
        return batch(100 * self.seeds[trial] + step)

    def iterate(self, start_step=0):
        for step in range(start_step, self.num_steps):
            rows = [self.of(trial, step) for trial in range(len(self.seeds))]
            yield step, {n: np.stack([one[n] for one in rows]) for n in rows[0]}


class Looked:
    """A pack after its first look."""

    def __init__(self, *allocators):
        self.params, self.adapted = make(max_rank=4)
        count = len(allocators)
        self.batches = Few(range(count))
        self.slots = slots_of(self.adapted)
        model = on_inputs(self.adapted.apply, inputs_of)
        self.events = rank_events(
            self.adapted, allocators, [self.slots] * count, STEPS,
            gauges(model, cross_entropy),
        )  # fmt: skip
        dials = self.events.opened([self.adapted.dials()] * count)
        self.before = states.start(
            self.adapted.init_trained, dials, [AdamW()] * count, range(count),
            roles=self.adapted.roles(), ranks=self.events.begin,
        )  # fmt: skip
        self.state = first_look(
            self.adapted, allocators, self.events, self.before, self.adapted.frozen(),
            self.batches, cross_entropy, inputs_of,
        )  # fmt: skip

    def moments(self, trial):
        seen = [self.batches.of(trial, step) for step in range(SEEN)]
        return moments_by_hand(self.params, seen)

    def shares(self, trial):
        """Shares of variance of all components, as they stand in the vector."""
        found = []
        for path in self.slots.paths:
            values = np.linalg.eigvalsh(self.moments(trial)[path])[..., ::-1]
            found.append((values / values.sum(-1, keepdims=True))[:, :4].reshape(-1))
        return np.concatenate(found)

    def gates(self, state, trial):
        gates = {p: state.dials[p]["gate"][trial] for p in self.slots.paths}
        return np.asarray(self.slots.flat(gates))


@pytest.fixture(scope="module")
def looked():
    fields = {"first_batches": SEEN}
    return Looked(EVA(**fields), EVA(directions=False, budget=9, **fields), Uniform())


def test_it_goes_by_the_variance_of_each_trials_inputs(looked):
    for trial in range(2):
        seen = looked.state.ranks["memory"]["importance"]["value"]
        flat = looked.slots.flat({p: x[trial] for p, x in seen.items()})
        np.testing.assert_allclose(flat, looked.shares(trial), rtol=1e-4, atol=1e-6)
    assert not np.allclose(looked.shares(0), looked.shares(1), rtol=1e-2)


def test_the_budget_goes_to_the_best_directions_of_all_layers(looked):
    after = jax.jit(looked.events.before)(looked.state)
    for trial, budget in ((0, 2 * looked.slots.num_layers), (1, 9)):
        shares, gates = looked.shares(trial), np.zeros(looked.slots.num_components)
        gates[np.argsort(-shares, kind="stable")[:budget]] = 1
        np.testing.assert_array_equal(looked.gates(after, trial), gates)
    np.testing.assert_array_equal(
        looked.gates(after, 2), looked.gates(looked.before, 2)
    )


def test_the_factor_along_the_inputs_starts_as_the_directions(looked):
    for path, moments in looked.moments(0).items():
        name = looked.adapted.recipe(path).linear["in"]
        rows = np.asarray(looked.state.trained[path][name][0], np.float64)
        rows = rows.reshape(len(moments), 4, -1)
        for own, gram in zip(rows, moments, strict=True):
            np.testing.assert_allclose(own @ own.T, np.eye(4), atol=1e-5)
            values = np.linalg.eigvalsh(gram)[::-1][:4]
            np.testing.assert_allclose(
                own @ gram @ own.T, np.diag(values), atol=1e-4 * values[0]
            )
    for trial in (1, 2):
        one = lambda tree, t=trial: jax.tree.map(lambda x: x[t], tree)
        assert fingerprint(one(looked.state.trained)) == fingerprint(
            one(looked.before.trained)
        )


def test_the_model_says_at_first_what_the_base_does(looked):
    one = lambda tree: jax.tree.map(lambda x: x[0], tree)
    after = one(looked.state.trained)
    given = inputs_of(batch(5))
    says = looked.adapted.apply(
        looked.adapted.frozen(), after, given, dials=one(looked.state.dials)
    )
    base = looked.adapted.base_apply({**looked.params, "head": after["head"]}, given)
    np.testing.assert_allclose(says, base, rtol=1e-6, atol=1e-6)


def test_a_loss_that_depends_on_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(
        Few, "of", lambda self, trial, step: {**batch(step), "weight": np.zeros(6, "f")}
    )
    with pytest.raises(BadInput, match="zero everywhere"):
        Looked(EVA(first_batches=SEEN))


ONCE = {
    "eva": EVA(first_batches=2),
    "first_gradient": Adaptive(
        importance="first_gradient", begin=0, end=0, schedule="linear", rho=2.0,
        first_batches=2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=ONCE)
def run(request, world):
    prepared = prepare(read(world.config("data.batching.buckets=[16]", "ranks=eva")))

    def fitted(*seeds, **more):
        batches = TrainPipeline(
            prepared.labeled.tokens["train"],
            prepared.labeled.task.splits["train"].labels,
            batching=prepared.settings.batching,
            trial_seeds=seeds,
            num_epochs=2,
        )
        options = {
            "optim": AdamW(lr=0.01, epochs=2),
            "loop": LoopSpec(log_every=1, checkpoint_every=4),
            "ranks": ONCE[request.param],
            **more,
        }
        return fit(prepared.adapted, batches, seeds=seeds, **options)

    with counting_compilations() as compiled:
        plain = fitted(0)
    return prepared, fitted, plain, compiled


def gates(fitted, trial=0):
    return {path: np.asarray(own["gate"]) for path, own in fitted.dials(trial).items()}


def test_ranks_are_final_before_the_first_step(run):
    prepared, _, plain, compiled = run
    ranks = plain.state.ranks["history"]["ranks"][0]
    assert ranks.shape[0] == 1
    assert int(ranks.sum()) == sum(prepared.adapted.ranks.values())
    opened = {path: gate.sum(-1) for path, gate in gates(plain).items()}
    assert len({int(n) for own in opened.values() for n in np.ravel(own)}) > 1
    assert len([name for name in compiled if "packed" in name]) == 1


def test_what_was_seen_is_kept_when_a_run_goes_on(run, tmp_path, monkeypatch):
    _, fitted, plain, _ = run
    loop = LoopSpec(log_every=1, checkpoint_every=4, stop_after=6)
    with pytest.raises(Preempted):
        fitted(0, directory=tmp_path, loop=loop)
    monkeypatch.setattr(importlib.import_module("lowrank.run.fit"), "first_look", None)
    found = fitted(0, directory=tmp_path)
    assert fingerprint(found.state) == fingerprint(plain.state)


def test_a_trial_in_a_pack_chooses_what_it_does_alone(run):
    _, fitted, plain, _ = run
    packed = fitted(3, 0)
    jax.tree.map(np.testing.assert_array_equal, gates(packed, 1), gates(plain))


def test_eight_devices_see_what_one_does(run):
    _, fitted, plain, _ = run
    spread = fitted(0, mesh=MeshSpec(data=8))
    jax.tree.map(np.testing.assert_array_equal, gates(spread), gates(plain))
