"""What a model says is judged by the verifier of its data, wherever it is judged."""

from pathlib import Path

import fake_gym
import numpy as np
import pytest
from tiny_language import write_llama
from tiny_run import composed

from lowrank.core.errors import BadInput
from lowrank.run.judge import evaluate_run, judge
from lowrank.run.packs import run_pack
from lowrank.run.prepare import prepare
from lowrank.run.saying import Said
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

SMALL = (
    "base=smollm2",
    "data=reasoning_gym",
    "track=local",
    "data.task=sizes",
    "data.harder={min_words: 5, max_words: 6}",
    "data.train_rows=48",
    "data.validation_rows=10",
    "data.test_rows=12",
    "data.harder_rows=9",
    "data.batching.length=32",
    "data.batching.batch_size=2",
    "delta.targets=decoder/**/kernel",
    "delta.rank=4",
    "delta.alpha=8",
    "optim.lr=0.02",
    "optim.epochs=4",
    "loop.select=loss",
    "loop.evaluate_every=24",
    "evaluate.answers=4",
    "evaluate.resamples=50",
    "evaluate.latency=false",
    "evaluate.batch_size=4",
)
SPLITS = {"validation": 10, "test": 12, "harder": 9}


@pytest.fixture(scope="module", autouse=True)
def package():
    with pytest.MonkeyPatch.context() as patch:
        fake_gym.install(patch)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("verified")
    write_llama(root)

    def made(*overrides, run="runs"):
        own = (f"base.source={root}", f"run.root={root / run}")
        return composed("config", *SMALL, *own, *overrides)

    return made


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, run_trial(config(f"run.directory={directory}"))


def worth(question, said):
    """The rule of the stand-in, told once more."""
    last, words = question.split()[-2], said.split()
    if not words:
        return 0.0
    size = ("big", "small")[len(last) % 2]
    return ((words[0] == last) + (words[-1] == size)) / 2


def verified(result, split):
    return result["scores"][split]["metrics"]["verified"]


def test_every_split_is_judged_by_the_verifier(finished):
    directory, result = finished
    assert [*result["scores"]] == [*SPLITS]
    run = load_run(directory)
    task = prepare(run.settings).problem.task
    seen = set()
    for split, count in SPLITS.items():
        kept = run.record.predictions(split)
        questions = task.splits[split].questions
        rows = zip(questions, kept["answer"].tolist(), strict=True)
        by_hand = [worth(question, said) for question, said in rows]
        assert len(by_hand) == count == result["scores"][split]["num_rows"]
        assert kept["verified"].tolist() == by_hand
        found = verified(result, split)
        assert found["estimate"] == pytest.approx(100 * np.mean(by_hand))
        if len({*by_hand}) > 1:
            assert found["low"] <= found["estimate"] <= found["high"]
        seen |= {*by_hand}
        assert {"bleu", "exact"} <= {*result["scores"][split]["metrics"]}
    assert len(seen) > 1, "what it says is not all worth the same"
    assert result["data"]["rows"] == {"train": 48, **SPLITS}


def test_the_mean_of_what_was_said_by_hand(config):
    problem = prepare(read(config())).problem
    rows = problem.task.splits["harder"]
    right = [answers[0] for answers in rows.answers]
    said = [*right[:4], *(f"{one.split()[0]} is red" for one in right[4:7]), "", "red"]
    found = problem.compared("harder", Said(tuple(said), None), resamples=50, level=0.9)
    assert found["verified"]["estimate"] == pytest.approx(100 * (4 + 3 / 2) / 9)
    assert found["exact"]["estimate"] == pytest.approx(100 * 4 / 9)
    assert problem.verified("harder", Said(tuple(said), None)) == [
        *[1.0] * 4, *[0.5] * 3, 0.0, 0.0,
    ]  # fmt: skip


def test_a_run_that_is_opened_is_judged_alike(finished):
    directory, result = finished
    run = load_run(directory)
    for merged in (False, True):
        again = judge(
            run,
            evaluation=run.settings.evaluate,
            split="harder",
            merged=merged,
            progress=False,
        )
        assert again["data"]["fingerprint"] == result["data"]["fingerprint"]
        assert verified(again, "harder") == verified(result, "harder")


def test_packs_judge_alike_and_keep_what_is_held_out_sealed(config, finished, tmp_path):
    """Sealed trials of a pack, opened one by one, are the trials alone."""
    each = [
        read(config(f"seed={seed}", "evaluate.test=false", run="packed"))
        for seed in (0, 1)
    ]
    packed = run_pack(each, folder=tmp_path / "pack")
    _, alone = finished
    for settings, one in zip(each, packed, strict=True):
        assert one.error is None
        assert [*one.result["scores"]] == ["validation"]
        assert "verified" in one.result["scores"]["validation"]["metrics"]
        if settings.seed == 0:
            found = verified(one.result, "validation")
            assert found["estimate"] == verified(alone, "validation")["estimate"]
            directory = Path(settings.run.root) / settings.trial_id
            config_of = {
                "run": {"directory": str(directory), "progress": False},
                "evaluate": {"answers": 4, "resamples": 50},
                "split": "harder",
            }
            opened = verified(evaluate_run(config_of), "harder")
            assert opened["estimate"] == verified(alone, "harder")["estimate"]


def test_data_without_a_verifier_are_not_verified(config, tmp_path):
    rows = [f"name {word} as,{word} is big" for word in fake_gym.WORDS * 2]
    (tmp_path / "own.csv").write_text("\n".join(["question,answer", *rows]))
    given = config()
    given["data"] = {
        "name": "answers", "path": str(tmp_path / "own.csv"), "test_share": 0.3,
        "batching": {"batch_size": 2, "length": 32},
    }  # fmt: skip
    problem = prepare(read(given)).problem
    said = Said(tuple("x" for _ in problem.task.splits["test"].ids), None)
    assert problem.verified("test", said) is None
    assert "verified" not in problem.compared("test", said, resamples=50, level=0.9)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # The longest question has 8 words, and two more of the template.
        (["evaluate.answers=55"], "more than 64"),
        (["data.task=evaluates"], "may run what a model says"),
        (["data.harder={min_words: 40, max_words: 40}"], "more than 32"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_be_is_said_before_there_is_a_directory(
    config, tmp_path, overrides, said
):
    with pytest.raises(BadInput, match=said):
        run_trial(config(*overrides, f"run.directory={tmp_path / 'none'}"))
    assert not (tmp_path / "none").exists()
