"""A small adapted model of plain functions, with batches, for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.deltas.lora import LoRA
from lowrank.run.forward import inputs_of, on_inputs

# Primes, so that a shape in a program's text can only be what it is.
VOCAB, WIDTH, HIDDEN, CLASSES = 23, 13, 17, 5


def apply(params, batch):
    x = params["embed"][batch["ids"]]
    mask = batch["mask"][..., None].astype(x.dtype)
    x = (x * mask).sum(axis=1) / mask.sum(axis=1)
    x = jnp.tanh(x @ params["up"])
    return x @ params["head"]


def make(dropout=0.0, rank=3, max_rank=None, delta=None):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "up": jax.random.normal(keys[1], (WIDTH, HIDDEN)) / np.sqrt(WIDTH),
        "head": jnp.zeros((HIDDEN, CLASSES)),
    }
    example = inputs_of(batch(0))
    delta = delta or LoRA(dropout=dropout)
    rules = [Train("head", init="dense"), Rule("up", delta, rank, max_rank)]
    return attach(apply, params, example, rules=rules)


def model_of(adapted):
    return on_inputs(adapted.apply, inputs_of)


def batch(seed, rows=8, seq=6, padding=0):
    rng = np.random.default_rng(seed)
    real = np.arange(rows) < rows - padding
    return {
        "ids": rng.integers(0, VOCAB, (rows, seq)).astype(np.int32),
        "mask": np.ones((rows, seq), bool),
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "weight": real.astype(np.float32),
        "index": np.where(real, np.arange(rows), -1).astype(np.int32),
    }


def stack(batches):
    return {name: np.stack([b[name] for b in batches]) for name in batches[0]}


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)
