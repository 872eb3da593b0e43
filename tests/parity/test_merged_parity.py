"""Merged runs, opened by transformers alone, say what the runs said."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

# The worlds of whole runs are those of their own tests.
sys.path.append(str(Path(__file__).parents[1] / "run"))

import tiny_language
import tiny_vision
from tiny_run import SMALL, World, composed

from lowrank.run.merging import write_merged
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.parity
TEXTS = ["word3 cat word1", "word1 snow", "word9 word9 red word2 word4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def tokens(run):
    """Rows padded to one width."""
    rows = [run.base.tokenizer.encode(text).ids for text in TEXTS]
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    return ids, np.array([[n < len(row) for n in range(width)] for row in rows])


def test_classes(world, tmp_path):
    directory = world.runs / "classes"
    run_trial(world.config("base.pooling=pooler", f"run.directory={directory}"))
    run = load_run(directory)
    out = write_merged(run, tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert type(model).__name__ == "BertForSequenceClassification"
    assert [model.config.id2label[n] for n in range(3)] == list(run.classes)
    ids, mask = tokens(run)
    with torch.no_grad():
        found = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    wanted = np.stack([row["logits"] for row in predict(run, TEXTS)])
    # Merged weights round once more, in another order of sums.
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)


def test_numbers_come_out_in_their_own_unit(world, tmp_path):
    rng = np.random.default_rng(0)
    worth = {"cat": 1000.0, "snow": 1400.0, "red": 1200.0}
    rows = [
        f'{{"text": "word{rng.integers(9)} {word}", "value": {worth[word] + n}}}'
        for n in range(30)
        for word in worth
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    directory = world.runs / "numbers"
    own = [one for one in SMALL if one != "data=table"]
    where = [f"base.source={world.base}", f"run.cache={world.cache}"]
    run_trial(
        composed(
            "config", "data=values", f"data.path={path}", "loop.select=rmse",
            "base.pooling=pooler", f"run.directory={directory}", *own, *where,
        )
    )  # fmt: skip
    run = load_run(directory)
    out = write_merged(run, tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    ids, mask = tokens(run)
    with torch.no_grad():
        found = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    wanted = [row["value"] for row in predict(run, TEXTS)]
    # Numbers around a thousand.
    np.testing.assert_allclose(found[:, 0].numpy(), wanted, rtol=1e-5)


def test_images(world, tmp_path):
    tiny_vision.write_base(tmp_path / "base")
    tiny_vision.write_images(tmp_path / "images")
    directory = world.runs / "images"
    run_trial(
        composed(
            "config", "data=images", f"data.path={tmp_path / 'images'}", "track=local",
            f"base.source={tmp_path / 'base'}", "base.pooling=both", "optim.epochs=1",
            "evaluate.latency=false", "evaluate.resamples=20", "delta.rank=4",
            "data.batching.batch_size=8", f"run.directory={directory}",
            f"run.cache={world.cache}",
        )
    )  # fmt: skip
    run = load_run(directory)
    out = write_merged(run, tmp_path / "m")
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    pixels = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        found = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).logits
    wanted = run.logits({"pixels": pixels})
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)
    assert model.config.id2label[0] == run.classes[0]


def test_language(world, tmp_path):
    for name in ("llama", "data"):
        (tmp_path / name).mkdir()
    tiny_language.write_llama(tmp_path / "llama")
    tiny_language.write_meanings(tmp_path / "data")
    directory = world.runs / "language"
    run_trial(
        composed(
            "config", "experiment=laptop", f"base.source={tmp_path / 'llama'}",
            f"data.path={tmp_path / 'data'}", "data.train_rows=null",
            "data.validation_rows=null", "data.test_rows=null", "delta.rank=4",
            "data.batching.length=64", "data.batching.batch_size=2", "optim.epochs=1",
            "delta.targets=decoder/**/kernel", "optim.lr=0.02", "evaluate.answers=null",
            "evaluate.latency=false", "evaluate.resamples=20", "track=local",
            f"run.directory={directory}", f"run.cache={world.cache}",
        )
    )  # fmt: skip
    run = load_run(directory)
    out = write_merged(run, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    AutoTokenizer.from_pretrained(out)
    ids = np.random.default_rng(0).integers(1, run.base.spec.vocab_size, (2, 12))
    with torch.no_grad():
        found = model(torch.tensor(ids)).logits
    merged = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    wanted = run.base.apply(merged, {"ids": jnp.asarray(ids), "mask": ids > 0})
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)
