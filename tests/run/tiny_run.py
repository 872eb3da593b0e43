"""A whole run in seconds: a random tiny base, a small table, and what starts them."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
from hydra import compose, initialize_config_dir
from tiny_hf import SPEC, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lowrank.core.errors import LowrankError, Preempted, exit_code
from lowrank.core.trees import flatten
from lowrank.io.bert import BERT
from lowrank.models.encoder import Classifier
from lowrank.run.door import CONF, resolve

ROOT = Path(__file__).parents[2]
KEYWORDS = {
    "animal": ("cat", "dog", "horse", "owl"),
    "color": ("red", "blue", "green", "pink"),
    "weather": ("rain", "snow", "wind", "fog"),
}
FILLERS = tuple(f"word{number}" for number in range(40))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
#: A model of a user's own: plain JAX, weights in a list, nothing of this package.
OWN = """
import jax, jax.numpy as jnp
from tokenizers import Tokenizer
from lowrank.io.hub import Base

TOKENIZER = {tokenizer!r}

def features(params, batch):
    words = params["words"][batch["ids"]]
    mask = batch["mask"][..., None].astype(words.dtype)
    mean = (words * mask).sum(1) / mask.sum(1)
    return jnp.tanh(mean @ params["mix"]["kernel"])

def apply(params, batch):
    return features(params, batch) @ params["out"]["kernel"]

def load(num_classes):
    k = jax.random.split(jax.random.key(0), 2)
    params = {{
        "words": jax.random.normal(k[0], (97, 16)),
        "mix": {{"kernel": jax.random.normal(k[1], (16, 12)) / 4}},
        "out": {{"kernel": jnp.zeros((12, num_classes))}},
    }}
    return Base("own", apply, features, params, Tokenizer.from_file(TOKENIZER),
                fingerprint="own-1", max_length=32, head="out/**")
"""
#: Overrides that make a run small; the tests name only what they are about.
SMALL = (
    "data=table",
    "track=local",
    "data.batching.batch_size=8",
    "data.batching.buckets=[8,16]",
    "optim.epochs=2",
    "optim.lr=0.02",
    "evaluate.resamples=50",
    "evaluate.latency=false",
    "evaluate.batch_size=16",
    "loop.log_every=4",
    "loop.checkpoint_every=3",
)


def write_base(folder, seed=0):
    """A random encoder in the layout of Hugging Face."""
    one = {"ids": np.zeros((1, 2), np.int32), "mask": np.ones((1, 2), bool)}
    model = Classifier(SPEC, 2, pooling="pooler")
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    rng = np.random.default_rng(seed)
    leaves, structure = flatten(shapes)
    draw = lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32)
    gain = lambda path: np.float32(path.endswith("norm/scale"))
    params = structure.unflatten(
        {path: draw(leaf) + gain(path) for path, leaf in leaves.items()}
    )
    # As after pretraining, words of one kind lie together.
    kinds = rng.normal(scale=3.0, size=(len(KEYWORDS), 1, SPEC.d_model))
    words = params["encoder"]["embeddings"]["word"]["embedding"]
    words[len(SPECIAL) : len(SPECIAL) + 12].reshape(3, 4, -1)[:] += kinds
    keywords = [word for words in KEYWORDS.values() for word in words]
    words = {word: n for n, word in enumerate((*SPECIAL, *keywords, *FILLERS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return write_folder(folder, BERT.to_hf(params), tokenizer)


def write_table(file, rows_per_class=30, seed=0, classes=tuple(KEYWORDS)):
    """A CSV file whose labels follow from one word of each text."""
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for label in classes:
        for number in range(rows_per_class):
            count = 3 if number % 3 else 9
            words = [*rng.choice(FILLERS, count), rng.choice(KEYWORDS[label])]
            lines.append(f"{' '.join(rng.permutation(words))},{label}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


class World:
    """A base, a table and a cache; composes configs that use them.

    Attributes:
      base, table, cache, runs: Paths.
    """

    def __init__(self, folder):
        self.base = write_base(folder / "base")
        self.table = write_table(folder / "table.csv")
        self.cache = folder / "cache"
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True)
        self.compiled = folder / "compiled"

    def write_own_model(self, folder):
        """The folder with `own_model:load` in it, which reads the words of the base."""
        source = OWN.format(tokenizer=str(self.base / "tokenizer.json"))
        (folder / "own_model.py").write_text(source)
        return folder

    def overrides(self, *overrides):
        """The arguments of a small run on the command line."""
        return [
            f"base.source={self.base}",
            f"data.path={self.table}",
            f"run.cache={self.cache}",
            f"run.root={self.runs}",
            *overrides,
        ]

    def config(self, *overrides):
        """What a command with these overrides would be given."""
        given = self.overrides(*overrides)
        if not any(one.startswith("delta=") for one in overrides):
            given.insert(0, "delta.rank=4")
        return composed("config", *SMALL, *given)

    @property
    def environment(self):
        """The environment of a child process."""
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # As in the tests' own process, or nothing compiled there is of use.
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "WANDB_MODE": "offline",
            "HF_HUB_OFFLINE": "1",
        }

    def command(self, door, *arguments, **more):
        """Runs a door as its users do."""
        return subprocess.run(
            [sys.executable, "-m", f"experiments.{door}", *arguments],
            cwd=ROOT,
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=180,
        )


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return dict(resolve(compose(name, overrides=list(overrides))))


@contextlib.contextmanager
def counting_compilations():
    """Collects one entry per program that XLA is asked for, cached or not."""
    found = []

    def listen(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(more.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Children that share their imports: a fork of one process that has them already.


def _run(config, environment, output):
    """The body of a child: one trial, as the door would run it."""
    os.environ.update(environment)
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 2)
    from lowrank.run.trial import run_trial
    from lowrank.train.guard import end_at_next_signal

    for name, value in {
        "jax_num_cpu_devices": 8,
        "jax_compilation_cache_dir": environment["JAX_COMPILATION_CACHE_DIR"],
        "jax_persistent_cache_min_compile_time_secs": 0,
    }.items():
        jax.config.update(name, value)
    try:
        run_trial(config)
    except LowrankError as error:
        if isinstance(error, Preempted):
            end_at_next_signal()
        sys.stderr.write(str(error))
        sys.stderr.flush()
        os._exit(exit_code(error))
    os._exit(0)


def start_child(world, config, output):
    """Starts a trial in a process of its own; kill it, signal it, join it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_run", "lowrank.run.trial"])
    child = context.Process(
        target=_run, args=(config, world.environment, str(output)), daemon=True
    )
    child.start()
    return child


def position(directory):
    """The newest step in a run directory, as seen from outside."""
    found = [int(p.name) for p in directory.glob("checkpoints/*") if p.name.isdigit()]
    return max(found, default=-1)


def wait_until(condition, child, seconds=90):
    """Waits while the child lives; whether the condition came true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if not child.is_alive():
            return False
        time.sleep(0.01)
    raise TimeoutError(f"nothing happened in {seconds} s")


def estimates(scores):
    """Numbers of a split, as a run's result has them."""
    found = {name: value["estimate"] for name, value in scores["metrics"].items()}
    # Of a class with few rows the recall is not defined.
    return {name: value for name, value in found.items() if value is not None}


def metric_rows(directory):
    """Lines of metrics.jsonl without their times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "time"} for line in lines
    ]


def predictions(directory, split):
    """The stored arrays of a split."""
    with np.load(directory / "predictions" / f"{split}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def same_outcome(first, second):
    """Asserts that two run directories hold the same run, bit for bit."""
    results = [json.loads((d / "result.json").read_text()) for d in (first, second)]
    for name in ("state", "scores", "steps", "best_step", "skipped_steps"):
        assert results[0][name] == results[1][name], name
    rows = metric_rows(first), metric_rows(second)
    for one, two in zip(*rows, strict=True):
        assert one == two, f"{one} is not {two}"
    for split in results[0]["scores"]:
        one, two = predictions(first, split), predictions(second, split)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
