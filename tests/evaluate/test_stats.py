"""Intervals cover what they promise to, and say so where they cannot."""

import math

import numpy as np
import pytest
import scipy.stats

from lowrank.core.errors import BadInput
from lowrank.evaluate.metrics import MacroF1, Rows, WorstClass
from lowrank.evaluate.stats import (
    bootstrap,
    group_sums,
    multiplicities,
    over_seeds,
    paired_bootstrap,
)


def mean(sums, whole=None):
    return np.asarray(sums[..., 0] / sums[..., 1])


def terms_of(values):
    return np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)


def make_rows(seed, num_rows=120, num_classes=6):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes))
    logits[np.arange(num_rows), label] += 1
    return logits, label, rng.integers(0, 25, num_rows)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_singleton_groups_are_the_plain_bootstrap(method):
    values = np.random.default_rng(0).gamma(2, size=80)
    plain = bootstrap(terms_of(values), mean, method=method)
    names = np.array([f"row {i:03}" for i in range(80)])
    grouped = bootstrap(terms_of(values), mean, groups=names, method=method)
    assert plain.low == pytest.approx(grouped.low, rel=1e-12)
    assert plain.high == pytest.approx(grouped.high, rel=1e-12)
    assert plain.num_groups == grouped.num_groups == 80
    reference = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method=method, rng=1, vectorized=True
    ).confidence_interval
    width = reference.high - reference.low
    many = bootstrap(terms_of(values), mean, method=method, resamples=4000)
    assert many.low == pytest.approx(reference.low, abs=0.04 * width)
    assert many.high == pytest.approx(reference.high, abs=0.04 * width)


def test_bca_moves_the_ends_of_a_biased_estimate_as_scipy_does():
    # The plug-in variance is too small in every resample.
    values = np.random.default_rng(3).gamma(1, size=40)
    terms = np.stack([values**2, values, np.ones(40)], axis=1)
    variance = lambda sums, whole: np.asarray(
        sums[..., 0] / sums[..., 2] - (sums[..., 1] / sums[..., 2]) ** 2
    )
    got = bootstrap(terms, variance, resamples=8000)
    reference = scipy.stats.bootstrap(
        (values,), np.var, n_resamples=8000, method="bca", rng=1
    ).confidence_interval
    width = reference.high - reference.low
    assert got.low == pytest.approx(reference.low, abs=0.03 * width)
    assert got.high == pytest.approx(reference.high, abs=0.06 * width)
    plain = bootstrap(terms, variance, resamples=8000, method="percentile")
    assert plain.high < reference.high - 0.1 * width


@pytest.mark.parametrize("metric", [MacroF1(), WorstClass(15)])
def test_a_resample_is_the_metric_of_the_repeated_rows(metric):
    logits, label, group = make_rows(1)
    rows = Rows.of(logits, label)
    sums = group_sums(metric.terms(rows), group)
    names = np.unique(group)
    counts = multiplicities(len(names), 30, np.random.default_rng(5))
    got = metric.value(counts.astype(float) @ sums, metric.sums(rows))
    assert (counts.sum(axis=1) == len(names)).all()
    eligible = np.bincount(label) >= 15
    for draw, count in zip(got, counts, strict=True):
        at = np.concatenate(
            [np.flatnonzero(group == g) for g, n in zip(names, count, strict=True)
             for _ in range(n)]
        )  # fmt: skip
        repeated = Rows.of(logits[at], label[at])
        if isinstance(metric, MacroF1):
            expected = metric.of(repeated)
        else:
            recalls = [
                repeated.correct[repeated.label == c].mean()
                for c in np.flatnonzero(eligible)
                if (repeated.label == c).any()
            ]
            expected = min(recalls)
        assert draw == pytest.approx(expected, rel=1e-12)


def test_clustered_intervals_cover_and_row_intervals_do_not():
    rng = np.random.default_rng(2)
    num_groups, size, runs = 30, 8, 300
    groups = np.repeat(np.arange(num_groups), size)
    covered = {"clustered": 0, "rows": 0}
    for run in range(runs):
        p = np.repeat(rng.beta(2, 0.5, num_groups), size)
        right = terms_of(rng.random(len(p)) < p)
        for name, given in (("clustered", groups), ("rows", None)):
            got = bootstrap(right, mean, groups=given, seed=run, resamples=400)
            covered[name] += got.low <= 0.8 <= got.high
    assert 0.90 <= covered["clustered"] / runs <= 0.99
    assert covered["rows"] / runs < 0.80


def test_higher_levels_are_wider_and_seeds_repeat():
    values = terms_of(np.random.default_rng(1).normal(size=60))
    narrow, wide = (bootstrap(values, mean, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert bootstrap(values, mean, seed=3) == bootstrap(values, mean, seed=3)
    assert bootstrap(values, mean, seed=3) != bootstrap(values, mean, seed=4)


def test_pieces_of_resamples_give_what_one_piece_gives(monkeypatch):
    values = terms_of(np.random.default_rng(1).normal(size=50))
    whole = bootstrap(values, mean, resamples=100)
    monkeypatch.setattr("lowrank.evaluate.stats._MAX_COUNTS", 50 * 7)
    pieces = bootstrap(values, mean, resamples=100)
    assert pieces.low == pytest.approx(whole.low, rel=1e-12)
    assert pieces.high == pytest.approx(whole.high, rel=1e-12)


def test_rows_of_weight_zero_are_as_if_they_were_not_there():
    values = np.random.default_rng(1).normal(size=40)
    weight = np.r_[np.ones(30), np.zeros(10)]
    groups = np.arange(40) // 2
    got = bootstrap(terms_of(values), mean, weight=weight, groups=groups)
    assert got == bootstrap(terms_of(values[:30]), mean, groups=groups[:30])
    assert got.num_groups == 15


@pytest.mark.parametrize(
    ("values", "groups", "why"),
    [
        ([0.0, 1.0, 1.0], ["a", "a", "a"], "one group"),
        ([1.0, 1.0, 1.0], None, "every resample gives the same value"),
    ],
)
def test_certainty_is_not_claimed_where_the_data_cannot_tell(values, groups, why):
    given = None if groups is None else np.array(groups)
    got = bootstrap(terms_of(values), mean, groups=given)
    assert got.estimate == pytest.approx(np.mean(values))
    assert (got.low, got.high) == (None, None)
    assert got.method == f"undefined: {why}"


def test_a_metric_that_many_resamples_lack_has_no_interval():
    # Defined only where the one row of class 1 was drawn: in 63 % of the resamples.
    only = np.stack([np.eye(20)[0], np.eye(20)[0]], axis=1)
    value = lambda sums, whole: np.where(
        sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1), np.nan
    )
    got = bootstrap(only, value)
    assert got.low is None
    assert "no value in 3" in got.method
    nothing = bootstrap(only * 0, value)
    assert nothing.estimate is None
    assert nothing.method == "undefined: no value on the data"


def test_an_interval_contains_its_estimate_where_all_resamples_miss_it():
    # The minimum of the data: no resample lies below it.
    values = np.arange(30.0)
    hot = np.eye(30)
    least = lambda sums, whole: np.where(sums > 0, values, np.inf).min(axis=-1)
    got = bootstrap(hot, least)
    assert got.estimate == 0
    # About a third of the resamples lack the smallest row; half of the ties count.
    assert got.method == "bca"
    never = lambda sums, whole: np.where(sums.max(axis=-1) > 1, 1.0 + least(sums, 0), 0)
    got = bootstrap(hot, never)
    assert got.method == "normal"
    assert got.low < got.estimate < got.high


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(4)
    hardness = rng.normal(size=300)
    one = terms_of(hardness + 0.1 * rng.normal(size=300))
    two = terms_of(hardness + 0.2 + 0.1 * rng.normal(size=300))
    ids = np.arange(300)
    order = rng.permutation(300)
    got = paired_bootstrap(one, two[order], mean, ids=(ids, ids[order]))
    assert got.estimate == pytest.approx((one - two)[:, 0].mean())
    assert got.high - got.low < 0.05
    assert got.low < -0.2 < got.high
    alone = bootstrap(one, mean)
    assert alone.high - alone.low > 0.2
    # The mean's difference is the mean of the differences, draw by draw.
    direct = bootstrap(terms_of((one - two)[:, 0]), mean)
    assert got.low == pytest.approx(direct.low, rel=1e-9)


def test_a_paired_difference_needs_the_same_rows():
    one = terms_of(np.arange(4.0))
    ids = np.arange(4)
    with pytest.raises(BadInput, match="2 rows were scored by one system only"):
        paired_bootstrap(one, one, mean, ids=(ids, np.array([0, 1, 2, 9])))
    with pytest.raises(BadInput, match="row 1 occurs twice in the second"):
        paired_bootstrap(one, one, mean, ids=(ids, np.array([0, 1, 1, 3])))


def test_an_interval_over_seeds_is_students():
    got = over_seeds([0.8, 0.9, 0.85])
    # t(2, 0.975) = 4.302653, s = 0.05.
    half = 4.302653 * 0.05 / math.sqrt(3)
    assert got.estimate == pytest.approx(0.85)
    assert got.low == pytest.approx(0.85 - half, rel=1e-6)
    assert got.high == pytest.approx(0.85 + half, rel=1e-6)
    assert (got.num_groups, got.method) == (3, "t")


def test_one_seed_or_equal_seeds_have_no_interval():
    assert over_seeds([0.5]).method == "undefined: one seed"
    assert over_seeds([0.5, 0.5]).low is None
    with pytest.raises(BadInput, match="finite"):
        over_seeds([0.5, float("nan")])
    with pytest.raises(BadInput, match="finite"):
        over_seeds([])


def test_arguments_out_of_range_are_refused():
    values = terms_of([1.0, 2.0])
    with pytest.raises(BadInput, match="level"):
        bootstrap(values, mean, level=95)
    with pytest.raises(BadInput, match="resamples"):
        bootstrap(values, mean, resamples=0)
    with pytest.raises(BadInput, match="no row"):
        bootstrap(values, mean, weight=np.zeros(2))
    with pytest.raises(BadInput, match="3 group labels for 2 rows"):
        bootstrap(values, mean, groups=np.arange(3))
