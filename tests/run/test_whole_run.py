"""A complete run leaves its whole record, once, and it can be opened again."""

import json
import re

import jax
import numpy as np
import pytest
import yaml
from tiny_run import (
    composed,
    counting_compilations,
    estimates,
    metric_rows,
    predictions,
    same_outcome,
)

from lowrank.core.errors import Corrupt, NonFinite
from lowrank.io.view import load_record
from lowrank.run.judge import evaluate_run
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial
from lowrank.sweeps.load import best_row, load_sweep

SLOW = pytest.mark.slow


def test_the_record_is_whole(finished):
    directory, result = finished
    for name in (
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "config.yaml",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "sites.json",
        "costs.json",
        "ranks.npz",
        "predictions/validation.npz",
        "predictions/test.npz",
        "trained.safetensors",
        "result.json",
    ):
        assert (directory / name).is_file(), name
    assert list(directory.glob("checkpoints/*/integrity"))
    status = json.loads((directory / "status.json").read_text())
    assert status["status"] == "done"
    assert json.loads((directory / "result.json").read_text()) == json.loads(
        json.dumps(result)
    )
    last = (directory / "result.json").stat().st_mtime_ns
    others = [p for p in directory.rglob("*") if p.is_file()]
    after = {p.name for p in others if p.stat().st_mtime_ns > last}
    # Whoever looks whether it is finished takes the lock.
    assert after <= {"status.json", ".lock"}, "written after the result"


def test_hydra_files_hold_what_was_asked_for_without_secrets(finished, world):
    directory, _ = finished
    config = yaml.safe_load((directory / ".hydra/config.yaml").read_text())
    assert config["seed"] == 3
    assert config["base"]["source"] == str(world.base)
    overrides = yaml.safe_load((directory / ".hydra/overrides.yaml").read_text())
    assert overrides[0] == "seed=3"
    assert "sk-0123456789" not in (directory / ".hydra/overrides.yaml").read_text()


def test_the_task_is_learned_and_judged_with_intervals(finished):
    _, result = finished
    for split in ("validation", "test"):
        metrics = result["scores"][split]["metrics"]
        assert metrics["accuracy"]["estimate"] > 0.6, "chance is a third"
        loss = metrics["log_loss"]
        assert 0 < loss["low"] < loss["estimate"] < loss["high"]
    assert result["data"]["rows"] == {"train": 61, "validation": 11, "test": 18}
    assert result["steps"] == 18


def test_predictions_give_the_scores(finished):
    directory, result = finished
    for split, rows in (("validation", 11), ("test", 18)):
        stored = predictions(directory, split)
        assert stored["logits"].shape == (rows, 3)
        assert len(set(stored["id"].tolist())) == rows
        right = (stored["logits"].argmax(1) == stored["labels"]).mean()
        found = estimates(result["scores"][split])["accuracy"]
        assert right == pytest.approx(found)


def test_metrics_cover_every_step_once(finished):
    directory, result = finished
    rows = metric_rows(directory)
    trained = [row["step"] for row in rows if "train/loss" in row]
    assert trained == sorted(set(trained))
    assert trained[-1] == result["steps"], "the last steps are logged, too"
    validated = [row["step"] for row in rows if "validation/accuracy" in row]
    assert validated == [9, 18]


def test_costs_are_sane(finished):
    directory, result = finished
    costs = load_run(directory).record.costs
    assert costs == json.loads(json.dumps(result["costs"]))
    head = 24 * 3 + 3
    factors = 3 * 4 * (4 * (24 + 24) + 2 * (24 + 40))
    assert costs["trained_parameters"] == head + factors
    assert costs["total_parameters"] > costs["trained_parameters"]
    assert costs["adapter_bytes"] == 4 * costs["trained_parameters"]
    assert set(costs["shapes"]) == {"8x8", "8x16"}
    assert costs["shapes"]["8x16"]["flops"] > costs["shapes"]["8x8"]["flops"] > 1e5
    assert costs["step_flops"] == costs["shapes"]["8x16"]["flops"]
    assert costs["step_peak_bytes"] > costs["adapter_bytes"]
    assert 0 < costs["step_median_seconds"] < costs["compile_seconds"] < 300
    assert costs["num_steps_measured"] == result["steps"] - 2
    assert costs["inference"] is None, "not asked for"


@pytest.mark.slow
def test_latency_is_measured_for_base_unmerged_and_merged(world, tmp_path):
    given = ["evaluate.latency=true", "optim.epochs=1", "delta.targets='**/up/kernel'"]
    short = ["data.batching.buckets=[16]", "evaluate.test=false"]
    directory = f"run.directory={tmp_path / 'run'}"
    result = run_trial(world.config(directory, *given, *short))
    found = result["costs"]["inference"]
    arms = [f"{a}, {n} x 16" for n in (1, 8) for a in ("base", "unmerged", "merged")]
    assert sorted(found) == sorted(arms)
    for timed in found.values():
        assert 0 < timed["p10_seconds"] <= timed["median_seconds"] < 1
    assert set(result["scores"]) == {"validation"}, "the test split stays sealed"
    assert not (tmp_path / "run/predictions/test.npz").exists()


@pytest.mark.slow
def test_validation_chooses_the_best_state(world, tmp_path):
    # At this rate the second epoch undoes what the first one learned.
    spoiling = ["optim.lr=0.1", "optim.schedule=constant", "optim.epochs=4"]
    directory = tmp_path / "run"
    select = "loop.select=log_loss"
    result = run_trial(world.config(f"run.directory={directory}", select, *spoiling))
    validated = {
        row["step"]: row["validation/log_loss"]
        for row in metric_rows(directory)
        if "validation/log_loss" in row
    }
    best = min(validated, key=validated.__getitem__)
    assert best != max(validated), "else this test shows nothing"
    assert result["best_step"] == best
    found = estimates(result["scores"]["validation"])["log_loss"]
    assert found == pytest.approx(validated[best], rel=1e-5)


def test_the_same_command_returns_the_stored_result(finished, world):
    directory, result = finished
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    overrides = [f"run.directory={directory}", "seed=3"]
    with counting_compilations() as compiled:
        again = run_trial(world.config(*overrides, "track=local", "run.progress=false"))
    assert not compiled
    assert again == json.loads(json.dumps(result))
    changed = {p.name for p in before if p.stat().st_mtime_ns != before[p]}
    assert changed <= {".lock"}


def test_each_shape_compiles_once_and_before_the_first_step(world, monkeypatch):
    from lowrank.train.pack import Pack

    marks, step = [], Pack.__call__

    def watched(self, state, batch):
        marks.append(len(compiled))
        return step(self, state, batch)

    monkeypatch.setattr(Pack, "__call__", watched)
    directory = f"run.directory={world.runs / 'counted'}"
    with counting_compilations() as compiled:
        run_trial(world.config(directory, "seed=8"))
    assert len(marks) == 18
    assert set(marks) == {marks[0]}, compiled[marks[0] : marks[-1]]
    names = [re.sub(r"^jit\((.*)\)$", r"\1", name) for name in compiled]
    assert names.count("packed") == 2, "two buckets"
    assert names.count("infer") == 2, "two buckets of validation; test has the same"


@pytest.mark.long
def test_the_host_does_constant_work_per_step(world, monkeypatch):
    from lowrank.train.pack import Pack

    transfers, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: transfers.append(x) or get(x))
    steps, step = [], Pack.__call__
    call = lambda self, *args: steps.append(len(transfers)) or step(self, *args)
    monkeypatch.setattr(Pack, "__call__", call)
    quiet = ["loop.checkpoint_every=1000", "loop.evaluate_every=1000", "seed=9"]
    run_trial(world.config(f"run.directory={world.runs / 'constant'}", *quiet))
    # A step's numbers are read while the next one runs: one transfer each, one late.
    assert np.diff(steps).tolist() == [0] + [1] * 16


@pytest.mark.long
def test_the_base_is_not_changed(world, finished, monkeypatch):
    _, result = finished
    base = load_run(finished[0]).base
    assert base.fingerprint == result["base"]["fingerprint"]
    from lowrank.run import packs

    def vandal(directory, prepared, trained, dials):
        raise AssertionError("shipped although the base had changed")

    seen = iter(["before", "after"])
    monkeypatch.setattr(packs, "ship", vandal)
    monkeypatch.setattr(packs, "marks", lambda tree, where: next(seen))
    directory = world.runs / "vandal"
    with pytest.raises(Corrupt, match="base changed"):
        run_trial(world.config(f"run.directory={directory}"))
    assert not (directory / "result.json").exists()
    assert json.loads((directory / "status.json").read_text())["status"] == "failed"


# A finished run, opened again.


# Variants, each through the config alone.


def test_a_preview_shows_the_run_and_leaves_nothing(world, tmp_path):
    overrides = [f"run.directory={tmp_path / 'run'}", "run.preview=true"]
    shown = run_trial(world.config(*overrides))
    assert shown["steps"] == 18
    assert {site["rank"] for site in shown["sites"]} == {4}
    assert len(shown["sites"]) == 6
    assert shown["sizes"]["trained_parameters"] == 3915
    assert shown["step"]["flops"] > 1e5
    assert shown["step"]["peak_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_preview_counts_what_the_run_then_costs(finished, world):
    overrides = ["run.preview=true", "seed=3"]
    shown = run_trial(world.config(*overrides))
    costs = finished[1]["costs"]
    assert shown["step"]["flops"] == costs["step_flops"]
    assert shown["trial"] == finished[1]["trial"]
    assert shown["sizes"]["trained_parameters"] == costs["trained_parameters"]


@pytest.mark.long
@pytest.mark.parametrize("delta", ["head", pytest.param("full", marks=SLOW)])
def test_head_and_full_training_are_runs_like_others(world, delta):
    directory = world.runs / delta
    lr = {"head": "optim.lr=0.05", "full": "optim.lr=0.003"}[delta]
    result = run_trial(world.config(f"run.directory={directory}", f"delta={delta}", lr))
    assert estimates(result["scores"]["test"])["accuracy"] > 0.6
    count = result["costs"]["trained_parameters"]
    assert count == (75 if delta == "head" else result["costs"]["total_parameters"])
    again = evaluate_run(composed("evaluate", f"run.directory={directory}"))
    assert estimates(again["scores"]["test"]) == pytest.approx(
        estimates(result["scores"]["test"]), rel=1e-4, abs=1e-5
    )


@SLOW
def test_early_stopping_ends_the_run_and_a_repeat_knows(world, tmp_path):
    # At this rate nothing is learned, so the first validation stays the best.
    still = ["optim.lr=1e-9", "optim.epochs=9", "loop.patience=2"]
    directory = tmp_path / "run"
    result = run_trial(world.config(f"run.directory={directory}", *still))
    assert result["steps"] == 27
    assert result["best_step"] == 9
    (directory / "result.json").unlink()
    with counting_compilations() as compiled:
        again = run_trial(world.config(f"run.directory={directory}", *still))
    assert not [name for name in compiled if "packed" in name]
    assert again["state"] == result["state"]
    assert again["costs"] == json.loads(json.dumps(result["costs"]))


@pytest.mark.parametrize(
    "action",
    ["halt", pytest.param("skip", marks=SLOW), pytest.param("rollback", marks=SLOW)],
)
@pytest.mark.fault(
    "loss that is not finite at one step: halt, skip, rollback",
    "as the policy says; no such state is ever saved",
)
def test_a_step_that_is_not_finite_meets_the_policy(world, action, monkeypatch):
    from lowrank.data.pipeline import TrainPipeline

    batch_at = TrainPipeline.batch_at

    def poisoned(self, step):
        batch = batch_at(self, step)
        bad = np.full_like(batch["weight"], np.inf)
        return {**batch, "weight": bad} if step == 4 else batch

    monkeypatch.setattr(TrainPipeline, "batch_at", poisoned)
    directory = world.runs / f"poisoned-{action}"
    overrides = [f"run.directory={directory}", f"non_finite.action={action}"]
    if action == "halt":
        with pytest.raises(NonFinite, match="step 4"):
            run_trial(world.config(*overrides))
        status = json.loads((directory / "status.json").read_text())
        assert status["status"] == "failed"
        assert "NonFinite" in status["reason"]
        return
    result = run_trial(world.config(*overrides))
    assert estimates(result["scores"]["test"])["accuracy"] > 0.6
    assert metric_rows(directory)[-2]["step"] == 18
    # Rolled back to step 3, the state has not seen batches 3 and 4 (and 5).
    assert result["steps"] == (18 if action == "skip" else 15)
    assert result["skipped_steps"] == (1 if action == "skip" else 0)


def test_trial_ids_follow_the_science_alone(world):
    same = [
        "run.root=elsewhere", "track.project=other", "mesh.data=2", "run.force=true",
        "loop.stop_after=3", "base.name=other", "run.progress=false",
        "evaluate.batch_size=8",
    ]  # fmt: skip
    other = [
        "seed=1", "delta.rank=3", "optim.lr=0.1", "data.seed=2", "loop.patience=3",
        "evaluate.resamples=9", "base.pooling=cls", "non_finite.limit=2",
        "penalty.drift=0.1", "penalty=cap", "delta.rank_dropout=0.1",
    ]  # fmt: skip
    trial = read(world.config()).trial_id
    assert {read(world.config(o)).trial_id for o in same} == {trial}
    ids = {read(world.config(o)).trial_id for o in other}
    assert len(ids) == len(other)
    assert trial not in ids


@pytest.mark.long
def test_two_equal_commands_give_equal_runs(finished, world):
    directory = world.runs / "twin"
    overrides = [f"run.directory={directory}", "seed=3"]
    run_trial(world.config(*overrides))
    same_outcome(finished[0], directory)


# A finished run as a trial of a sweep.


def test_the_reading_of_sweeps_reads_what_a_run_writes(world, finished):
    directory, result = finished
    sweep = load_sweep(world.runs)
    row = sweep.trials.set_index("directory").loc[directory.name]
    assert (row["trial"], row["status"], row["seed"]) == (result["trial"], "done", 3)
    judged = result["scores"]["validation"]["metrics"]
    for name in ("accuracy", "macro_f1", "log_loss"):
        assert row[f"best.{name}"] == judged[name]["estimate"]
    assert (row["best_step"], row["steps"]) == (result["best_step"], result["steps"])
    for name in ("trained_parameters", "step_median_seconds", "num_trials"):
        assert row[f"costs.{name}"] == result["costs"][name]
    assert row["optim.lr"] == 0.02
    assert not [name for name in sweep.trials if name.startswith("test")]
    # What a running trial would be told from: the log alone, by the loop's own rule.
    seen = load_record(directory).metrics.dropna(subset="validation/accuracy")
    best = best_row(seen, "accuracy")
    assert best["step"] == result["best_step"]
    # Two programs over the same rows in single precision.
    logged, loss = best["validation/log_loss"], judged["log_loss"]["estimate"]
    assert logged == pytest.approx(loss, rel=1e-5)
