"""Teachers that differ from a base by corrections of known ranks.

    h <- h + tanh(h W_l) P_l / sqrt(L)            for l = 1..L, from h = x

The base has W_l; the teacher has W_l + c U_l S_l V_l with orthonormal U_l, V_l of rank
r*_l, so an oracle knows which ranks a student needs. Where all W_l are square there is
no P_l. Targets have Gaussian noise in training and none where they are judged by.

Everything is drawn with NumPy from (base) or (base, seed), whatever trains on it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank.core.errors import BadInput
from lowrank.data.rows import Rows

WIDTH = 32
#: Ranks of the corrections, dealt to the layers by a permutation of the seed's own.
MIXED = (0, 0, 1, 8, 0, 1, 4, 2)
EQUAL = (2,) * 8
#: Streams of random numbers that must not depend on one another.
_BASE, _TEACHER, _TRAIN, _TEST = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of teacher.

    Attributes:
      ranks: Of the corrections, permuted by the seed.
      widths: Outputs of the layers before they return to `WIDTH`, taken in turn.
      amplitude: c, the root mean square of a correction's singular values.
      decay: S_k is proportional to (1 + k)^-decay.
      anisotropy: Variances of the inputs are proportional to i^-anisotropy along the
        directions of a random basis, and 1 on average.
    """

    ranks: tuple[int, ...] = MIXED
    widths: tuple[int, ...] = (WIDTH,)
    amplitude: float = 1.0
    decay: float = 0.0
    anisotropy: float = 0.0

    def outputs(self, layer: int) -> int:
        """Outputs of a layer's weight."""
        return self.widths[layer % len(self.widths)]

    @property
    def square(self) -> bool:
        """Whether layers return to the stream by themselves."""
        return {*self.widths} == {WIDTH}


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A base, and what one seed makes of it.

    Attributes:
      params: Of the base: {"layer0": {"kernel", and "back" unless square}, ...}.
      corrections: What the teacher adds to each kernel.
      ranks: Of the corrections, by the path of their weight.
      train, test: Rows; the targets of `test` have no noise.
    """

    params: Mapping[str, Mapping[str, np.ndarray]]
    corrections: Sequence[np.ndarray]
    ranks: Mapping[str, int]
    train: Rows
    test: Rows


def apply(params: Mapping[str, Any], x: Float[Array, "rows width"]) -> Array:
    """The model as plain JAX: what is adapted."""
    h = x
    for layer in range(len(params)):
        own = params[f"layer{layer}"]
        out = jnp.tanh(h @ own["kernel"])
        h = h + (out @ own["back"] if "back" in own else out) / np.sqrt(len(params))
    return h


def draw_base(family: Family, base: int) -> dict[str, dict[str, np.ndarray]]:
    """The weights of a base: Gaussian, such that activations keep their size."""
    rng = np.random.default_rng((_BASE, base))
    found: dict[str, dict[str, np.ndarray]] = {}
    for layer in range(len(family.ranks)):
        width = family.outputs(layer)
        own = {"kernel": rng.normal(size=(WIDTH, width)) / np.sqrt(WIDTH)}
        if not family.square:
            own["back"] = rng.normal(size=(width, WIDTH)) / np.sqrt(width)
        found[f"layer{layer}"] = {n: x.astype(np.float32) for n, x in own.items()}
    return found


def draw(
    family: Family, base: int, seed: int, *, rows: int, noise: float, test_rows: int
) -> Teacher:
    """A teacher with its data.

    Args:
      family: Its kind.
      base: Number of the base.
      seed: Of corrections, inputs and noise, each from a stream of its own.
      rows: Training rows.
      noise: Standard deviation of the training targets' noise.
      test_rows: Rows to be judged on.

    Raises:
      BadInput: A rank is larger than the weight that it is to correct.
    """
    params = draw_base(family, base)
    rng = np.random.default_rng((_TEACHER, base, seed))
    ranks = [int(rank) for rank in rng.permutation(family.ranks)]
    corrections = []
    for layer, rank in enumerate(ranks):
        shape = (WIDTH, family.outputs(layer))
        if not 0 <= rank <= min(shape):
            raise BadInput(
                f"layer {layer} of the teacher is to have a correction of rank {rank}, "
                f"and its weight is {shape[0]} x {shape[1]}; give smaller ranks"
            )
        u, v = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in shape)
        corrections.append((u * spectrum(family, rank)) @ v.T)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    kernels = {
        name: {**own, "kernel": own["kernel"] + change}
        for (name, own), change in zip(params.items(), corrections, strict=True)
    }

    def sample(stream: int, count: int, noise: float) -> Rows:
        own = np.random.default_rng((stream, base, seed))
        x = own.normal(size=(count, WIDTH)) * deviations(family)
        x = x @ basis.T if family.anisotropy else x
        y = forward(kernels, x) + noise * own.normal(size=(count, WIDTH))
        return Rows(x.astype(np.float32), y.astype(np.float32))

    return Teacher(
        params,
        corrections,
        {f"layer{layer}/kernel": rank for layer, rank in enumerate(ranks)},
        sample(_TRAIN, rows, noise),
        sample(_TEST, test_rows, 0.0),
    )


def spectrum(family: Family, rank: int) -> Float[np.ndarray, " rank"]:
    """Singular values of a correction; its Frobenius norm is c sqrt(rank)."""
    values = (1.0 + np.arange(rank)) ** -family.decay
    size = np.sqrt(np.mean(values**2)) if rank else 1.0
    return family.amplitude * values / size


def deviations(family: Family) -> Float[np.ndarray, " width"]:
    """Standard deviations of inputs along their directions; mean square 1."""
    variances = (1.0 + np.arange(WIDTH)) ** -family.anisotropy
    return np.sqrt(variances / variances.mean())


def forward(
    params: Mapping[str, Mapping[str, np.ndarray]],
    x: Float[np.ndarray, "rows width"],
) -> Float[np.ndarray, "rows width"]:
    """`apply` in NumPy and float64: what targets are made with."""
    h = x.astype(np.float64)
    for own in params.values():
        out = np.tanh(h @ own["kernel"].astype(np.float64))
        h = h + (out @ own["back"] if "back" in own else out) / np.sqrt(len(params))
    return h
