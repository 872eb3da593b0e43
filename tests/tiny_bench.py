"""A base and a setting that a benchmark is through with at once."""

import jax
import numpy as np

from experiments.bench.setting import Setting
from lowrank.io.hub import Base
from lowrank.models.encoder import Classifier, EncoderSpec

TINY = EncoderSpec(
    vocab_size=61, d_model=12, num_layers=2, num_heads=3, d_ff=20, max_positions=16
)
SETTING = Setting(batch=5, seq=8, rank=2, num_classes=7)


def tiny_base() -> Base:
    """Six maps and a head, drawn at random."""
    model = Classifier(TINY, SETTING.num_classes)
    one = {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)}
    params = model.init(jax.random.key(3), one)["params"]
    # Far from the fresh 0.02, so that attention and GELU leave their linear range.
    params = jax.tree.map(lambda p: 15 * p if p.ndim > 1 else p, params)
    return Base(
        name="tiny",
        apply=lambda p, batch: model.apply({"params": p}, batch),
        features=lambda p, batch: model.apply({"params": p}, batch, method="features"),
        params=params,
        tokenizer=None,
        fingerprint="",
        max_length=TINY.max_positions,
        spec=TINY,
    )
