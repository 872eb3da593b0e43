"""Images as trials: learned, continued, judged, shipped, opened, and refused."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_run import World, composed, same_outcome
from tiny_vision import CLASSES, PREPARED, SPEC, image, write_base, write_images

from lowrank.core.errors import BadInput, Corrupt
from lowrank.cost.measure import StepTimer
from lowrank.io import vit
from lowrank.io.hub import Base
from lowrank.io.peft import read_adapter
from lowrank.run.fit import timing
from lowrank.run.judge import judge
from lowrank.run.packs import run_pack
from lowrank.run.prepare import prepare
from lowrank.run.probe import run_probe
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.survey import survey
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

SMALL = (
    "base.pooling=both", "data=images", "track=local", "data.batching.batch_size=8",
    "optim.epochs=3", "optim.lr=0.02", "evaluate.resamples=50",
    "evaluate.latency=false", "evaluate.batch_size=16", "delta.rank=4",
    "loop.log_every=4", "loop.checkpoint_every=12",
)  # fmt: skip


@pytest.fixture(scope="module")
def sight(tmp_path_factory):
    """A folder with a base and images."""
    folder = tmp_path_factory.mktemp("sight")
    write_base(folder / "base")
    write_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def config(world: World, sight):
    def made(*overrides):
        where = [
            f"base.source={sight / 'base'}", f"data.path={sight / 'images'}",
            f"run.cache={world.cache}", f"run.root={world.runs}",
        ]  # fmt: skip
        return composed("config", *SMALL, *where, *overrides)

    return made


@pytest.fixture(scope="module")
def seen(config, world):
    directory = world.runs / "pictured"
    return directory, run_trial(config(f"run.directory={directory}"))


def numbers(scores, split="test"):
    found = scores[split]["metrics"]
    found = {name: value["estimate"] for name, value in found.items()}
    # Of a class with few rows the recall is not defined.
    return {name: value for name, value in found.items() if value is not None}


def test_images_are_learned_judged_and_opened_again(seen):
    directory, result = seen
    found = numbers(result["scores"])
    assert found["accuracy"] > 0.8
    assert result["data"]["classes"] == ["blue", "green", "red"]
    assert result["data"]["images"]["side"] == 16
    run = load_run(directory)
    for merged in (False, True):
        again = judge(
            run, evaluation=run.settings.evaluate, merged=merged, progress=False
        )
        for name, value in numbers(again["scores"]).items():
            np.testing.assert_allclose(value, found[name], rtol=1e-3, err_msg=name)
    rng = np.random.default_rng(7)
    new = [image(label, rng, 20, 9) for label in CLASSES for _ in range(4)]
    told = [one["label"] for one in predict(run, new)]
    right = [label for label in CLASSES for _ in range(4)]
    assert np.mean([a == b for a, b in zip(told, right, strict=True)]) > 0.7
    assert predict(run, []) == []
    alone = predict(run, new[3:4])[0]["logits"]
    np.testing.assert_allclose(alone, predict(run, new)[3]["logits"], atol=1e-5)


def test_a_run_that_was_stopped_continues_bit_by_bit(config, world, seen):
    directory = world.runs / "pictured_stopped"
    line = config(f"run.directory={directory}")
    stopped = {**line, "loop": {**line["loop"], "stop_after": 5}}
    with pytest.raises(Exception, match="stop"):
        run_trial(stopped)
    run_trial(line)
    same_outcome(seen[0], directory)


def test_trials_of_a_pack_are_those_alone(config, world, seen):
    line = lambda lr, root: config(f"optim.lr={lr}", f"run.root={world.runs / root}")
    rates = (0.02, 0.005)
    packed = run_pack(
        [read(line(lr, "pictured_pack")) for lr in rates],
        folder=world.runs / "pictured_packs",
    )
    other = run_trial(line(rates[1], "pictured_alone"))
    for one, alone in zip(packed, (seen[1], other), strict=True):
        assert one.result["trial"] == alone["trial"]
        # Twelve rows: one that tips over moves accuracy by a twelfth.
        for name in ("accuracy", "log_loss"):
            value = numbers(alone["scores"]).get(name)
            if value is not None:
                other = numbers(one.result["scores"])[name]
                np.testing.assert_allclose(other, value, atol=0.1)


def test_the_adapter_is_one_of_the_task_model_and_says_how_images_are_read(seen):
    directory, result = seen
    adapter = read_adapter(directory / "adapter")
    assert "dinov2.encoder.layer.1.attention.q_proj" in adapter.corrections
    assert set(adapter.whole) == {"classifier.weight", "classifier.bias"}
    assert adapter.config["task_type"] is None
    notes = json.loads((directory / "adapter" / "lowrank.json").read_text())
    assert notes["images"] == result["data"]["images"]
    card = (directory / "adapter" / "README.md").read_text()
    assert "AutoModelForImageClassification" in card
    assert "16 x 16 pixels" in card


def test_a_start_from_an_earlier_adapter_is_where_that_one_ended(config, world, seen):
    directory = world.runs / "pictured_warm"
    result = run_trial(
        config(
            f"delta.start={seen[0]}",
            "optim.epochs=1",
            "optim.lr=1e-9",
            f"run.directory={directory}",
        )
    )
    for name, value in numbers(result["scores"]).items():
        np.testing.assert_allclose(
            value, numbers(seen[1]["scores"])[name], rtol=1e-3, err_msg=name
        )


def test_what_peft_cannot_name_is_trained_and_not_shipped(config, world):
    directory = world.runs / "pictured_patches"
    run_trial(
        config(
            "delta.targets='**/{patches,value}/kernel'",
            "optim.epochs=1",
            "base.scan=false",
            "base.pooling=mean",
            f"run.directory={directory}",
        )
    )
    assert not (directory / "adapter").exists()
    assert load_run(directory).adapted.ranks["encoder/patches/kernel"] == 4


def test_other_sizes_are_interpolated_and_remembered(config, world):
    directory = world.runs / "pictured_small"
    line = config("data.size=8", "optim.epochs=1", f"run.directory={directory}")
    result = run_trial(line)
    run = load_run(directory)
    assert run.facts["images"]["side"] == 8
    again = judge(run, evaluation=run.settings.evaluate, progress=False)
    assert again["data"]["fingerprint"] == result["data"]["fingerprint"]
    np.testing.assert_allclose(
        numbers(again["scores"])["accuracy"], numbers(result["scores"])["accuracy"]
    )


def test_new_images_of_the_same_classes_are_judged(seen, tmp_path):
    run = load_run(seen[0])
    data = {"name": "images", "path": str(write_images(tmp_path / "new", 10, seed=5))}
    found = judge(
        run, evaluation=run.settings.evaluate, data=data, progress=False
    )  # fmt: skip
    assert numbers(found["scores"])["accuracy"] > 0.7
    odd = tmp_path / "odd"
    write_images(odd, 10, classes=("red", "blue"))
    (odd / "blue").rename(odd / "cyan")
    with pytest.raises(BadInput, match="does not know, as 'cyan'"):
        judge(
            run, evaluation=run.settings.evaluate, progress=False,
            data={"name": "images", "path": str(odd)},
        )  # fmt: skip
    with pytest.raises(BadInput, match="give it more of its own kind"):
        judge(
            run, evaluation=run.settings.evaluate, progress=False,
            data={"name": "table", "path": "x.csv"},
        )  # fmt: skip


def test_the_frozen_probe_sees_images(config):
    found = run_probe(prepare(read(config())))
    assert found["scores"]["test"]["metrics"]["accuracy"]["estimate"] > 0.3


def test_a_preview_and_the_sites_need_no_training(config, sight):
    shown = run_trial(config("run.preview=true"))
    assert shown["batches"] == [[8, 16, 16, 3]]
    base = {"source": str(sight / "base"), "pooling": "cls"}
    sites = survey({"base": base, "num_classes": 3})
    assert sites["inputs"] == {"pixels": {"shape": [1, 16, 16, 3], "dtype": "float32"}}
    rows = {row["path"]: row for row in sites["weights"]}
    assert rows["encoder/layer/attention/query/kernel"]["layers"] == SPEC.num_layers
    assert rows["encoder/patches/kernel"]["adaptable"]


def test_a_base_that_scales_images_otherwise_is_not_the_one_of_the_run(seen, sight):
    file = sight / "base" / vit.PREPARATION
    before = file.read_text()
    try:
        file.write_text(json.dumps({**PREPARED, "image_std": [0.5] * 3}))
        with pytest.raises(Corrupt, match=f"std. Restore its {vit.PREPARATION}"):
            load_run(seen[0])
    finally:
        file.write_text(before)


def given(num_classes):
    """A base of the user's own, without saying how it reads images."""
    apply = lambda params, batch: batch["pixels"].mean(axis=(1, 2)) @ params["head"]
    head = np.zeros((3, num_classes), np.float32)
    return Base("own", apply, apply, {"head": head}, None, "0" * 64, 1)


def test_throughput_counts_images_and_no_pixels():
    timer = StepTimer(skip=0)
    timing(timer)((32, 98, 98, 3), 2.0)
    timing(timer)((8, 64), 2.0)
    told = timer.summary()
    assert told["examples_per_second"] == 40 / 4
    assert told["tokens_per_second"] == (32 * 37 + 8 * 64) / 4


def test_what_cannot_be_is_said_before_there_is_a_directory(
    config, world, sight, tmp_path
):
    for overrides, said in (
        (["data.size=18"], r"data.size = 18 is not a multiple of 4"),
        (["base.pooling=pooler"], "pooling of base"),
        (["base.max_length=16"], "is for texts"),
        ([f"base.source={world.base}", "base.pooling=mean"], "reads no images"),
        ([f"base.source=python:{__name__}:given", "base.pooling=mean"], "Base.images="),
        (["loop.select=rmse"], "rmse"),
        (["evaluate.answers=4"], "is for questions"),
        (["evaluate.known=x"], "is for language models"),
        ([f"data.path={tmp_path}"], "holds no folder"),
    ):
        with pytest.raises(BadInput, match=said):
            run_trial(config(*overrides, f"run.directory={tmp_path / 'none'}"))
    with pytest.raises(BadInput, match="reads images, and the task"):
        run_trial(world.config(f"base.source={sight / 'base'}"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: np.zeros((4, 4), np.float32), "number 0 is float32"),
        (lambda: np.zeros(4, np.uint8), r"uint8 \(4,\)"),
        (lambda: "a text", r"str \(\)"),
    ],
    ids=range(3),
)
def test_what_is_no_image_is_not_predicted(seen, made, said):
    with pytest.raises(BadInput, match=said):
        predict(load_run(seen[0]), [made()])


def test_a_stored_position_belongs_to_how_images_are_normalized(config):
    problem = prepare(read(config())).problem
    state = problem.batches([0]).state(3)
    base = dataclasses.replace(
        problem.base, images=dataclasses.replace(problem.wants, std=[0.5] * 3)
    )
    other = dataclasses.replace(problem, base=base)
    with pytest.raises(Corrupt, match="normalized"):
        other.batches([0]).check_state(state)
