"""Where rungs stand, who goes on, and how far their orders can be believed."""

import dataclasses
import json

import pytest

from lowrank.core.errors import BadInput, Corrupt
from lowrank.run.sweep import Halving
from lowrank.sweeps.agreement import agreement, rung_lines, rungs_section
from lowrank.sweeps.load import load_sweep
from lowrank.sweeps.rungs import (
    RUNGS,
    Contest,
    Decision,
    Rung,
    decided,
    decisions,
    ladder,
    ranked,
    store,
)


@pytest.mark.parametrize(
    ("rule", "count", "rungs"),
    [
        ({"first": 0.1}, 9, [(8, 3), (16, 1)]),
        ({"first": 4}, 27, [(4, 9), (12, 3), (36, 1)]),
        ({"first": 4}, 26, [(4, 8), (12, 2), (36, 1)]),
        ({"first": 4, "eta": 2}, 5, [(4, 2), (8, 1)]),
        ({"first": 4, "eta": 5}, 2, [(4, 1)]),
        ({"first": 4}, 1, []),
        ({"first": 0.99}, 9, []),
        # Two rungs due before the third of the steps: one, that keeps as few as both.
        ({"first": 4, "min_steps": 13}, 27, [(16, 3), (36, 1)]),
        ({"first": 4, "min_steps": 48}, 27, []),
        # Not a step later because 0.1 * 48 / 4 is no whole number in binary.
        ({"first": 0.25}, 3, [(12, 1)]),
    ],
)
def test_rungs_stand_at_validations_and_keep_the_hyperband_numbers(rule, count, rungs):
    found = ladder(Halving(**rule), count, num_steps=48, every=4)
    assert found == [Rung(*one) for one in rungs]


def test_nobody_is_cut_before_the_earliest_step():
    for least in range(49):
        for where in ({"earliest": least}, {}):
            rule = Halving(first=1, min_steps=0 if where else least)
            found = ladder(rule, 81, num_steps=48, every=3, **where)
            assert all(one.step >= least for one in found)
            assert [one.keep for one in found] == sorted(
                {one.keep for one in found}, reverse=True
            )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"eta": 1}, "eta must be at least 2, not 1"),
        ({"first": 0.0}, "first = 0.0"),
        ({"first": 2.5}, "whole number of steps"),
        ({"min_steps": -1}, "min_steps must be at least 0"),
    ],
)
def test_bad_rules_are_refused(fields, told):
    with pytest.raises(BadInput, match=told):
        Halving(**fields)


def test_ties_go_by_id_and_what_has_no_value_is_last():
    values = {"d": 0.5, "b": 0.9, "a": 0.5, "c": None, "e": float("nan")}
    names = lambda lower: [name for name, _ in ranked(values, lower)]
    assert names(False) == ["b", "a", "d", "c", "e"]
    assert names(True) == ["a", "d", "b", "c", "e"]


CONTEST = Contest(("a", "b", "c"), Halving(), (Rung(4, 2), Rung(8, 1)), "accuracy")


def decision(number=0, **changes):
    order = (("b", 0.5), ("a", None), ("c", None))
    return dataclasses.replace(
        Decision(CONTEST.id, number, 4 + 4 * number, "accuracy", order, 2), **changes
    )


def test_a_decision_comes_back_and_holds(tmp_path):
    one = decision(failed={"a": ("NonFinite", "loss"), "c": ("NonFinite", "loss")})
    store(tmp_path, one)
    assert decided(tmp_path, CONTEST) == [one]
    assert one.kept == ("b",), "of two places one is left empty"
    store(tmp_path, decision(order=(("a", 1.0), ("b", 0.0), ("c", 0.0))))
    assert decided(tmp_path, CONTEST) == [one], "never replaced"


def test_decisions_that_are_not_this_contests_are_refused(tmp_path):
    store(tmp_path, decision())
    others = ("a", "b", "z")
    for other in (
        dataclasses.replace(CONTEST, trials=others),
        dataclasses.replace(CONTEST, rungs=(Rung(4, 1),)),
        dataclasses.replace(CONTEST, metric="log_loss"),
    ):
        with pytest.raises(Corrupt, match="another rule or with other trials"):
            decided(tmp_path, other)
    assert decided(tmp_path, dataclasses.replace(CONTEST, trials=("x",))) == []
    store(tmp_path, decision(2))
    with pytest.raises(Corrupt, match="lacks a decision"):
        decided(tmp_path, CONTEST)
    path = next((tmp_path / RUNGS).glob("*-0.json"))
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(Corrupt, match="sha256"):
        decisions(tmp_path)


def test_rank_correlations_are_those_of_hand():
    """Pairs of (1, 2, 3, 4) and (1, 3, 2, 4): 5 agree, 1 does not; d^2 sums to 2."""
    found = agreement([1, 2, 3, 4], [1, 3, 2, 4])
    assert found.tau == pytest.approx((5 - 1) / 6, abs=1e-12)
    assert found.rho == pytest.approx(1 - 6 * 2 / (4 * 15), abs=1e-12)
    assert agreement([1, 2], [2, 1]).tau is None
    assert agreement([1, 1, 1], [1, 2, 3]).tau is None


def test_a_report_shows_rungs_beside_the_final_order(sweep):
    """Four of the made-up trials, in the reverse of their final order."""
    assert rungs_section(sweep) == ""
    done = sweep.trials[sweep.trials["status"] == "done"]
    best = done.sort_values("best.accuracy").drop_duplicates("best.accuracy")
    first, *_, last = names = best["trial"].tolist()[:4]
    order = tuple((name, 0.9 - at / 10) for at, name in enumerate(names))
    store(sweep.directory, Decision("x", 0, 4, "accuracy", order, 3))
    again = load_sweep(sweep.directory)
    assert len(again.trials) == len(sweep.trials), "no trial is looked for among rungs"
    text = rungs_section(again)
    assert "| 4 | accuracy | 4 | 3 | -1.00 (-1.00) of 4 | - |" in text
    assert "no final value" in text
    assert "favour low learning rates" in " ".join(text.split())
    (line,) = rung_lines(again)
    assert "3 of 4 went on" in line
    assert "-1.00" in line
    stored = json.loads(next((sweep.directory / RUNGS).glob("*")).read_text())
    assert [stored["order"][0][0], stored["order"][-1][0]] == [first, last]
