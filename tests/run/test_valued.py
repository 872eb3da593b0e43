"""Texts with a number each as a trial: learned, told in its own unit, opened again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import FILLERS, KEYWORDS, World, composed

from lowrank.core.errors import BadInput
from lowrank.core.spec import build
from lowrank.data.tasks import CATALOGUE
from lowrank.run.judge import judge
from lowrank.run.packs import run_pack
from lowrank.run.prepare import prepare_pack
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

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


@pytest.fixture(scope="module")
def finished(config, world):
    directory = world.runs / "valued"
    return directory, run_trial(config(f"run.directory={directory}"))


def numbers(result, split="test"):
    found = result["scores"][split]["metrics"]
    return {name: value["estimate"] for name, value in found.items()}


def test_numbers_are_learned_and_told_in_their_own_unit(finished):
    directory, result = finished
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


def test_trials_of_a_pack_are_those_alone(config, world, finished):
    each = [
        read(config(f"optim.lr={lr}", f"run.root={world.runs / 'valued_pack'}"))
        for lr in (0.02, 0.01)
    ]
    packed = run_pack(each, folder=world.runs / "valued_packs")
    other = run_trial(
        config("optim.lr=0.01", f"run.root={world.runs / 'valued_alone'}")
    )
    for one, alone in zip(packed, (finished[1], other), strict=True):
        assert one.result["trial"] == alone["trial"]
        for name, value in numbers(alone).items():
            np.testing.assert_allclose(numbers(one.result)[name], value, rtol=2e-2)


def test_the_best_state_has_the_least_error(finished):
    directory, result = finished
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


def test_texts_that_repeat_are_on_one_side(tmp_path):
    rows = [{"text": f"text {n % 40}", "value": n} for n in range(80)]
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = build({"name": "values", "path": str(path)}, CATALOGUE, "data").load()
    assert sum(len({*rows.texts}) for rows in task.task.splits.values()) == 40


def test_a_correlation_may_have_no_value_at_first(config, world):
    """The fresh head gives one number to all rows: no correlation, and no end."""
    directory = world.runs / "correlated"
    result = run_trial(
        config(
            f"run.directory={directory}",
            "loop.select=pearson",
            "loop.evaluate_every=1",
            "optim.lr=1e-12",
            "optim.epochs=1",
            "optim.warmup=0",
        )
    )
    assert result["scores"]["test"]["metrics"]["rmse"]["estimate"] > 0


def test_a_correlation_with_equal_numbers_is_refused_before_compiling(config, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for name, values in {
        "train": (1, 2, 3, 4),
        "valid": (5, 5),
        "test": (1, 2),
    }.items():
        rows = [{"text": f"{name} {n}", "value": v} for n, v in enumerate(values)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = config(f"data.path={folder}", "loop.select=pearson")
    with pytest.raises(BadInput, match="take rmse or mae"):
        run_trial(given)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("optim.label_smoothing=0.1", "smooths classes"),
        ("evaluate.answers=8", "is for questions and answers"),
        ("evaluate.known=old.txt", "is for language models"),
        ("evaluate.level=95", "no confidence level"),
        ("evaluate.resamples=0", "evaluate.resamples must be at least 1"),
    ],
)
def test_what_numbers_do_not_have(config, more, said):
    with pytest.raises(BadInput, match=said):
        read(config(more))


def test_a_warm_start_keeps_what_the_head_says_in_another_unit(
    config, finished, tmp_path
):
    earlier, _ = finished
    rng = np.random.default_rng(5)
    rows = [
        {"text": " ".join(rng.choice(FILLERS, 4)), "value": float(rng.normal(3, 0.1))}
        for _ in range(60)
    ]
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = config(f"delta.start={earlier}", f"data.path={path}")
    prepared = prepare_pack([read(given)])
    own, problem = prepared.trials[0].adapted, prepared.trials[0].problem
    trained = prepared.starts[0](own.init_trained(jax.random.key(3)))
    batch = problem.evaluation("test")[0]
    found = own.apply(own.frozen(), trained, problem.inputs(batch), dials=own.dials())
    run = load_run(earlier)
    wanted = run.outputs(jax.tree.map(jnp.asarray, problem.inputs(batch)))
    told = lambda z, facts: np.asarray(z) * facts["scale"] + facts["mean"]
    # Numbers around a thousand in float32, said in units of 160 and of 0.1.
    np.testing.assert_allclose(
        told(found, problem.facts), told(wanted, run.facts), rtol=1e-4
    )
