"""Texts with a number each as a trial: learned, told in its own unit, opened again."""

import json

import numpy as np
import pytest
from tiny_run import FILLERS, KEYWORDS, World, composed

from lowrank.core.errors import BadInput
from lowrank.core.spec import build
from lowrank.data.tasks import CATALOGUE
from lowrank.run.judge import judge
from lowrank.run.packs import run_pack
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial

#: The number that a text of a kind has, far from zero and of large spread.
GRADES = {"animal": 1000.0, "color": 1200.0, "weather": 1400.0}
SMALL = (
    "data=values", "track=local", "data.batching.batch_size=8",
    "data.batching.buckets=[8,16]", "optim.epochs=6", "optim.lr=0.02",
    "evaluate.resamples=50", "evaluate.latency=false", "evaluate.batch_size=16",
    "loop.select=rmse", "delta.rank=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def grades(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(120):
        kind = [*GRADES][number % 3]
        words = [*rng.choice(FILLERS, 3), rng.choice(KEYWORDS[kind])]
        grade = GRADES[kind] + float(rng.normal())
        rows.append({"text": " ".join(rng.permutation(words)), "value": grade})
    path = tmp_path_factory.mktemp("grades") / "grades.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def config(world: World, grades):
    def made(*overrides):
        where = [
            f"base.source={world.base}", f"data.path={grades}",
            f"run.cache={world.cache}", f"run.root={world.runs}",
        ]  # fmt: skip
        return composed("config", *SMALL, *where, *overrides)

    return made


def numbers(result, split="test"):
    found = result["scores"][split]["metrics"]
    return {name: value["estimate"] for name, value in found.items()}


def test_numbers_are_learned_and_told_in_their_own_unit(config, world):
    directory = world.runs / "valued"
    result = run_trial(config(f"run.directory={directory}"))
    found = numbers(result)
    # The mean alone is off by 163.
    assert found["rmse"] < 60
    assert found["pearson"] > 0.9
    assert result["data"]["mean"] == pytest.approx(1200, abs=30)
    run = load_run(directory)
    for merged in (False, True):
        again = judge(
            run, evaluation=run.settings.evaluate, merged=merged, progress=False
        )
        for name, value in numbers(again).items():
            np.testing.assert_allclose(value, found[name], rtol=1e-3)
    kept = run.record.predictions("test")
    off = kept["predicted"] - kept["right"]
    np.testing.assert_allclose(np.sqrt(np.mean(off**2)), found["rmse"], rtol=1e-6)
    low, high = predict(run, ["word1 cat word2", "word3 snow word4"])
    assert low["value"] < 1150 < 1250 < high["value"]
    notes = json.loads((directory / "adapter" / "lowrank.json").read_text())
    assert notes["scale"] == result["data"]["scale"]


def test_trials_of_a_pack_are_those_alone(config, world):
    each = [
        read(config(f"optim.lr={lr}", f"run.root={world.runs / 'valued_pack'}"))
        for lr in (0.02, 0.01)
    ]
    packed = run_pack(each, folder=world.runs / "valued_packs")
    for one, lr in zip(packed, (0.02, 0.01), strict=True):
        alone = run_trial(
            config(f"optim.lr={lr}", f"run.root={world.runs / 'valued_alone'}")
        )
        for name, value in numbers(alone).items():
            np.testing.assert_allclose(numbers(one.result)[name], value, rtol=2e-2)


def test_the_best_state_has_the_least_error(config, world):
    directory = world.runs / "valued_best"
    result = run_trial(config(f"run.directory={directory}", "optim.epochs=3"))
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    told = {one["step"]: one["validation/rmse"] for one in lines
            if "validation/rmse" in one}  # fmt: skip
    assert result["best_step"] == min(told, key=told.get)


def loaded(path, **fields):
    return build({"name": "values", "path": str(path), **fields}, CATALOGUE, "data")


def test_numbers_keep_their_rows(grades):
    task = loaded(grades).load()
    rows = {
        row["text"]: row["value"]
        for row in map(json.loads, grades.read_text().splitlines())
    }
    count = 0
    for name, split in task.task.splits.items():
        for text, value in zip(split.texts, task.values[name], strict=True):
            assert value == rows[text]
            count += 1
    assert count == 120
    assert task.fingerprint == loaded(grades).load().fingerprint
    assert task.fingerprint != loaded(grades, seed=1).load().fingerprint


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a,1", "b,two"], "value"),
        (["a,1", "b,nan"], "value"),
        (["a,1", "b,"], "value"),
    ],
    ids=str,
)
def test_a_value_that_is_no_number_is_refused(tmp_path, lines, said):
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["text,value", *lines]))
    with pytest.raises(BadInput, match=said):
        loaded(path).load()


def test_what_cannot_be_is_said_before_there_is_a_directory(config, world, tmp_path):
    equal = tmp_path / "equal.csv"
    equal.write_text("\n".join(["text,value", *(f"word{n},3" for n in range(40))]))
    for overrides, said in (
        ([f"data.path={equal}"], "nothing to learn"),
        (["loop.select=accuracy"], "no number about values"),
        (["evaluate.answers=4"], "is for questions"),
        (["evaluate.known=x"], "is for language models"),
    ):
        with pytest.raises(BadInput, match=said):
            run_trial(config(*overrides, f"run.directory={tmp_path / 'none'}"))
    assert not (tmp_path / "none").exists()
