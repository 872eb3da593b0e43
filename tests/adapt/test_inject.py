"""The factored program is the dense one, whatever a model does to its weights."""

import functools

import jax
import numpy as np
import oracle
import primitives
import programs
import pytest

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Freeze, Rule
from lowrank.deltas.lora import LoRA


@functools.cache
def adapted_program(name, dtype=np.float32):
    apply, params, inputs = programs.made(name, dtype)
    frozen = {**programs.FROZEN, **primitives.FROZEN}
    rules = [Freeze(path) for path in frozen.get(name, ())]
    rules.append(Rule("*", LoRA(alpha=6.0), rank=2, max_rank=3))
    return attach(apply, params, *inputs, rules=rules), apply, params, inputs


def error_of(name, dtype, floor):
    adapted, apply, params, inputs = adapted_program(name, dtype)
    trained, dials = oracle.loud(adapted, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype(dtype)}
    both = oracle.both(adapted, apply, params, inputs, trained, dials)
    return oracle.leafwise(*both, floor=floor)


@pytest.mark.parametrize("name", programs.names())
def test_outputs_and_gradients_equal_the_dense_weight(name):
    """In float64, where nine digits leave a wrong term no place to hide."""
    with jax.enable_x64(True):
        assert error_of(name, np.float64, floor=0) <= 1e-9


#: One of every kind of use; `make test-full` takes them all.
SINGLE = ["product", "tied_embedding", "nested_scans", "conv_in_groups"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SINGLE else pytest.mark.slow)
        for name in programs.names()
    ],
)
def test_in_float32_they_are_equal_to_its_rounding(name):
    assert error_of(name, np.float32, floor=1e-2) <= 1e-5


LAYOUTS = [
    "transposed_weight", "two_output_axes", "contracted_axes_apart", "batched_experts",
    "lookup_along_last_axis", "stack_on_another_axis", "nested_scans", "rearranged",
]  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_merged_weights_equal_numpy(name):
    adapted, _, params, _ = adapted_program(name)
    trained, dials = oracle.loud(adapted, 4)
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, trained, dials))
    expected = oracle.merged(np, adapted, *host)
    merged = adapted.merge(adapted.frozen(), trained, dials)
    assert oracle.leafwise(merged, expected) <= 1e-6


def test_the_corrections_are_not_silent():
    """Without this the tests above would pass on a walk that drops every delta."""
    for name in ("product", "tied_embedding", "nested_scans"):
        adapted, apply, params, inputs = adapted_program(name)
        trained, dials = oracle.loud(adapted, 3)
        y = adapted.apply(adapted.frozen(), trained, *inputs, dials=dials)
        assert oracle.leafwise(y, apply(params, *inputs)) > 0.05
