"""Trials trained together leave what each would have left alone."""

import json

import numpy as np
import pytest
from tiny_run import metric_rows, predictions

from lowrank.core.errors import BadInput, Corrupt, NonFinite, Preempted
from lowrank.data.pipeline import TrainPipeline
from lowrank.run.packs import run_pack
from lowrank.run.settings import read
from lowrank.run.stored import load_run

pytestmark = pytest.mark.long

#: What sets the trials apart; the first has less of everything.
DIFFERENT = (
    ["delta.rank=2", "seed=3"],
    ["delta.rank=5", "seed=4", "delta.alpha=8", "delta.scaling=rsqrt",
     "delta.dropout=0.2", "delta.rank_dropout=0.3", "optim.lr=0.01",
     "optim.weight_decay=0.1", "penalty.frobenius=0.01"],
)  # fmt: skip


def trials(world, where, *common, differ=DIFFERENT):
    # One bucket, no test split, few steps: what differs is what is looked at.
    common = ("data.batching.buckets=[16]", *common)
    return [
        read(world.config(f"run.directory={where}/{n}", *common, *own))
        for n, own in enumerate(differ)
    ]


@pytest.fixture(scope="module")
def alone(world):
    """The trials run one by one."""
    where = world.runs / "alone"
    return where, [run_pack([one])[0].result for one in trials(world, where)]


@pytest.fixture(scope="module")
def together(world):
    where = world.runs / "together"
    return where, run_pack(trials(world, where), folder=where / "packs" / "one")


@pytest.mark.parametrize("trial", range(len(DIFFERENT)))
def test_a_trial_leaves_what_it_would_leave_alone(alone, together, trial):
    """float32 through all steps, and sums of another order: 1e-3 of each number."""
    (here, results), (there, outcomes) = alone, together
    want, got = results[trial], outcomes[trial].result
    for name in ("trial", "data", "steps", "best_step", "skipped_steps"):
        assert got[name] == want[name]
    names = ("trained_parameters", "padding_parameters", "adapter_bytes")
    assert [got["costs"][n] for n in names] == [want["costs"][n] for n in names]
    rows = (metric_rows(where / str(trial)) for where in (here, there))
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name != "summary":
                np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-5)
    for split in ("validation", "test"):
        one, other = (predictions(w / str(trial), split) for w in (here, there))
        np.testing.assert_allclose(other["logits"], one["logits"], atol=1e-3)
    runs = [load_run(where / str(trial)) for where in (here, there)]
    for path, factors in runs[0].trained.items():
        if isinstance(factors, dict):
            for name, factor in factors.items():
                assert runs[1].trained[path][name].shape == factor.shape
    files = [
        {str(p.relative_to(where / str(trial))) for p in (where / str(trial)).rglob("*")
         if p.is_file() and "checkpoints" not in p.parts}
        for where in (here, there)
    ]  # fmt: skip
    assert files[0] == files[1]


def test_a_pack_is_continued_by_its_own_trials_in_their_order(world, together):
    where, _ = together
    others = trials(world, world.runs / "reversed")[::-1]
    with pytest.raises(Corrupt, match="config"):
        run_pack(others, folder=where / "packs" / "one")


def test_finished_trials_are_not_run_again(world, together):
    where, outcomes = together
    again = run_pack(trials(world, where), folder=where / "packs" / "one")
    assert [one.result for one in again] == [
        json.loads(json.dumps(one.result)) for one in outcomes
    ]


def test_a_stopped_pack_is_continued_bit_for_bit(world, together):
    _, outcomes = together
    where = world.runs / "stopped"
    folder = where / "packs" / "one"
    with pytest.raises(Preempted):
        run_pack(trials(world, where, "loop.stop_after=7"), folder=folder)
    states = {json.loads(p.read_text())["status"] for p in where.glob("*/status.json")}
    assert states == {"preempted"}
    found = run_pack(trials(world, where), folder=folder)
    for one, whole in zip(found, outcomes, strict=True):
        assert one.result["state"] == whole.result["state"]
        assert one.result["scores"] == whole.result["scores"]


def test_a_trial_that_fails_or_stops_harms_no_other(world, alone, monkeypatch):
    here, results = alone
    real = TrainPipeline.batch_at

    def poisoned(self, step):
        batch = real(self, step)
        if step == 5 and len(batch["ids"]) > 1:
            batch = {**batch, "weight": batch["weight"].copy()}
            batch["weight"][1, 0] = np.nan
        return batch

    monkeypatch.setattr(TrainPipeline, "batch_at", poisoned)
    where = world.runs / "poisoned"
    good, bad = run_pack(trials(world, where), folder=where / "packs" / "one")
    assert isinstance(bad.error, NonFinite)
    assert "step 5" in str(bad.error)
    status = json.loads((where / "1" / "status.json").read_text())
    assert (status["status"], "step 5" in status["reason"]) == ("failed", True)
    assert not (where / "1" / "result.json").exists()
    assert good.result["steps"] == results[0]["steps"]
    one, other = (predictions(w / "0", "test") for w in (here, where))
    np.testing.assert_allclose(other["logits"], one["logits"], atol=1e-3)


def test_what_cannot_share_a_program_is_refused(world, tmp_path):
    odd = [["seed=1"], ["seed=2", "delta.targets='**/query/kernel'"]]
    with pytest.raises(BadInput, match="cannot share a program"):
        run_pack(trials(world, tmp_path, differ=odd), folder=tmp_path / "pack")
    with pytest.raises(BadInput, match="needs a folder"):
        run_pack(trials(world, tmp_path))
    assert not list(tmp_path.iterdir())
