"""The folder of a tiny base."""

import jax
import numpy as np
import pytest
from tiny_base import fresh, write

from lowrank.io.bert import BERT


@pytest.fixture(scope="session")
def original():
    """Its weights."""
    params = fresh()
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture
def folder(tmp_path, original):
    """As a user has it."""
    return write(tmp_path / "base", BERT.to_hf(original))
