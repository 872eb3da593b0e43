"""Adapting a model must not make its users wait for the tracer."""

import statistics

import pytest

from experiments.bench import tracing
from lowrank.deltas.lora import LoRA


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_a_deep_unrolled_model_lowers_in_less_than_twice_its_own_time(gradient):
    costs = tracing.measure(num_layers=32, rounds=5, gradient=gradient)
    assert costs.num_sites == 192
    assert statistics.median(costs.ratios) < 2


def test_the_measurement_sees_a_slow_delta(monkeypatch, capsys):
    """A delta that traces ten products more shows in the ratio, robustly."""

    def slow(self, call):
        y = right(self, call)
        for _ in range(60):
            y = y * 1.0
        return y

    quick = tracing.measure(num_layers=1, rounds=1)
    right = LoRA.__call__
    monkeypatch.setattr(LoRA, "__call__", slow)
    costs = tracing.measure(num_layers=1, rounds=1)
    assert costs.num_sites == quick.num_sites == 6
    assert costs.ratios[0] > quick.ratios[0]
    assert tracing.main(["--layers", "1", "--rounds", "1"]) == 0
    assert "6 sites" in capsys.readouterr().out
