"""LoRA: its scalings, its settings, and its place in configs."""

import math

import jax.numpy as jnp
import jaxtyping
import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build, digest
from lowrank.deltas.catalogue import CATALOGUE
from lowrank.deltas.lora import LoRA


@pytest.mark.parametrize(
    ("scaling", "expected"), [("linear", 12 / 9), ("rsqrt", 12 / 3)]
)
def test_scale_is_alpha_over_the_reference_rank(scaling, expected):
    dials = LoRA(alpha=12.0, scaling=scaling).dial_values((), 4, 2, 9)
    assert float(dials["scale"]) == pytest.approx(expected)
    assert dials["gate"].tolist() == [1, 1, 0, 0]


def test_the_rank_of_a_layer_does_not_enter_the_scale():
    scales = {float(LoRA().dial_values((), 8, r, 4)["scale"]) for r in (1, 4, 8)}
    assert scales == {4.0}


def test_gates_are_per_layer():
    dials = LoRA().dial_values((2, 3), 4, 1, 1)
    assert dials["gate"].shape == (2, 3, 4)
    assert jnp.all(dials["gate"] == jnp.array([1.0, 0, 0, 0]).reshape(1, 1, 4))


@pytest.fixture
def unhooked():
    """As users run it: the type hook of the tests would speak before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"rank_dropout": 1.0}, r"rank_dropout must be in \[0, 1\), not 1.0"),
        ({"alpha": 0.0}, "alpha must be positive and finite"),
        ({"alpha": math.inf}, "alpha"),
        ({"alpha": "16"}, "alpha must be float, not '16'"),
        ({"alpha": True}, "alpha must be float, not True"),
        ({"scaling": "sqrt"}, "scaling must be .*linear.*rsqrt"),
    ],
)
def test_a_wrong_setting_is_refused_however_it_comes(fields, words):
    with pytest.raises(BadInput, match=words):
        LoRA(**fields)
    with pytest.raises(BadInput, match="delta: .*" + words):
        build({"name": "lora", **fields}, CATALOGUE, "delta")


def test_a_config_builds_it():
    built = build({"name": "lora", "alpha": 8, "dropout": 0.1}, CATALOGUE, "delta")
    assert built == LoRA(alpha=8.0, dropout=0.1)
    assert digest(built) == digest(LoRA(alpha=8.0, dropout=0.1))
    with pytest.raises(UnknownName, match=r"'alfa'.*'alpha'"):
        build({"name": "lora", "alfa": 8}, CATALOGUE, "delta")
    with pytest.raises(UnknownName, match=r"'parent'|'rank'"):
        build({"name": "lora", "parent": None}, CATALOGUE, "delta")


def test_only_a_rate_above_zero_draws():
    assert LoRA(dropout=0.1).draws
    assert LoRA(rank_dropout=0.1).draws
    assert not LoRA().draws
