"""The benchmark of sweeps: the same trials in all arms, and a table that adds up."""

import pytest

from experiments.bench import sweep, sweep_table
from experiments.bench.grid import RANKS, RATES, SEEDS, Grid
from lowrank.sweeps.group import Trial, groups

pytestmark = pytest.mark.long

MACHINE = {
    **{"cpu": "any", "num_threads": 2, "num_cpus": 2},
    **{"load_before": 0.0, "load_after": 0.0},
}
SPANS = {"alone": 400, "reused": 300, "packed": 200, "halved": 150, "peft": 250}


def report(**changes):
    validation = {"accuracy": 0.9, "log_loss": 0.2}
    spans = {
        arm: [{"seconds": float(seconds), "validation": validation}]
        for arm, seconds in {**SPANS, **changes}.items()
    }
    cell = lambda *ms: {
        "seconds": [0.001 * one for one in ms], "compile_seconds": 1.0,
        "temp_bytes": 2**20,
    }  # fmt: skip
    widths = {"1": cell(100, 200), "4": cell(90, 160)}
    curves = {"32x8": {"limit": 1.0, "widths": widths}}
    common = {"machine": MACHINE, "trials": 24, "steps": 100}
    return {**common, "spans": spans, "curves": curves}


def test_verdicts_and_gains_follow_from_the_makespans():
    told = sweep_table.table(report())
    assert "| C: packed / A: one process per trial | 0.7 | 0.50: met |" in told
    assert (
        "| D: packed with halving / A: one process per trial | 0.35 | 0.38: missed"
        in told
    )
    assert "| C: packed / E: PEFT on torch, one process | 0.9 | 0.80: met |" in told
    assert "A to B: 25 % of A" in told
    assert "B to C: 25 % of A" in told
    assert "C to D: 12 % of A" in told
    # Medians of paired ratios, 0.9 and 0.8.
    assert "| 4 | 125 | 0.85 [0.80, 0.90] |" in told


def test_a_makespan_that_is_scaled_says_so():
    found = report()
    assert "were timed" not in sweep_table.table(found)
    found["spans"]["alone"][0]["each"] = [1.0] * 6
    assert "Of A 6 trials were timed" in sweep_table.table(found)
    found["spans"]["alone"][0]["each"] = [1.0] * 24
    assert "were timed" not in sweep_table.table(found)


def test_a_short_run_has_a_bound_of_its_own_and_absent_arms_are_left_out():
    short = {**report(packed=220), "steps": 30}
    del short["spans"]["peft"]
    told = sweep_table.table(short)
    assert "| 0.5 | 0.55: missed |" in told
    assert "E:" not in told


@pytest.mark.parametrize("steps", [30, 100])
def test_the_grid_is_one_pack_of_equally_long_trials(steps, tmp_path):
    grid = Grid(folder=str(tmp_path), steps=steps)
    assert len(grid.cells) == len(RANKS) * len(RATES) * len(SEEDS)
    assert len({tuple(cell.items()) for cell in grid.cells}) == len(grid.cells)
    settings = grid.settings("packed")
    trials = [Trial(number, one, ()) for number, one in enumerate(settings)]
    assert len(groups(trials)) == 1
    assert {one.optim.epochs for one in settings} == {grid.epochs}


def test_unknown_arms_and_counts_are_refused(capsys):
    for wrong in (
        ["--arms", "alone,keras"], ["--steps", "0"], ["--turns", "0"],
        ["--tokens", "256,512"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            sweep.parse(wrong)
    said = capsys.readouterr().err
    assert "unknown arms ['keras']" in said
    assert "--tokens ['512']; there are 256, 2048" in said
    assert [shape for shape, _ in sweep.parse(["--tokens", "2048"]).tokens] == [
        (32, 64)
    ]
