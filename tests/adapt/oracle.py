"""The dense weight by einsum, written without looking at the code under test."""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.trees import flatten


def dense_weight(xp, site, weight, factors, dials):
    """W + scale sum_r gate_r a_r b_r for a stored weight of any layout.

    `xp` is NumPy or JAX's NumPy.
    """
    axes = "ABCDEFGH"[: len(site.shape)]
    pick = lambda dims: "".join(axes[d] for d in dims)
    stack = pick(site.stacks)
    spec = f"{stack}r,{stack}r{pick(site.ins)},{stack}r{pick(site.outs)}->{axes}"
    options = {} if xp is np else {"precision": "highest"}
    delta = xp.einsum(spec, dials["gate"], factors["a"], factors["b"], **options)
    return weight + (dials["scale"] * delta).astype(weight.dtype)


def merged(xp, adapted, params, trained, dials):
    """The model's parameters with every correction added."""
    flat, structure = flatten(params)
    leaves = {}
    for path, leaf in flat.items():
        if path in adapted.sites:
            leaf = dense_weight(
                xp, adapted.sites[path], leaf, trained[path], dials[path]
            )
        leaves[path] = trained[path] if path in adapted.fully_trained else leaf
    return structure.unflatten(leaves)


def filled(shapes, seed, stddev=0.3):
    """Arrays of these shapes with random numbers; no compiler needed."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, stddev, x.shape), x.dtype), shapes
    )


def loud(adapted, seed, stddev=0.3):
    """A trained tree in which nothing is silent, and gates of all sorts of values."""
    trained = filled(adapted.trained_shapes(), seed, stddev)
    dials = adapted.dials()
    rng = np.random.default_rng(seed)
    for own in dials.values():
        own["gate"] = jnp.asarray(rng.uniform(0.3, 1.0, own["gate"].shape))
    return trained, dials


def quick(fn):
    """`jax.jit` for what runs once: compiled without optimization."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fn, compiler_options=options)


def both(adapted, apply, params, inputs, trained, dials, key=None, frozen=None):
    """(outputs, gradients) of the factored program and of the dense oracle.

    Gradients are those of all trained leaves and all gates, of a random weighting of
    all outputs.
    """
    frozen = adapted.frozen() if frozen is None else frozen

    def factored(trained, dials):
        return adapted.apply(frozen, trained, *inputs, dials=dials, key=key)

    dense = _dense(adapted, apply, params, inputs)
    return _graded((factored, dense), trained, dials)


def dense_alone(adapted, apply, params, inputs, trained, dials):
    """(outputs, gradients) of the dense oracle."""
    return _graded((_dense(adapted, apply, params, inputs),), trained, dials)[0]


def _dense(adapted, apply, params, inputs):
    return lambda trained, dials: apply(
        merged(jnp, adapted, params, trained, dials), *inputs
    )


def _graded(models, trained, dials):
    """(outputs, gradients) of functions of trained leaves and dials."""
    gates = {path: own["gate"] for path, own in dials.items()}

    def weighted(model):
        def loss(learned):
            trained, gates = learned
            own = {path: {**dials[path], "gate": gates[path]} for path in dials}
            outputs, total = model(trained, own), 0.0
            for i, y in enumerate(jax.tree.leaves(outputs)):
                if jnp.issubdtype(y.dtype, jnp.inexact):
                    w = jax.random.normal(jax.random.key(100 + i), y.shape)
                    total += jnp.sum(y.astype(w.dtype) * w)
            return total, outputs

        return jax.grad(loss, has_aux=True)

    run = quick(lambda learned: [weighted(model)(learned) for model in models])
    with jax.default_matmul_precision("highest"):
        return [(y, gradient) for gradient, y in run((trained, gates))]


def leafwise(ours, oracle, floor=1e-2):
    """Largest max|a - b| / max|b| over leaves, each measured by its own size.

    In float32 a gradient far smaller than the others is what is left of terms that
    cancel, and its rounding is theirs: none is measured by less than `floor` times
    the largest leaf. In float64 the floor may be zero.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True)
    ]
    sizes = [np.abs(b).max() for _, b in pairs]
    worst = 0.0
    for (a, b), size in zip(pairs, sizes, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        worst = max(worst, np.abs(a - b).max() / max(size, floor * max(sizes), 1e-12))
    return worst


def total(ours, oracle):
    """|a - b| / |b| over all leaves together, in the Euclidean norm."""
    flat = lambda tree: np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )
    a, b = flat(ours), flat(oracle)
    return np.linalg.norm(a - b) / np.linalg.norm(b)
