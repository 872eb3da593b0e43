"""A finished run, opened again: its model, predictions, other data, sealed splits."""

import numpy as np
import pytest
from tiny_run import (
    composed,
    estimates,
    write_base,
    write_table,
)

from lowrank.core.errors import BadInput, Corrupt
from lowrank.data.choices import Choices
from lowrank.data.splits import Split
from lowrank.io.seals import write_sealed
from lowrank.run.judge import evaluate_run
from lowrank.run.problem import known_split
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial
from lowrank.sweeps.finalists import judge_test

pytestmark = pytest.mark.long


def test_a_run_opens_to_the_model_it_judged(finished):
    directory, result = finished
    run = load_run(directory)
    assert run.classes == ("animal", "color", "weather")
    assert run.settings.trial_id == result["trial"]
    rows = predict(
        run, ["word1 word2 cat word3", "word5 pink", "word9 word8 fog word1"]
    )
    assert [row["label"] for row in rows] == ["animal", "color", "weather"]
    for row in rows:
        p = np.exp(row["logits"]) / np.exp(row["logits"]).sum()
        assert row["probability"] == pytest.approx(p.max(), rel=1e-5)


def test_predictions_do_not_depend_on_their_neighbors(finished):
    run = load_run(finished[0])
    texts = ["word1 dog", "word2 " * 12 + "red", "word3 snow word4"]
    together = predict(run, texts)
    for text, row in zip(texts, together, strict=True):
        alone = predict(run, [text])[0]
        np.testing.assert_allclose(alone["logits"], row["logits"], rtol=1e-4, atol=1e-5)
    for wrong in ("text", ["", "b"]):
        with pytest.raises(BadInput, match="non-empty strings"):
            predict(run, wrong)


@pytest.mark.parametrize("merged", ["false", "true"])
def test_judging_again_agrees_with_the_stored_scores(finished, merged):
    directory, result = finished
    config = composed(
        "evaluate", f"run.directory={directory}", f"merged={merged}",
        "evaluate.resamples=50",
    )  # fmt: skip
    found = evaluate_run(config)
    assert found["merged"] is (merged == "true")
    ours, theirs = found["scores"]["test"], result["scores"]["test"]
    assert ours["num_rows"] == theirs["num_rows"] == 18
    for name, value in estimates(theirs).items():
        assert estimates(ours)[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_new_data_may_lack_classes_but_not_bring_new_ones(finished, tmp_path):
    directory, _ = finished
    judged = [f"run.directory={directory}", "+data=table", "evaluate.resamples=20"]
    some = write_table(tmp_path / "some.csv", 12, seed=5, classes=("color", "weather"))
    found = evaluate_run(composed("evaluate", *judged, f"data.path={some}"))
    assert estimates(found["scores"]["test"])["accuracy"] > 0.5
    other = tmp_path / "other.csv"
    other.write_text(some.read_text().replace(",color", ",sound"))
    with pytest.raises(BadInput, match="does not know, as 'sound'"):
        evaluate_run(composed("evaluate", *judged, f"data.path={other}"))


def test_new_data_may_be_judged_whole(finished, tmp_path):
    directory, _ = finished
    new = write_table(tmp_path / "new.csv", 10, seed=6)
    judged = [f"run.directory={directory}", "evaluate.resamples=20"]
    found = evaluate_run(
        composed("evaluate", *judged, "+data=table", f"data.path={new}", "split=all")
    )
    assert found["scores"]["all"]["num_rows"] == 30
    with pytest.raises(BadInput, match="that the run was trained on"):
        evaluate_run(composed("evaluate", *judged, "split=all"))


def test_all_splits_are_their_rows_one_after_another():
    one = Choices(("q",), (("a", "b"),), np.array([1], np.int32), ("g",), ("0",))
    two = Choices(("r",), (("c", "d", "e"),), np.array([2], np.int32), ("h",), ("1",))
    both = known_split({"train": one, "test": two}, "all")
    assert both.questions == ("q", "r")
    assert both.choices == (("a", "b"), ("c", "d", "e"))
    assert both.right.tolist() == [1, 2]
    plain = lambda name: Split((name,), (name,), np.zeros(1, np.int32), None)
    assert known_split({"a": plain("x"), "b": plain("y")}, "all").groups is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("split=train2", "no split"),
        ("split=3", "split must be str"),
        ("merged=maybe", "merged must be bool"),
        ("+speed=3", "no group 'speed'"),
        ("+run.root=x", "no field 'root'"),
        ("evaluate.level=high", "level must be float"),
        ("plugins=os", "list of packages"),
        ("+data._target_=os.system", "refused"),
    ],
)
def test_judging_refuses_what_it_does_not_know(finished, override, said):
    config = composed("evaluate", f"run.directory={finished[0]}", override)
    with pytest.raises(BadInput, match=said):
        evaluate_run(config)


def test_only_a_finished_run_is_opened(world, tmp_path):
    with pytest.raises(BadInput, match="no run directory"):
        load_run(tmp_path / "nothing")
    stored = {"schema": 1, "identity": {}, "status": "preempted"}
    write_sealed(tmp_path / "status.json", stored)
    with pytest.raises(BadInput, match="no finished run"):
        load_run(tmp_path)


@pytest.mark.faults
@pytest.mark.fault(
    "trained weights on another base",
    "refused by fingerprint",
)
def test_a_run_is_not_opened_on_another_base_or_a_damaged_file(world, tmp_path):
    base = write_base(tmp_path / "base")
    directory = tmp_path / "run"
    run_trial(
        world.config(f"base.source={base}", f"run.directory={directory}", "delta=head")
    )
    load_run(directory)
    content = (directory / "trained.safetensors").read_bytes()
    (directory / "trained.safetensors").write_bytes(content[:-5])
    with pytest.raises(Corrupt, match=r"SHA256SUMS says"):
        load_run(directory)
    (directory / "trained.safetensors").write_bytes(content)
    write_base(base, seed=1)
    with pytest.raises(Corrupt, match="give the base the run was made with"):
        load_run(directory)


def test_a_sealed_test_split_is_judged_as_the_run_would_have(finished):
    directory, result = finished
    found = judge_test(directory)["metrics"]
    for name, value in result["scores"]["test"]["metrics"].items():
        # Another compiled program: single precision over a few layers.
        expected = value["estimate"]
        assert found[name]["estimate"] == (expected and pytest.approx(expected, 1e-5))
