"""What training measures for allocators, and how signals are made from arrays.

An importance names the signals it needs, training measures only those. A signal with
one number per component is the flat vector of `slots`. What needs the model (gate
gradients, ablation) is measured there; what follows from factors alone is here.

The gradient is always the task's: penalties have no say in what matters.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowrank.allocate import decompose
from lowrank.deltas.contraction import contract
from lowrank.deltas.thin import Terms


@dataclasses.dataclass(frozen=True)
class Signal:
    """A quantity that can be measured.

    Attributes:
      what: What it is, and in what shape.
      cost: What measuring it once costs beyond a training step.
    """

    what: str
    cost: str


SIGNALS: Mapping[str, Signal] = {
    "factors": Signal("path -> factor -> array, as trained", "nothing"),
    "gradients": Signal("of the task, alike", "nothing: the step has them"),
    "gate_gradient": Signal(
        "components: mean over examples of dL/dg_j",
        "max_rank numbers per example: the step's own pass",
    ),
    "gate_fisher": Signal(
        "components: mean over examples of (dl_n/dg_j)^2",
        "max_rank numbers per example: the step's own pass",
    ),
    "norms": Signal("components: |c_j| |a_j| |b_j|", "O(max_rank (d_in + d_out))"),
    "activations": Signal(
        "components: c_j^2 |b_j|^2 G_jj, G the Gram matrix of u = x a^T over a batch",
        "max_rank^2 numbers per layer: the step's own pass, and a product more",
    ),
    "spectrum": Signal(
        "components: singular values of each layer's correction, falling",
        "O(max_rank^2 (d_in + d_out)) and an SVD of max_rank x max_rank",
    ),
    "variance": Signal(
        "components: shares of input variance along principal directions, falling",
        "forward passes, then an eigendecomposition of d_in x d_in, once",
    ),
    "first_gradient": Signal(
        "components: squared singular values of dL/dW at the start, falling",
        "passes with the dense gradient, and an SVD of every weight, once",
    ),
    "ablation": Signal(
        "components: loss with g_j = 0 minus loss", "a forward pass per component"
    ),
}

#: Signals that are measured once, before the first step.
ONCE = frozenset({"variance", "first_gradient"})


def norms(terms: Terms) -> Float[Array, "layers max_rank"]:
    """||c_j a_j b_j||_F = |c_j| |a_j| |b_j|, without forming the product."""
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
    return jnp.abs(terms.c) * length(terms.a) * length(terms.b)


def energies(
    terms: Terms, gram: Float[Array, "layers max_rank max_rank"]
) -> Float[Array, "layers max_rank"]:
    """sum_t ||c_j u_tj b_j||^2 = c_j^2 |b_j|^2 G_jj with G = sum_t u_t^T u_t.

    What every component adds to the outputs of its weight, on the inputs that there
    are, u_t = x_t a^T: a norm that is weighed by how far inputs reach into a_j. With
    the rest of G it would be sum_jk c_j c_k (b_j b_k) G_jk, the energy of the whole
    correction, which ranks layers in LoRA-drop (Zhou et al. 2024, arXiv:2402.07721).
    Those terms belong to no component alone, and are left out.
    """
    moments = jnp.diagonal(gram, axis1=-2, axis2=-1)
    return jnp.square(terms.c) * jnp.sum(jnp.square(terms.b), axis=-1) * moments


def core(terms: Terms) -> tuple[Array, Array, Array]:
    """Q_a, Q_b and the small matrix M with sum_r c_r a_r b_r = Q_a M Q_b^T, per layer.

    Of A^T = Q_a R_a and (C B)^T = Q_b R_b follows M = R_a R_b^T, max_rank wide.
    Through QR and not through Gram matrices, which would square the condition and lose
    half of the digits of small singular values.
    """
    across = lambda x: lax.transpose(x, (0, 2, 1))
    q_a, r_a = decompose.qr(across(terms.a))
    q_b, r_b = decompose.qr(across(terms.c[..., None] * terms.b))
    precision = lax.Precision.HIGHEST
    return q_a, q_b, contract("lir", "ljr", "lij", r_a, r_b, r_a.dtype, precision)


def spectra(
    sites: Mapping[str, Terms],
) -> dict[str, Float[Array, "layers max_rank"]]:
    """Singular values of every layer's correction, falling, filled up with zeros.

    As from `core`, but of all sites together.
    """
    thin = [x for t in sites.values() for x in (t.a, t.c[..., None] * t.b)]
    found = decompose.together(decompose.triangle, thin)
    exact = lax.Precision.HIGHEST
    widest = max((r.shape[-1] for r in found), default=0)
    middle = []
    for r_a, r_b in zip(found[::2], found[1::2], strict=True):
        m = contract("lir", "ljr", "lij", r_a, r_b, r_a.dtype, exact)
        missing = (0, widest - m.shape[-1])
        middle.append(jnp.pad(m, ((0, 0), missing, missing)))
    values = decompose.together(decompose.singular_values, middle)
    return {
        path: value[:, : terms.c.shape[-1]]
        for (path, terms), value in zip(sites.items(), values, strict=True)
    }


def stable_rank(values: Float[Array, "*layers max_rank"]) -> Float[Array, "*layers"]:
    """sum s^2 / s_1^2; zero where there is no correction."""
    largest = jnp.max(values, axis=-1)
    safe = jnp.where(largest > 0, largest, 1)
    return jnp.sum(jnp.square(values / safe[..., None]), axis=-1)


def effective_rank(values: Float[Array, "*layers max_rank"]) -> Float[Array, "*layers"]:
    """exp(-sum p log p), p = s / sum s (Roy & Vetterli 2007); zero for no correction.

    1 <= stable rank <= effective rank <= rank for whatever is not zero.
    """
    total = jnp.sum(values, axis=-1)
    p = values / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def explained_variance(
    gram: Float[Array, "*layers d_in d"], max_rank: int
) -> Float[Array, "*layers max_rank"]:
    """Shares of the input's variance that its principal directions hold, falling.

    EVA (Paischer et al. 2024, arXiv:2410.07170). The Gram matrix is the mean of x^T x
    over tokens. Departs from the code in that inputs are not centred, since the
    correction acts on x itself, and in that the spectrum is exact instead of found
    batch by batch: so it does not depend on the order of sites or batches.
    """
    values = jnp.maximum(jnp.linalg.eigvalsh(gram)[..., ::-1], 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1)
    shares = shares[..., :max_rank]
    missing = max_rank - shares.shape[-1]
    return jnp.pad(shares, [(0, 0)] * (shares.ndim - 1) + [(0, missing)])


def gradient_energy(
    gradient: Float[Array, "*layers d_in d_out"], max_rank: int
) -> Float[Array, "*layers max_rank"]:
    """s_r^2, s the singular values of the gradient at the frozen weight, falling.

    The steepest correction of rank r lowers the loss, to first order, in proportion to
    s_1^2 + ... + s_r^2 (LoRA-GA's start, Wang et al. 2024, arXiv:2407.05000). That is
    comparable from layer to layer, which the mean of |W * G| (GoRA, He et al. 2025,
    arXiv:2502.12171) is not where weights differ in scale.
    """
    squares = jnp.square(jnp.linalg.svd(gradient, compute_uv=False))[..., :max_rank]
    missing = max_rank - squares.shape[-1]
    return jnp.pad(squares, [(0, 0)] * (squares.ndim - 1) + [(0, missing)])
