"""Matrices that stretch or shrink one axis of an image, as plain numbers.

An image is resampled along one axis after the other: each new row is a weighted sum of
old ones. The weights depend on sizes alone, so they are constants of a program.
"""

import numpy as np
from jaxtyping import Float64

#: Keys' parameter of the cubic, as PyTorch has it (`torch.nn.functional.interpolate`).
CUBIC = -0.75
#: What weights of `triangle` are multiples of: their sums with whole numbers are exact
#: in float64 in any order, and so the same on every machine.
GRAIN = 4096


def bicubic(old: int, new: int) -> Float64[np.ndarray, "new old"]:
    r"""Weights of cubic interpolation, without smoothing where an axis shrinks.

    New place i lies at :math:`x = (i + 1/2) \, old / new - 1/2`; the four old places
    around x count by Keys' cubic kernel, those beyond the border as the border's. With
    equal sizes it is the identity.

    Source: Keys, 1981, https://doi.org/10.1109/TASSP.1981.1163711, with a = -0.75, as
    `interpolate(mode="bicubic", align_corners=False)` has it.

    Args:
      old: Places that there are.
      new: Places that are wanted.
    """
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        place = first + offset
        np.add.at(
            weights,
            (np.arange(new), np.clip(place, 0, old - 1)),
            _cubic(np.abs(at - place)),
        )
    return weights


def _cubic(x: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def triangle(old: int, new: int) -> Float64[np.ndarray, "new old"]:
    r"""Weights of linear interpolation that smooths where an axis shrinks.

    New place i lies at :math:`x = (i + 1/2) \, old / new - 1/2`; old place j counts
    :math:`1 - |j - x| / s`, cut at 0 and normalized, with s = max(1, old / new): what
    Pillow calls BILINEAR. Weights are rounded to multiples of 1 / `GRAIN` that add up
    to 1.

    Args:
      old: Places that there are.
      new: Places that are wanted.
    """
    at = (np.arange(new)[:, None] + 0.5) * (old / new) - 0.5
    reach = max(1.0, old / new)
    raw = np.maximum(0.0, 1.0 - np.abs(np.arange(old)[None] - at) / reach)
    raw /= raw.sum(axis=1, keepdims=True)
    whole = np.rint(raw * GRAIN)
    rest = GRAIN - whole.sum(axis=1)
    whole[np.arange(new), raw.argmax(axis=1)] += rest
    return whole / GRAIN
