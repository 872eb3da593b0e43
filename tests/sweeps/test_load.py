"""Every trial of a sweep is in the frame, with what became of it and no test score."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from experiments.example_sweep import Grid, accuracies, make_config, write_example
from lowrank.core.errors import BadInput, UnknownName
from lowrank.io.record import Record
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.io.view import load_record
from lowrank.sweeps.finalists import FINALISTS
from lowrank.sweeps.load import flatten, load_sweep

MIDDLE = {"delta.rank": 8, "optim.lr": 1e-3, "optim.weight_decay": 0.0, "seed": 1}


def where(frame, **settings):
    for name, value in settings.items():
        frame = frame[frame[name] == value]
    return frame


def start(directory, trial, status="running"):
    """A trial that has logged two validations, the first the better, and no result."""
    config = make_config(4, 1e-3, 0.0, 0)
    record = Record.open(directory / trial, config=config, identity={"config": trial})
    lines = [
        {"step": 20, "time": 1.0, "validation/accuracy": 0.7},
        {"step": 40, "time": 2.0, "validation/accuracy": 0.6, "test/accuracy": 0.99},
    ]
    record.path("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    record.set_status(status)
    return record


def test_a_row_is_what_the_record_of_its_trial_says(sweep):
    (row,) = where(sweep.trials, **MIDDLE).to_dict("records")
    view = load_record(sweep.directory / row["directory"])
    assert (row["trial"], row["status"]) == (view.result["trial"], "done")
    judged = view.result["scores"]["validation"]["metrics"]
    assert row["best.accuracy"] == judged["accuracy"]["estimate"]
    assert row["best.log_loss"] == judged["log_loss"]["estimate"]
    assert (row["best_step"], row["steps"]) == (view.result["best_step"], 60)
    assert row["last.accuracy"] == accuracies(view.config)[60]
    assert row["costs.trained_parameters"] == view.costs["trained_parameters"]
    assert row["data.batching.buckets"] == "[32]"
    assert row["identity.config"] == row["trial"]
    assert not [name for name in sweep.trials if "test" in name.split(".")[0]]


def test_what_varies_is_found_and_seed_is_none_of_it(sweep):
    assert sweep.varied == ["delta.rank", "optim.lr", "optim.weight_decay"]
    assert (sweep.select, sweep.metrics) == ("accuracy", ["accuracy", "log_loss"])
    arms = sweep.arms()
    assert arms["num_trials"].tolist() == [3] * 5
    done = where(sweep.trials, status="done")
    means = [
        where(done, **{n: arm[n] for n in sweep.varied})["best.accuracy"].mean()
        for _, arm in arms.iterrows()
    ]
    np.testing.assert_allclose(arms["mean"], means, rtol=1e-12)
    # Four complete arms, best first; then the one whose last seed diverged.
    assert arms["num_done"].tolist() == [3, 3, 3, 3, 2]
    assert means[:4] == sorted(means[:4], reverse=True)
    by_loss = sweep.arms("log_loss")["mean"][:4]
    assert by_loss.tolist() == sorted(by_loss)


def test_a_setting_that_only_some_trials_have_varies_among_those(directory):
    config = make_config(8, 1e-3, 0.0, 0)
    config["delta"] = {"name": "head"}
    with Record.open(directory / "head", config=config, identity={"config": "h"}) as r:
        r.result({"scores": {}, "steps": 1})
    varied = load_sweep(directory).varied
    assert "delta.name" in varied
    assert "delta.alpha" not in varied


def test_a_history_is_long_and_complete(sweep):
    history = sweep.history()
    (row,) = where(sweep.trials, **MIDDLE).to_dict("records")
    own = where(history, trial=row["trial"], name="validation/accuracy")
    expected = accuracies(make_config(8, 1e-3, 0.0, 1))
    assert dict(zip(own["step"], own["value"], strict=True)) == {
        step: expected[step] for step in (20, 40, 60)
    }
    assert (own["delta.rank"] == 8).all()
    assert (own["seed"] == 1).all()
    lines = sum(
        len(json.loads(line).keys() - {"step", "time"})
        for file in sweep.directory.glob("*/metrics.jsonl")
        for line in file.read_text().splitlines()
    )
    # The diverged trial logged one loss and one gradient norm that are no numbers.
    assert len(history) == lines - 2


def test_trials_in_every_state_keep_their_row(directory):
    done = sorted(p.name for p in directory.iterdir())
    (directory / done[0] / "status.json").write_text("{")
    metrics = directory / done[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.", "1.", 1))
    shutil.copytree(directory / done[2], directory / "moved.old-1")
    for name, status in (("going", "running"), ("asked", "preempted")):
        start(directory, name, status).close()
    start(directory, "killed").close()
    for name, pid in (("going", os.getpid()), ("killed", 2**22 + 1)):
        status = read_sealed(directory / name / "status.json") | {"pid": pid}
        status |= {"status": "running"}
        write_sealed(directory / name / "status.json", status)
    (directory / "meant" / ".hydra").mkdir(parents=True)
    meant = yaml.safe_dump(make_config(32, 1e-3, 0.0, 0))
    (directory / "meant" / ".hydra" / "config.yaml").write_text(meant)
    plan = {"trials": [{"trial": "later"}, {"trial": done[3]}]}
    (directory / "sweep.json").write_text(json.dumps(plan))
    sweep = load_sweep(directory)
    rows = sweep.trials.set_index("trial")
    assert len(rows) == len(done) + 5
    assert rows.loc["meant", ["status", "delta.rank"]].tolist() == ["planned", 32]
    assert rows.loc["going", "status"] == "running"
    assert rows.loc["killed", "status"] == "stopped"
    assert rows.loc["asked", "status"] == "preempted"
    assert rows.loc["later", "status"] == "planned"
    assert rows.loc[done[0], "status"] == "damaged"
    assert "status.json" in rows.loc[done[0], "reason"]
    assert rows.loc[done[1], "status"] == "damaged"
    assert "metrics.jsonl" in rows.loc[done[1], "reason"]
    # What is known of a damaged trial stays; what ran is told as far as it got.
    assert rows.loc[done[1], "delta.rank"] in (2, 8)
    going = rows.loc["going"]
    assert (going["best.accuracy"], going["best_step"]) == (0.7, 20)
    assert (going["last.accuracy"], going["steps"]) == (0.6, 40)
    assert not sweep.history()["name"].str.startswith("test/").any()
    assert sweep.arms()["num_done"].sum() == len(done) - 3


def test_a_reason_is_told(sweep):
    (failed,) = where(sweep.trials, status="failed").to_dict("records")
    assert failed["reason"] == "NonFinite: the loss is nan at step 30"
    assert pd.isna(failed["costs.trained_parameters"])


def test_patterns_stay_whole_in_a_flat_config():
    config = {"a": {"b": 1, "c": None}, "ranks": {"**/layer[0:3]/**": 4}, "l": [1]}
    assert flatten(config) == {
        "a.b": 1, "a.c": None, "ranks": '{"**/layer[0:3]/**": 4}', "l": "[1]",
    }  # fmt: skip


def test_a_place_without_trials_is_refused(directory, tmp_path):
    run = next(directory.iterdir())
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    for path, words in (
        (tmp_path / "none", "there is no sweep directory"),
        (tmp_path / "empty", "holds no trial"),
        (run, "of one run, not of a sweep"),
    ):
        with pytest.raises(BadInput, match=words):
            load_sweep(path)
    with pytest.raises(UnknownName, match=r"best.acuracy.*best.accuracy"):
        load_sweep(directory).arms("acuracy")


def scores(value):
    return {"metrics": {"accuracy": {"estimate": value, "low": None, "high": None}}}


def test_finalists_are_the_best_arms_on_validation(sweep):
    best = sweep.arms().iloc[0]
    finalists = sweep.finalists(2)
    assert finalists["place"].tolist() == [1, 1, 1, 2, 2, 2]
    first = finalists[finalists["place"] == 1]
    assert (first["delta.rank"] == best["delta.rank"]).all()
    assert first["best.accuracy"].mean() == pytest.approx(best["mean"], rel=1e-12)
    for k in (0, 6):
        with pytest.raises(BadInput, match="1 to 5"):
            sweep.finalists(k)


def test_test_scores_are_told_of_stored_finalists_only(sweep):
    finalists = sweep.finalists(1)
    stored = []

    def score(directory):
        # The choice is on the disk before the first score is made.
        stored.append((sweep.directory / FINALISTS).exists())
        return scores(0.5)

    told = sweep.test(finalists, score)
    assert stored == [True] * 3
    assert told["trial"].tolist() == sorted(finalists["trial"])
    assert told["test.accuracy"].tolist() == [0.5] * 3
    assert sweep.test(finalists["trial"].tolist(), score).equals(told)
    with pytest.raises(BadInput, match=r"other finalists.*remove the file"):
        sweep.test(sweep.finalists(2), score)


def test_only_trials_that_are_done_can_be_finalists(sweep):
    (failed,) = where(sweep.trials, status="failed")["trial"]
    for names, words in (([failed], "is failed"), ([], "no finalist"), (["x"], "'x'")):
        with pytest.raises(BadInput, match=words):
            sweep.test(names)
    assert not (sweep.directory / FINALISTS).exists()


def test_a_score_that_a_record_has_is_taken_from_there(tmp_path):
    grid = Grid(ranks=(2,), rates=(1e-3, 4e-3), seeds=(0,), decays=(0.0,), test=True)
    sweep = load_sweep(write_example(tmp_path / "open", grid))
    told = sweep.test(sweep.finalists(1))
    result = load_record(sweep.directory / told["trial"][0]).result
    expected = result["scores"]["test"]["metrics"]["accuracy"]
    assert told["test.accuracy"][0] == expected["estimate"]
    assert told["test.accuracy.low"][0] == expected["low"]
    assert "test" not in " ".join(sweep.trials.columns.drop("evaluate.test"))
