"""Splits are cut, thinned and merged without losing a row or moving others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.core.errors import BadInput
from lowrank.data.splits import Split, cut, make_task, merge, subsample


def split_of(labels, groups=None, name="row"):
    ids = tuple(f"{name}{n}" for n in range(len(labels)))
    texts = tuple(f"text of {one}" for one in ids)
    return Split(ids, texts, np.array(labels, np.int32), groups)


@given(
    st.lists(st.integers(0, 4), min_size=20, max_size=80),
    st.floats(0.05, 0.6),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_cut_keeps_every_row_once_and_every_class_in_train(labels, share, seed):
    whole = split_of(labels)
    try:
        rest, part = cut(whole, share, seed, "test")
    except BadInput:
        # Then no class had a row to spare by this draw.
        assert share * max(np.bincount(labels)) < 1
        return
    assert sorted(rest.ids + part.ids) == sorted(whole.ids)
    assert set(rest.labels) == set(labels)
    for label in set(labels):
        size = labels.count(label)
        assert abs((part.labels == label).sum() - share * size) <= 1


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=30, max_size=90
    ),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_no_group_is_cut_through(rows, seed):
    whole = split_of([row[0] for row in rows], tuple(f"g{row[1]}" for row in rows))
    try:
        rest, part = cut(whole, 0.3, seed, "test")
    except BadInput:
        return
    assert set(rest.groups).isdisjoint(part.groups)
    assert set(rest.labels) == set(whole.labels)
    assert len(rest) + len(part) == len(whole)


def test_a_cut_of_many_small_classes_has_the_share_asked_for():
    whole = split_of([n // 4 for n in range(1200)])
    _, part = cut(whole, 0.15, 0, "validation")
    assert 0.12 <= len(part) / 1200 <= 0.18


@pytest.mark.parametrize("seed", range(20))
def test_however_few_rows_there_are_a_cut_is_one_if_any_can_go(seed):
    """Five documents with a share of a tenth: by chance alone, nothing would go."""
    ids = tuple(f"d{number}" for number in range(5))
    groups = ("a", "a", "b", "c", "d")
    texts = Split(ids, ids, np.zeros(5, np.int32), groups)
    rest, part = cut(texts, 0.01, seed, "validation")
    assert len(part) >= 1
    assert sorted((*rest.ids, *part.ids)) == sorted(ids)
    assert not {*rest.groups} & {*part.groups}
    alone = Split(ids[:2], ids[:2], np.zeros(2, np.int32), ("a", "a"))
    with pytest.raises(BadInput, match="from 2 rows"):
        cut(alone, 0.5, seed, "validation")


def test_a_cut_depends_on_the_seed_and_on_ids_not_on_the_order():
    whole = split_of([n % 3 for n in range(90)])
    turned = whole.take(range(89, -1, -1))
    assert set(cut(whole, 0.2, 3, "test")[1].ids) == set(
        cut(turned, 0.2, 3, "test")[1].ids
    )
    other = cut(whole, 0.2, 4, "test")[1].ids
    assert set(cut(whole, 0.2, 3, "test")[1].ids) != set(other)


def test_a_smaller_sample_is_part_of_a_larger_one():
    whole = split_of([n % 5 for n in range(100)])
    few, more, all_of_it = (
        subsample(whole, rows_per_class=n, max_rows=None, seed=1) for n in (2, 6, 50)
    )
    assert np.bincount(few.labels).tolist() == [2] * 5
    assert np.bincount(more.labels).tolist() == [6] * 5
    assert set(few.ids) < set(more.ids)
    assert all_of_it.ids == whole.ids
    small, large = (
        subsample(whole, rows_per_class=None, max_rows=n, seed=1) for n in (7, 40)
    )
    assert set(small.ids) < set(large.ids)
    assert len(small) == 7
    assert set(small.labels) == set(range(5))
    other = subsample(whole, rows_per_class=2, max_rows=None, seed=2)
    assert set(other.ids) != set(few.ids)


def test_a_sample_without_a_row_for_each_class_is_refused():
    with pytest.raises(BadInput, match="at least 5"):
        subsample(split_of(range(5)), rows_per_class=None, max_rows=4, seed=0)


def test_merging_keeps_order_labels_and_groups():
    first = split_of([0, 1], ("a", "b"))
    both = merge(first, split_of([2], ("c",), name="other"))
    assert both.ids == ("row0", "row1", "other0")
    assert both.labels.tolist() == [0, 1, 2]
    assert both.groups == ("a", "b", "c")
    assert merge(first, split_of([1], name="other")).groups is None


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(BadInput, match="differ in length"):
        Split(("a",), ("x", "y"), np.zeros(2, np.int32))


def test_the_fingerprint_sees_every_column_and_the_order():
    base = split_of([0, 1], ("a", "b"))
    variants = [
        base,
        split_of([0, 1]),
        split_of([1, 1], ("a", "b")),
        split_of([0, 1], ("a", "c")),
        split_of([0, 1], ("a", "b"), name="other"),
        base.take([1, 0]),
        Split(base.ids, ("text of row0x", "text of row1"), base.labels, base.groups),
        Split(("row0r", "ow1"), base.texts, base.labels, base.groups),
    ]
    assert len({one.fingerprint() for one in variants}) == len(variants)
    tasks = [
        make_task("t", ("a", "b"), {"train": base}, {}),
        make_task("t", ("ab", ""), {"train": base}, {}),
        make_task("t", ("a", "b"), {"test": base}, {}),
    ]
    assert len({task.fingerprint for task in tasks}) == 3
    assert tasks[0].provenance == {"rows": {"train": 2}, "num_classes": 2}
