"""Figures in the README are those of the committed results, rounded."""

import json
import statistics
from pathlib import Path

import pytest

from experiments.bench.decoder import PAIRS
from experiments.bench.ranks import FINAL, FULL, beside
from lowrank.evaluate.stats import over_seeds

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
#: Lines break anywhere.
README = " ".join((ROOT / "README.md").read_text().split())


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def zeroed(number, digits=2, sign=""):
    """A rounded number, of which zero has no sign."""
    text = f"{number:{sign}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def ratio(found, digits=2):
    """A median with its interval."""
    one = lambda name: zeroed(found[name], digits)
    return f"{one('median')} [{one('low')}, {one('high')}]"


def interval(found, digits=2, scale=1.0, sign="+"):
    """An estimate with its ends, of which only the former says plus."""
    ends = (zeroed(scale * found[name], digits) for name in ("low", "high"))
    middle = zeroed(scale * found["estimate"], digits, sign)
    return f"{middle} [{', '.join(ends)}]"


@pytest.fixture(scope="module")
def study():
    return results("ranks_protocol_standard")


def row_of(study, task, arm):
    (row,) = (row for row in study["tasks"][task]["rows"] if row["arm"] == arm)
    return row


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("heterogeneous", "layers need different ranks"),
        ("homogeneous", "all need the same (nothing to gain)"),
        ("anisotropic", "inputs of unequal variance"),
        ("decaying", "spectra that decay"),
        ("unequal", "weights of unequal shapes"),
    ],
)
def test_teachers(study, task, name):
    of = lambda arm: row_of(study, task, arm)["ratio"]["difference"]
    told = lambda arm: interval(of(arm))
    oracle = "0" if task == "homogeneous" else zeroed(of("oracle")["estimate"])
    blind = told("random")
    if task != "heterogeneous":
        blind = blind.partition(" ")[0]
    cells = (
        name, oracle, told("fisher"), told("sensitivity"),
        f"{told('fisher-own')}, {told('sensitivity-own')}", blind,
    )  # fmt: skip
    assert f"| {' | '.join(cells)} |" in README


def test_what_was_wanted_is_met_as_is_said(study):
    assert "all that was wanted beforehand is met" in README
    of_basis = [one for one in study["outcomes"] if not one["arm"].endswith("-own")]
    assert {one["answer"] for one in of_basis} == {"met"}
    assert f"{study['protocol']['seeds']} seeds, every arm tuned alike on" in README
    assert f"on {study['protocol']['tuning_seeds']} others" in README


def test_how_many_rates_lie_at_an_end(study):
    """Of the teachers, where the grid is one."""
    teachers = [own for own in study["tasks"].values() if not own["in_points"]]
    rows = [row for own in teachers for row in own["rows"]]
    ends = [row for row in rows if row["at_end"]]
    largest = max(study["protocol"]["rates"])
    highest = sum(row["rate"] == largest for row in ends)
    said = (
        f"{len(ends)} of {len(rows)} arms chose a learning rate at an end of the grid"
    )
    assert f"{said}, {highest} the largest" in README


def test_what_is_said_of_text(study):
    """Nothing is called a difference that correction does not leave one."""
    rows = [
        row
        for own in study["tasks"].values()
        if own["in_points"]
        for row in own["rows"]
        if row["ratio"]
    ]
    assert rows
    decided = [row for row in rows if row["verdict"] in ("better", "worse")]
    assert bool(decided) != (
        "nothing differs from uniform ranks after correction" in README
    )
    real = study["protocol"]["real"]
    assert f"{real['steps']} steps" in README
    fisher = [row["ratio"]["difference"] for row in rows if row["arm"] == "fisher"]
    widths = sorted(100 * (one["high"] - one["low"]) for one in fisher)
    assert f"are {widths[0]:.1f} to {widths[-1]:.1f} points wide, half" in README
    assert f"half of them more than {statistics.median(widths):.1f}." in README
    worse = sum(one["low"] > 0 for one in fisher)
    better = sum(one["high"] < 0 for one in fisher)
    assert better == 0
    assert f"(before it, {worse} of {len(fisher)} is worse)" in README
    assert f"{real['steps']} steps of {real['batch_size']} rows" in README
    assert f"took {study['seconds'] / 60:.0f} minutes" in README


def test_what_the_fresh_seeds_said():
    claims = results("ranks_protocol_claims")
    assert claims["protocol"]["seeds"] == 64
    own = row_of(claims, "homogeneous", "sensitivity-own")["ratio"]["difference"]
    assert f"({interval(own, 3)})" in README


def test_what_moving_ranks_cost():
    found = results("bench_ranks")
    for arm in ("norm", "fisher"):
        for other in (FULL, FINAL):
            assert ratio(beside(found, arm, other)) in README
        assert beside(found, arm)["high"] <= 1.05
    processes = found["processes"]
    turns = len(found["times"]["norm"]) // processes
    assert f"(8 x 32, medians of {processes} processes" in README
    asked = f"--processes {processes} --rounds {turns} --most 1.05`"
    assert f"--recipes norm,fisher {asked}" in README


@pytest.mark.parametrize("task", ["intents", "trec6", "digits"])
def test_quality(task):
    found = results(f"quality_{task}")
    probe = interval(found["probe"]["accuracy"], 1, 100, "")
    runs = [run["accuracy"]["estimate"] for run in found["lora"]]
    lora = interval(over_seeds(runs).json(), 1, 100, "")
    assert f"| {probe} | {lora} |" in README


def test_a_decoder_beside_others():
    for what, found in results("bench_decoder")["pairs"].items():
        ours, theirs = PAIRS[what]
        peak = found["peak_bytes"][ours] / found["peak_bytes"][theirs]
        told = README[README.index(ratio(found["ratio"])) :]
        assert f"with {peak:.2f} of" in told[:90], what


def test_a_step_beside_others():
    for shape in results("bench")["shapes"].values():
        ratios = shape["summary"]["ratios"]
        assert ratio(ratios["lora/peft"]) in README
        assert ratio(ratios["lora/by_hand"]) in README
