"""A whole run on sums of the package itself, with a tiny language model."""

import pytest
from tiny_language import write_llama
from tiny_run import composed

from lowrank.run.judge import judge
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.gym

SMALL = (
    "experiment=arithmetic",
    "data.config={min_terms: 2, max_terms: 2, max_digits: 1}",
    "data.harder={min_terms: 3, max_terms: 3}",
    "data.train_rows=80",
    "data.validation_rows=10",
    "data.test_rows=12",
    "data.harder_rows=8",
    "data.batching.length=64",
    "data.batching.batch_size=2",
    "delta.targets=decoder/**/kernel",
    "delta.rank=4",
    "optim.epochs=4",
    "optim.lr=0.02",
    "evaluate.answers=2",
    "evaluate.resamples=50",
    "evaluate.latency=false",
    "evaluate.batch_size=4",
)


def test_sums_are_taught_said_verified_and_judged_again(tmp_path):
    config = composed(
        "config",
        *SMALL,
        f"base.source={tmp_path / 'llama'}",
        f"run.directory={tmp_path / 'run'}",
    )
    settings = read(config)
    task = settings.data.load()
    words = [
        word
        for rows in task.splits.values()
        for text in (*rows.questions, *(own[0] for own in rows.answers))
        for word in text.replace(":", " ").replace("-", " - ").split()
    ]
    (tmp_path / "llama").mkdir()
    write_llama(tmp_path / "llama", words=words)
    result = run_trial(config)
    scores = result["scores"]
    assert [*scores] == ["validation", "test", "harder"]
    run = load_run(tmp_path / "run")
    for split in scores:
        kept = run.record.predictions(split)
        rows = task.splits[split].ids
        said = kept["answer"].tolist()
        worth = [task.verify(row, one) for row, one in zip(rows, said, strict=True)]
        assert kept["verified"].tolist() == worth
        found = scores[split]["metrics"]["verified"]
        assert found["estimate"] == pytest.approx(100 * sum(worth) / len(worth))
    again = judge(
        run, evaluation=settings.evaluate, split="harder", merged=True, progress=False
    )
    assert again["data"] == {
        "name": "reasoning-gym/chain_sum", "fingerprint": task.fingerprint,
    }  # fmt: skip
    for name in ("verified", "exact"):
        want = scores["harder"]["metrics"][name]["estimate"]
        assert again["scores"]["harder"]["metrics"][name]["estimate"] == want
