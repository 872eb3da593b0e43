"""Random programs: factored equals dense, and faults planted in the walk are found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import random_programs
from hypothesis import HealthCheck, Phase, given, settings

from lowrank.adapt import views
from lowrank.adapt.attach import attach
from lowrank.adapt.call import DotCall
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA

pytestmark = pytest.mark.long

#: Without shrinking: a failure prints the program, and compiling is what costs.
BOUNDED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MANY = settings(BOUNDED, max_examples=120)


def error_of(program):
    """How far the factored program is from the dense one, gradients included."""
    with jax.enable_x64(True):
        apply, params, inputs = random_programs.made(program, np.float64)
        rules = [Rule("*", LoRA(alpha=6.0), rank=1, max_rank=1)]
        adapted = attach(apply, params, *inputs, rules=rules)
        trained, dials = oracle.loud(adapted, 3)
        both = oracle.both(adapted, apply, params, inputs, trained, dials)
        return oracle.leafwise(*both, floor=1e-6)


def run(how, only=()):
    """Checks as many programs as the settings say."""

    @how
    @given(random_programs.programs(only))
    def check(program):
        assert error_of(program) <= 1e-9, program

    check()


def test_random_programs_equal_the_dense_weight():
    run(BOUNDED)


@pytest.mark.slow
def test_many_random_programs_equal_the_dense_weight():
    run(MANY)


def labels_in_the_wrong_order(monkeypatch):
    def wrong(part, own, edits, sizes):
        good = right(part, own, edits, sizes)
        return part.T.reshape(good.shape) if good.shape != part.shape else good

    right = views._reshape_part
    monkeypatch.setattr(views, "_reshape_part", wrong)


def a_gate_dropped_in_a_loop(monkeypatch):
    def wrong(view):
        arrays, rebuild = right(view)

        def dropped(one):
            layer = rebuild(one)
            open_gate = {**layer.dials, "gate": jnp.ones_like(layer.dials["gate"])}
            return dataclasses.replace(layer, dials=open_gate)

        return arrays, rebuild if view.delta is None else dropped

    right = views.unstack
    monkeypatch.setattr(views, "unstack", wrong)


def the_other_side(monkeypatch):
    """Where W is used transposed, the factors are taken for each other."""

    def wrong(self, a, b, *args):
        swap = self.transposed and a.shape == b.shape
        return right(self, *((b, a) if swap else (a, b)), *args)

    right = DotCall.lowrank
    monkeypatch.setattr(DotCall, "lowrank", wrong)


@pytest.mark.parametrize(
    ("plant", "use"),
    [
        (labels_in_the_wrong_order, "lookup"),
        (a_gate_dropped_in_a_loop, "layers"),
        (the_other_side, "layers"),
    ],
)
def test_a_planted_fault_is_found(monkeypatch, plant, use):
    """Among the programs above; here only those that can show it, to be quick."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run(BOUNDED, only=(use,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", [labels_in_the_wrong_order, a_gate_dropped_in_a_loop, the_other_side]
)
def test_a_planted_fault_is_found_among_all_programs(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run(MANY)
