"""The catalogue, and models of every framework as pure functions for it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapt.nnx import from_nnx

KEY = jax.random.key(0)


class Entry(NamedTuple):
    """A model of a package.

    Attributes:
      package: Its distribution on PyPI.
      name: The model.
      framework: What it is written in.
      build: Makes (apply, params, inputs).
    """

    package: str
    name: str
    framework: str
    build: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]


CATALOGUE: dict[str, Entry] = {}


def model(package: str, name: str, framework: str):
    """Puts a builder into the catalogue."""

    def add(build):
        CATALOGUE[build.__name__] = Entry(package, name, framework, build)
        return build

    return add


def ids(*shape, high=20):
    return jnp.asarray(np.random.default_rng(0).integers(1, high, shape))


def image(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def linen(module, *inputs, **options):
    """A Linen module with all its collections as parameters."""
    rngs = {"params": KEY, "dropout": KEY}
    variables = module.init(rngs, *inputs, **options)

    def apply(variables, *inputs):
        done = module.apply(
            variables, *inputs, rngs={"dropout": KEY}, mutable=["batch_stats"],
            **options,
        )  # fmt: skip
        return done[0]

    return apply, variables, inputs


def haiku(function, *inputs, **options):
    """A Haiku function, its state among the parameters; `options` when it is called."""
    import haiku as hk

    pure = hk.transform_with_state(function)
    params, state = jax.jit(pure.init)(KEY, *inputs)

    def apply(p, *inputs):
        return pure.apply(p["params"], p["state"], KEY, *inputs, **options)[0]

    return apply, {"params": params, "state": state}, inputs


def equinox(model, *inputs, call=lambda model, *inputs: model(*inputs)):
    """An Equinox model, split into arrays and the rest."""
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_array)
    apply = lambda params, *inputs: call(eqx.combine(params, static), *inputs)
    return apply, params, inputs


def in_nnx(model, *inputs, **options):
    """An NNX model."""
    model.eval()
    apply, params = from_nnx(model)
    return functools.partial(apply, **options), params, inputs


def in_keras(model, *inputs):
    """A Keras model through its stateless call, variables by their paths."""
    weights, others = model.trainable_variables, model.non_trainable_variables
    params = {v.path: jnp.asarray(v.value) for v in [*weights, *others]}

    def apply(params, *inputs):
        own = [[params[v.path] for v in group] for group in (weights, others)]
        given = inputs[0] if len(inputs) == 1 else list(inputs)
        return model.stateless_call(*own, given)[0]

    return apply, params, inputs
