"""The tables say what the numbers say: made-up studies with known answers."""

import math
from pathlib import Path

import numpy as np
import pytest
from small import protocol

from experiments.ranks_protocol import report, verdicts
from experiments.ranks_protocol.measures import misallocation, rank_correlation
from lowrank.evaluate.compare import holm
from lowrank.evaluate.stats import Interval

SEEDS = range(2000, 2008)
BUDGETS = {
    "final_components": 16,
    "final_parameters": 1024,
    "average_components": 28.5,
    "open_flops": 3e9,
    "held_flops": 4e9,
}


def settings(**more):
    return protocol(Path("unused"), seeds=8, rates=[0.003, 0.01, 0.03], **more)


def records(arm, shift, spread=0.0, misplaced=0.0):
    """Errors whose logs are the baseline's and so much more, seed by seed."""
    noise = np.random.default_rng(len(arm)).normal(size=len(SEEDS))
    noise -= noise.mean()
    found = []
    for number, seed in enumerate(SEEDS):
        log = -4.0 + 0.3 * number + shift + spread * noise[number]
        found.append(
            {
                "arm": arm,
                "seed": seed,
                "rate": 0.01,
                "error": math.exp(log),
                "failed": None,
                "misallocation": misplaced,
                "rank_correlation": 0.5,
                "budgets": BUDGETS,
            }
        )
    return found


def study(task="heterogeneous", **arms):
    judged = {arm: records(arm, *given) for arm, given in arms.items()}
    rates = dict.fromkeys(judged, 0.01)
    own = {"judged": judged, "tuned": {}, "rates": rates, "seconds": 60.0}
    return {task: {**own, "in_points": False, "grid": [0.003, 0.01, 0.03]}}


def answers(found):
    return {(one.arm, one.wanted.split(":")[0].split(" ")[-1]): one for one in found}


GOOD = {
    "uniform": (0.0,),
    "oracle": (-1.8, 0.01),
    "fisher": (-1.79, 0.01, 0.0),
    "sensitivity": (-1.81, 0.01, 0.01),
    "random": (0.1, 0.05, 0.5),
    "shuffled": (0.2, 0.2, 0.5),
}


def test_all_is_met_where_methods_are_the_oracle():
    found = verdicts.outcomes(study(**GOOD), settings())
    assert [one.answer for one in found] == ["met"] * 8
    assert {one.arm for one in found} == {*GOOD} - {"uniform", "oracle"}


@pytest.mark.parametrize(
    ("arm", "given", "wanted", "answer"),
    [
        ("fisher", (-1.5, 0.01), "oracle", "not met"),
        ("fisher", (-1.74, 0.05), "oracle", "inconclusive"),
        ("fisher", (-1.2, 0.01), "uniform", "not met"),
        ("fisher", (-1.5, 0.2), "uniform", "inconclusive"),
        ("fisher", (-1.8, 0.01, 0.1), "misallocation", "not met"),
        ("random", (-0.3, 0.05), "no gain", "not met"),
        ("random", (0.0, 0.5), "no gain", "inconclusive"),
    ],
)
def test_an_answer_follows_from_the_interval(arm, given, wanted, answer):
    found = verdicts.outcomes(study(**{**GOOD, arm: given}), settings())
    (one,) = [one for one in found if one.arm == arm and wanted in one.wanted]
    assert one.answer == answer, one
    others = [other.answer for other in found if other.arm not in (arm, "oracle")]
    assert {*others} == {"met"}


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ((0.001, 0.004), "met"),
        ((0.05, 0.004), "not met"),
        ((-0.05, 0.004), "not met"),
        ((0.0, 0.1), "inconclusive"),
    ],
)
def test_equality_is_shown_and_not_assumed(given, answer):
    own = study("homogeneous", uniform=(0.0,), fisher=given)
    (one,) = verdicts.outcomes(own, settings())
    assert one.answer == answer


def test_a_task_without_a_claim_has_no_wanted_outcome():
    assert verdicts.outcomes(study("decaying", **GOOD), settings()) == []


def test_misallocation_on_hand_examples():
    truth = {"a": 4, "b": 0, "c": 2}
    assert misallocation(truth, truth) == 0
    assert misallocation({"a": 2, "b": 2, "c": 2}, truth) == pytest.approx(2 / 6)
    nothing_right = {"a": 0, "b": 6, "c": 0}
    assert misallocation(nothing_right, truth) == 1
    # Moved: two of a, 3 parameters each, for six of b, one each.
    price = {"a": 3, "b": 1, "c": 2}
    moved = {"a": 2, "b": 6, "c": 2}
    assert misallocation(moved, truth, price) == pytest.approx(12 / (2 * 16))


def test_uniform_ranks_misplace_half_of_the_mixed_budget():
    mixed = dict(enumerate((0, 0, 1, 8, 0, 1, 4, 2)))
    assert misallocation(dict.fromkeys(mixed, 2), mixed) == 0.5


def test_rank_correlation_on_hand_examples():
    truth = {"a": 0, "b": 1, "c": 2, "d": 8}
    assert rank_correlation({"a": 1, "b": 2, "c": 3, "d": 4}, truth) == pytest.approx(1)
    assert rank_correlation(dict.fromkeys(truth, 2), truth) is None


def test_the_correction_is_over_all_tasks():
    first, second = study(**GOOD), study("decaying", **GOOD)
    ratio = {
        task: verdicts.comparisons(own["judged"], "uniform", settings())
        for task, own in {**first, **second}.items()
    }
    adjusted = verdicts.corrected(ratio)
    each = [one.p for own in ratio.values() for one in own.values()]
    told = [p for own in adjusted.values() for p in own.values()]
    assert told == holm(each)
    assert len(told) == 10


def test_the_table_shows_every_arm_and_says_who_is_better():
    found = report.results(study(**GOOD), settings())
    rows = {row["arm"]: row for row in found["tasks"]["heterogeneous"]["rows"]}
    assert rows["fisher"]["verdict"] == "better"
    assert rows["shuffled"]["verdict"] == "worse"
    assert rows["random"]["verdict"] == "worse"
    assert rows["uniform"]["verdict"] is None
    assert rows["fisher"]["ratio"]["difference"]["estimate"] == pytest.approx(-1.79)
    assert rows["fisher"]["open_flops"] == 1.0
    text = report.markdown(found)
    said = "misallocation at most 0.02 | +0.000 | met |"
    assert f"| heterogeneous | fisher | {said}" in text
    assert text.count("\n| fisher |") == 1


def test_a_rate_at_an_end_of_the_grid_is_marked():
    own = study(**GOOD)
    own["heterogeneous"]["rates"]["fisher"] = 0.03
    text = report.markdown(report.results(own, settings()))
    assert "| fisher | 0.03* |" in text
    assert "| oracle | 0.01 |" in text


def test_a_failed_seed_is_left_out_and_named():
    own = study(**GOOD)
    lost = own["heterogeneous"]["judged"]["norm"] = records("norm", -1.0, 0.01)
    own["heterogeneous"]["rates"]["norm"] = 0.01
    gone = dict.fromkeys(
        ("error", "misallocation", "rank_correlation", "budgets"), None
    )
    lost[3] = {**lost[3], **gone, "failed": "it diverged"}
    found = report.results(own, settings())
    text = report.markdown(found)
    assert "norm: seed 2003 left out: it diverged" in text
    (row,) = [r for r in found["tasks"]["heterogeneous"]["rows"] if r["arm"] == "norm"]
    assert row["seeds"] == 7


@pytest.mark.parametrize(
    ("ends", "answer"),
    [
        ((0.1, 0.2), "met"),
        ((-0.1, 0.2), "inconclusive"),
        ((-0.3, -0.2), "not met"),
        ((1.2, 1.4), "not met"),
    ],
)
def test_intervals_within_bounds(ends, answer):
    one = Interval(sum(ends) / 2, *ends, 0.95, 8, "t")
    assert verdicts.inside(one, 0.0, 1.0) == answer


def test_one_seed_shows_nothing_and_equal_seeds_show_their_value():
    alone = Interval(0.5, None, None, 0.95, 1, "undefined: one seed")
    assert verdicts.inside(alone, 0.0, 1.0) == "inconclusive"
    agreed = Interval(0.5, None, None, 0.95, 8, "undefined: every seed ...")
    assert verdicts.inside(agreed, 0.0, 1.0) == "met"
    assert verdicts.inside(agreed, 0.0, 0.1) == "not met"


def test_nothing_is_wanted_of_real_text_even_where_no_row_is_wrong():
    """Errors in points may be zero, of which there is no logarithm."""
    own = study("intents@2", uniform=(0.1,), fisher=(0.0,))
    for record in own["intents@2"]["judged"]["fisher"]:
        record["error"] = 0.0
    assert verdicts.outcomes(own, settings()) == []
