"""Texts as they are as a trial, and what a model forgets while it learns others."""

import numpy as np
import pytest
from tiny_language import WORDS, write_llama
from tiny_run import composed

from lowrank.core.errors import BadInput
from lowrank.run.judge import judge
from lowrank.run.prepare import prepare
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

NAMES = WORDS[23:27]


def sentences(rng, count):
    """One kind of sentence, which can be learned."""
    return [
        f"{rng.choice(NAMES)} is the {rng.choice(['big', 'small'])} red one"
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    (root / "llama").mkdir()
    write_llama(root / "llama")
    rng = np.random.default_rng(0)
    (root / "own.txt").write_text("\n\n".join(sentences(rng, 60)))
    words = rng.permutation(WORDS[4:20])
    (root / "known.txt").write_text("\n\n".join(" ".join(words[n:]) for n in range(8)))
    return root


@pytest.fixture(scope="module")
def config(place):
    def made(*overrides):
        return composed(
            "config", "base=smollm2", "data=text", "track=local",
            f"base.source={place / 'llama'}", f"data.path={place / 'own.txt'}",
            f"run.root={place / 'runs'}", f"run.cache={place / 'cache'}",
            "data.batching.length=16", "data.batching.batch_size=4",
            "delta.targets=decoder/**/kernel", "delta.rank=4", "optim.lr=0.02",
            "optim.epochs=3", "evaluate.resamples=50", "evaluate.latency=false",
            "evaluate.batch_size=8", "loop.select=loss", *overrides,
        )  # fmt: skip

    return made


def test_texts_are_learned_and_what_is_lost_is_told(config, place):
    directory = place / "run"
    own = (f"run.directory={directory}", f"evaluate.known={place / 'known.txt'}")
    result = run_trial(config(*own))
    test = result["scores"]["test"]["metrics"]
    known = result["scores"]["known"]["metrics"]
    assert test["loss"]["estimate"] < 0.7 * known["base_loss"]["estimate"]
    lost = known["loss"]["estimate"] - known["base_loss"]["estimate"]
    np.testing.assert_allclose(known["rise"]["estimate"], lost, rtol=1e-6)
    assert known["rise"]["low"] < known["rise"]["estimate"] < known["rise"]["high"]
    run = load_run(directory)
    for merged in (False, True):
        again = judge(
            run, evaluation=run.settings.evaluate, merged=merged, progress=False
        )
        for split in ("test", "known"):
            for name, value in again["scores"][split]["metrics"].items():
                np.testing.assert_allclose(
                    value["estimate"],
                    result["scores"][split]["metrics"][name]["estimate"],
                    rtol=1e-3, atol=1e-4,
                )  # fmt: skip


def test_what_the_base_knew_is_its_own_loss(config, place):
    """Without a correction nothing is lost; the loss is the one by hand."""
    problem = prepare(read(config(f"evaluate.known={place / 'known.txt'}"))).problem
    (one,) = problem.kept(problem._alone())
    found = one.report(resamples=50, level=0.95)
    assert found["metrics"]["rise"]["estimate"] == 0
    total, count = 0.0, 0
    for ids in problem.known.spoken.ids:
        logits = problem.base.apply(
            problem.base.params,
            {"ids": ids[None, :-1], "mask": np.ones((1, len(ids) - 1), bool)},
        )
        log_p = np.asarray(logits - np.logaddexp.reduce(logits, -1, keepdims=True))[0]
        total -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    np.testing.assert_allclose(
        found["metrics"]["loss"]["estimate"], total / count, rtol=1e-5
    )
    assert found["num_tokens"] == count


def test_what_cannot_be_is_said_first(world, config, place):
    with pytest.raises(BadInput, match=r"evaluate\.known = 'nowhere' cannot be read"):
        prepare(read(config("evaluate.known=nowhere")))
    with pytest.raises(BadInput, match="is for language models"):
        read(world.config("evaluate.known=x.txt"))
    with pytest.raises(BadInput, match="is for questions"):
        read(config("evaluate.answers=4"))
    with pytest.raises(BadInput, match="more than 64"):
        prepare(read(config("data.batching.length=80")))
