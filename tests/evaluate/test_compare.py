"""Arms are called better or equal only where the seeds can tell."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lowrank.core.errors import BadInput, UnknownName
from lowrank.evaluate.compare import compare_arms, holm, sign_flip_p

BASE = {0: 0.80, 1: 0.82, 2: 0.79, 3: 0.81}


def arm(*changes):
    return {seed: BASE[seed] + change for seed, change in enumerate(changes)}


def by_hand(differences):
    """mean -+ t s / sqrt(n) and its p from the formulas, without `ttest_rel`."""
    d = np.asarray(differences)
    error = d.std(ddof=1) / math.sqrt(len(d))
    reach = stats.t.ppf(0.975, len(d) - 1) * error
    p = 2 * stats.t.sf(abs(d.mean() / error), len(d) - 1)
    return d.mean() - reach, d.mean() + reach, p


def test_a_difference_is_that_of_the_formulas():
    changes = (0.02, 0.05, 0.03, 0.04)
    (found,) = compare_arms({"base": BASE, "more": arm(*changes)}, "base", margin=0.1)
    low, high, p = by_hand(changes)
    # 1e-9: differences of numbers near 1 carry rounding of 1e-16 / 0.01 each.
    assert found.difference.estimate == pytest.approx(0.035, rel=1e-9)
    assert found.difference.low == pytest.approx(low, rel=1e-9)
    assert found.difference.high == pytest.approx(high, rel=1e-9)
    assert (found.p, found.adjusted_p) == pytest.approx((p, p), rel=1e-9)
    error = np.std(changes, ddof=1) / 2
    tost = max(
        stats.t.sf((0.035 + m) / error * s, 3) for m, s in [(0.1, 1), (-0.1, -1)]
    )
    assert found.equivalence_p == pytest.approx(tost, rel=1e-9)


@pytest.mark.parametrize("count", [2, 5, 7])
def test_the_exact_p_counts_sign_patterns_and_knows_its_floor(count):
    d = np.random.default_rng(count).normal(0.4, 1, count).tolist()
    means = [abs(np.dot(s, d)) for s in itertools.product((1, -1), repeat=count)]
    share = np.mean(np.array(means) >= abs(sum(d)) - 1e-12)
    assert sign_flip_p(d) == pytest.approx(share, rel=1e-12)
    arms = {"a": dict.fromkeys(range(count), 0.0), "b": dict(enumerate(map(abs, d)))}
    (found,) = compare_arms(arms, "a")
    assert found.exact_p == found.exact_floor == 2 / 2**count


def test_holm_is_the_step_down_of_the_paper():
    p = [0.04, 0.01, 0.03, None]
    # Sorted: 0.01 x 4, 0.03 x 3, 0.04 x 2 (not below the one before), 1.
    assert holm(p) == pytest.approx([0.09, 0.04, 0.09, 1.0], rel=1e-12)
    assert holm([]) == []


@pytest.mark.parametrize(
    ("changes", "higher", "margin", "verdict"),
    [
        ((0.10, 0.11, 0.09, 0.10), True, None, "better"),
        ((0.10, 0.11, 0.09, 0.10), False, None, "worse"),
        ((-0.10, -0.11, -0.09, -0.10), True, None, "worse"),
        ((0.001, -0.001, 0.002, -0.001), True, None, "inconclusive"),
        ((0.001, -0.001, 0.002, -0.001), True, 0.01, "equivalent"),
        # Different beyond doubt, and too little to matter.
        ((0.0010, 0.0011, 0.0009, 0.0010), True, 0.01, "equivalent"),
        ((0.05, -0.06, 0.02, -0.01), True, 0.01, "inconclusive"),
        # One seed shows nothing; equal differences leave t undefined.
        ((0.3,), True, 0.01, "inconclusive"),
        ((0.1, 0.1, 0.1, 0.1), True, 0.01, "inconclusive"),
    ],
)
def test_the_verdict_says_what_was_shown(changes, higher, margin, verdict):
    arms = {"base": BASE, "other": arm(*changes)}
    (found,) = compare_arms(arms, "base", higher_is_better=higher, margin=margin)
    assert found.verdict == verdict


def test_more_arms_make_it_harder_for_each():
    arms = {"base": BASE, "other": arm(0.03, 0.07, 0.02, 0.05)}
    (alone,) = compare_arms(arms, "base")
    many = {f"same {i}": arm(0.01, -0.01, 0.0, 0.005 * i) for i in range(6)}
    crowded = {c.arm: c for c in compare_arms(arms | many, "base")}["other"]
    assert (alone.verdict, crowded.verdict) == ("better", "inconclusive")
    assert crowded.p == alone.p


def test_only_seeds_of_both_count_and_the_others_are_named():
    arms = {"base": BASE, "other": {1: 0.9, 2: 0.85, 7: 0.1}, "apart": {9: 1.0}}
    other, apart = compare_arms(arms, "base")
    assert other.difference.num_groups == 2
    assert other.difference.estimate == pytest.approx((0.08 + 0.06) / 2)
    assert other.unpaired == (0, 3, 7)
    assert (apart.difference.method, apart.p) == ("undefined: no seed in common", None)
    assert (apart.adjusted_p, apart.verdict) == (1.0, "inconclusive")


def test_equal_differences_do_not_turn_rounding_into_certainty():
    arms = {"a": {0: 0.1, 1: 0.2, 2: 0.3}, "b": {0: 0.2, 1: 0.3, 2: 0.4}}
    (found,) = compare_arms(arms, "a", margin=0.5)
    assert (found.test, found.p, found.equivalence_p) == ("sign flips", 0.25, 1 / 8)
    assert found.difference.low is None


@pytest.mark.parametrize(
    ("shift", "count", "want"),
    [
        (0.0, 3, "inconclusive"), (0.0, 8, "equivalent"), (0.05, 8, "equivalent"),
        (0.2, 8, "better"), (-0.2, 8, "worse"), (0.2, 3, "inconclusive"),
    ],
)  # fmt: skip
def test_runs_that_come_out_the_same_are_equal_once_they_are_enough(shift, count, want):
    arms = {"a": {i: 0.1 * i for i in range(count)}}
    arms["b"] = {seed: value + shift for seed, value in arms["a"].items()}
    (found,) = compare_arms(arms, "a", margin=0.1)
    assert (found.test, found.verdict) == ("sign flips", want)
    shifted = [shift + 0.1] * count
    one_sided = stats.permutation_test(
        (np.array(shifted),), np.mean, permutation_type="samples",
        alternative="greater", n_resamples=np.inf,
    ).pvalue  # fmt: skip
    assert found.equivalence_p == (one_sided if abs(shift) < 0.1 else 1.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"baseline": "bose"}, UnknownName, "'bose'.*'base'"),
        ({"margin": 0.0}, BadInput, "margin.*positive.*0.0"),
        ({"level": 1.0}, BadInput, "between 0 and 1"),
        ({"arms": {"base": {0: math.nan}}}, BadInput, "'base'.*nan.*seed 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, error, words):
    given = {"arms": {"base": BASE}, "baseline": "base"} | change
    with pytest.raises(error, match=words):
        compare_arms(**given)
