"""Adapting a model must not make its users wait for the tracer."""

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench import tracing
from lowrank.deltas.lora import LoRA

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timing
def test_a_deep_unrolled_model_lowers_in_less_than_twice_its_own_time():
    # In a process of its own: here every call of ours has its types checked.
    command = ["-m", "experiments.bench.tracing", "--rounds", "7", "--json"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
    )
    forward, gradient = map(json.loads, done.stdout.splitlines())
    for costs in (forward, gradient):
        assert costs["num_sites"] == 192
        assert statistics.median(costs["ratios"]) < 2
        # Attached, checked and lowered: all that happens before the compiler has it.
        assert statistics.median(costs["first"]) < 2
    assert (forward["gradient"], gradient["gradient"]) == (False, True)


def test_the_measurement_sees_a_slow_delta(monkeypatch, capsys):
    """By a clock of the test's own: noise of the machine proves nothing here."""
    clock = itertools.count()
    monkeypatch.setattr(tracing.time, "process_time", lambda: next(clock))
    # Slow beside all that other tests left, and nothing to this clock.
    monkeypatch.setattr(tracing.gc, "collect", lambda: 0)
    quick = tracing.measure(num_layers=1, rounds=1)
    assert quick.ratios == [1]

    def slow(self, call):
        next(clock)
        return right(self, call)

    right = LoRA.__call__
    monkeypatch.setattr(LoRA, "__call__", slow)
    costs = tracing.measure(num_layers=1, rounds=1)
    # One tick of the clock's own, and one for every site: each is traced once.
    assert costs.num_sites == 6
    assert costs.ratios == [7]
    assert tracing.main(["--layers", "1", "--rounds", "1"]) == 0
    assert "6 sites" in capsys.readouterr().out
