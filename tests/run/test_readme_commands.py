"""Every command of the README, typed as it stands where a user would: in a folder of
theirs, one after the other, each a process of its own.

What is added to a line makes it shorter, and nothing else: one pass over few rows, a
token or two of an answer. Where a line names files of its reader's, there are such.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_readme import COMMANDS, ROOT
from tiny_run import write_base

pytestmark = pytest.mark.slow

SHORT = ["optim.epochs=1", "evaluate.latency=false", "evaluate.resamples=100"]
#: Of the default data, two rows of each class, all of one length.
INTENTS = [*SHORT, "data.rows_per_class=2", "data.batching.buckets=[24]"]
#: Of a language model, short rows.
WORDS = [*SHORT, "data.batching.length=48", "loop.select=loss"]
FEW = ["data.train_rows=8", "data.validation_rows=4", "data.test_rows=4"]
#: What a run of few steps needs for ranks to move in it.
MOVING = ["ranks.every=2", "ranks.measure_every=1"]
#: The first that is part of a line makes it shorter; what none is part of runs whole.
SHORTER = {
    "run.preview=true": [],
    "data=table": SHORT,
    "data=values": SHORT,
    "data=digits": [*SHORT, "data.rows_per_class=4"],
    "data=answers": [*WORDS, "evaluate.answers=2"],
    "data=choices": [*SHORT, "data.batching.length=48"],
    "data=text": WORDS,
    "experiment=arithmetic": [*FEW, "data.harder_rows=4", "evaluate.answers=2"],
    "experiment=laptop": [*FEW, "evaluate.answers=2", *SHORT],
    "experiment=rank_lr_reg": [*INTENTS, "delta.rank=2,4", "optim.lr=1e-3", "seed=0"],
    "sweep=halving": [*INTENTS, "optim.epochs=3"],
    " ranks=": [*INTENTS, *MOVING],
    "profile=steps": [*INTENTS, "profile.first=2", "profile.steps=3"],
    "experiments.train": INTENTS,
    "experiments.data_to_text": [*FEW, "steps=2", "answer_tokens=2"],
}
#: A model of the user's own.
MODEL = """
from lowrank.io import hub

def load(num_classes):
    return hub.load("minilm", num_classes=num_classes)
"""
#: What lines ask for besides; those whose package is missing say so.
ASKS = {"experiment=arithmetic": "reasoning_gym"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A user's folder, with files as the README's lines name them."""
    root = tmp_path_factory.mktemp("user")
    shared = ROOT.parent / "shared"
    assert shared.is_dir(), f"{shared}: data that two lines of the README read"
    (root / "shared").symlink_to(shared)
    folder = root / "project"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    words = ["red", "green", "blue", "small", "large", "round", "square", "old"]
    # Each with a word of its own: a text in two splits is refused.
    draw = lambda: " ".join(numbers.choice(words, 6, replace=False))
    texts = [f"{draw()} item{number}" for number in range(80)]
    table = lambda name, head, rows: (folder / name).write_text(
        "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"
    )
    table("mine.csv", "text,label", [(t, t.split()[0]) for t in texts])
    pairs = zip(texts, reversed(texts), strict=True)
    table("pairs.csv", "text,other,label", [(a, b, a[0] == b[0]) for a, b in pairs])
    table("grades.csv", "text,value", [(t, len(t)) for t in texts])
    lines = lambda name, rows: (folder / name).write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    lines("mine.jsonl", [{"question": t, "answer": t.split()[-1]} for t in texts])
    quiz = [{"question": t, "choices": t.split()[:3], "answer": 1} for t in texts]
    lines("quiz.jsonl", quiz)
    (folder / "mine.txt").write_text("\n\n".join(texts))
    (folder / "old.txt").write_text("\n\n".join(t.upper() for t in texts))
    write_base(folder / "my-bert")
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").touch()
    (folder / "mypackage" / "model.py").write_text(MODEL)
    return folder


def absent(name):
    return importlib.util.find_spec(name) is None


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_line_does_what_it_says(command, here):
    line = " ".join(command)
    shorter = next((more for part, more in SHORTER.items() if part in line), [])
    found = subprocess.run(
        [sys.executable, *command[1:], *shorter],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=900,
    )
    missing = [name for part, name in ASKS.items() if part in line and absent(name)]
    said = found.stdout[-2000:] + found.stderr[-4000:]
    if missing:
        assert found.returncode == 2, said
        assert missing[0] in found.stderr, said
    else:
        assert found.returncode == 0, said
