"""Tokens and factors that all arms of `bench.decoder` share, from names and a seed."""

import zlib

import numpy as np

from experiments.bench.setting import Setting


def draw_tokens(setting: Setting, vocab_size: int) -> np.ndarray:
    """Rows of tokens, (batch, seq), without the first ones, which are often special."""
    rng = np.random.default_rng(setting.seed)
    first = min(vocab_size // 2, 100)
    shape = (setting.batch, setting.seq)
    return rng.integers(first, vocab_size, shape, np.int32)


def draw_factors(
    setting: Setting, module: str, d_in: int, d_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """A module's factors, (rank, d_in) and (rank, d_out).

    The second start small instead of at zero, so that every gradient differs from zero
    from the first step on.
    """
    rng = np.random.default_rng([setting.seed, zlib.crc32(module.encode())])
    bound = d_in**-0.5
    a = rng.uniform(-bound, bound, (setting.rank, d_in))
    b = rng.uniform(-1e-3, 1e-3, (setting.rank, d_out))
    return a.astype(np.float32), b.astype(np.float32)
