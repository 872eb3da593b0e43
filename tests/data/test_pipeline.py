"""Batches are a function of the step: each row once an epoch, and no step drifts."""

import itertools
import json
import logging
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.core.errors import BadInput, Corrupt
from lowrank.data.buckets import Batching
from lowrank.data.pipeline import TrainPipeline, eval_batches
from lowrank.data.splits import Split
from lowrank.data.tokens import Tokens, tokenize

BUCKETS = (4, 8, 16)


def tokens_of(lengths, max_length=16):
    rows = [np.arange(n, dtype=np.int32) + 100 * r for r, n in enumerate(lengths)]
    return Tokens(
        ids=np.concatenate(rows),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        max_length=max_length,
        num_truncated=0,
        num_suffix=0,
        pad_id=-7,
        fingerprint="f",
    )


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 17, 61)]
LABELS = np.arange(61, dtype=np.int32) % 5


def pipeline(lengths=LENGTHS, labels=None, *, batch_size=8, seed=0, **options):
    labels = LABELS[: len(lengths)] if labels is None else labels
    chosen = {"trial_seeds": (0, 1, 2), "num_epochs": 3, **options}
    batching = Batching(batch_size=batch_size, buckets=BUCKETS, seed=seed)
    return TrainPipeline(tokens_of(lengths), labels, batching=batching, **chosen)


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def order(batches):
    """Row numbers in the order in which one trial sees them."""
    return np.concatenate([b["index"] for b in batches], axis=1)


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=50),
    st.integers(1, 9),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_row_is_seen_exactly_once_per_epoch_and_trial(lengths, size, seed):
    made = pipeline(
        lengths, np.zeros(len(lengths), np.int32), batch_size=size, seed=seed
    )
    assert len(made) == made.num_steps == 3 * made.steps_per_epoch
    for epoch in range(3):
        first = epoch * made.steps_per_epoch
        seen = order(
            [made.batch_at(s) for s in range(first, first + made.steps_per_epoch)]
        )
        for trial in seen:
            assert sorted(trial[trial >= 0]) == list(range(len(lengths)))


def test_batches_hold_the_rows_they_name():
    made, tokens = pipeline(), tokens_of(LENGTHS)
    for step in range(made.steps_per_epoch):
        batch = made.batch_at(step)
        trials, size, seq = batch["ids"].shape
        assert (trials, size) == (3, 8)
        for t, b in itertools.product(range(trials), range(size)):
            if (row := int(batch["index"][t, b])) < 0:
                assert batch["weight"][t, b] == 0
                continue
            count = LENGTHS[row]
            assert max([0, *(x for x in BUCKETS if x < seq)]) < count <= seq
            assert batch["ids"][t, b, :count].tolist() == tokens.row(row).tolist()
            assert (batch["ids"][t, b, count:] == -7).all()
            assert batch["mask"][t, b].tolist() == [k < count for k in range(seq)]
            assert batch["label"][t, b] == LABELS[row]
            assert batch["weight"][t, b] == 1
    dtypes = {name: value.dtype.name for name, value in batch.items()}
    assert dtypes == {
        "ids": "int32",
        "mask": "bool",
        "label": "int32",
        "weight": "float32",
        "index": "int32",
    }


def test_rows_that_fill_a_batch_weigh_nothing_but_can_be_computed():
    made = pipeline([3, 3, 3], batch_size=8, trial_seeds=(0,))
    batch = made.batch_at(0)
    assert batch["weight"].sum() == 3
    assert sorted(batch["index"][0]) == [-1] * 5 + [0, 1, 2]
    # An all-masked row would divide by zero in a mean over tokens.
    assert batch["mask"].any(axis=-1).all()
    assert (batch["label"] >= 0).all()


def test_trials_meet_the_same_shapes_each_in_its_own_order():
    made = pipeline()
    alone = [pipeline(trial_seeds=(seed,)) for seed in (0, 1, 2)]
    for step in range(made.num_steps):
        batch = made.batch_at(step)
        for trial, single in enumerate(alone):
            same(
                {k: v[trial : trial + 1] for k, v in batch.items()},
                single.batch_at(step),
            )
    seen = order([made.batch_at(step) for step in range(made.steps_per_epoch)])
    assert not (seen[0] == seen[1]).all()
    assert not (seen[1] == seen[2]).all()


def batches_of(made, epoch):
    """The batches of the first trial in an epoch, as (length, rows)."""
    first = epoch * made.steps_per_epoch
    steps = range(first, first + made.steps_per_epoch)
    found = [made.batch_at(step) for step in steps]
    return [(b["ids"].shape[-1], tuple(b["index"][0].tolist())) for b in found]


def test_an_epoch_differs_from_the_one_before_in_sequence_and_in_rows():
    first, second = (batches_of(pipeline(), epoch) for epoch in (0, 1))
    assert [length for length, _ in first] != [length for length, _ in second]
    assert set(first).isdisjoint(second)


def test_the_data_seed_orders_buckets_and_the_trial_seed_orders_rows():
    base = batches_of(pipeline(), 1)
    moved = batches_of(pipeline(seed=5), 1)
    # Whole batches have moved; their rows are the same.
    assert moved != base
    assert {frozenset(rows) for _, rows in moved} == {frozenset(r) for _, r in base}
    mixed = batches_of(pipeline(trial_seeds=(7,)), 1)
    assert [length for length, _ in mixed] == [length for length, _ in base]
    assert set(mixed).isdisjoint(base)


@pytest.mark.parametrize("start", [0, 1, 7, 26, 27])
def test_a_run_that_continues_sees_what_it_would_have_seen(start):
    made = pipeline()
    assert made.num_steps == 27
    whole = list(made.iterate())
    assert [step for step, _ in whole] == list(range(27))
    rest = list(pipeline().iterate(start))
    assert [step for step, _ in rest] == list(range(start, 27))
    for (_, first), (_, second) in zip(whole[start:], rest, strict=True):
        same(first, second)


def test_a_loop_that_is_left_early_leaves_no_threads():
    before = threading.active_count()
    for _ in range(3):
        batches = pipeline(num_epochs=50).iterate()
        next(batches)
        batches.close()
    give_up = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < give_up, threading.enumerate()
        time.sleep(0.01)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_out_the_rows_of_each_batch(count):
    whole = pipeline()
    parts = [pipeline(process_index=p, process_count=count) for p in range(count)]
    for step in range(whole.num_steps):
        local = [part.batch_at(step) for part in parts]
        joined = {k: np.concatenate([b[k] for b in local], axis=1) for k in local[0]}
        same(joined, whole.batch_at(step))
    assert {size for size, _ in parts[0].shapes()} == {8 // count}


def test_shapes_and_examples_are_those_that_occur():
    made = pipeline()
    occurring = {b["ids"].shape[1:] for _, b in made.iterate()}
    assert set(made.shapes()) == occurring
    assert [b["ids"].shape[1:] for b in made.examples()] == list(made.shapes())
    assert list(made.shapes()) == sorted(made.shapes())
    short = pipeline(num_epochs=None, num_steps=1)
    assert len(short.shapes()) == len(short.examples()) == 1
    assert short.shapes()[0] == short.batch_at(0)["ids"].shape[1:]


def test_buckets_without_rows_and_beyond_the_longest_row_are_left_out():
    tokens = tokens_of([2, 9, 9], max_length=10)
    made = TrainPipeline(
        tokens,
        LABELS[:3],
        batching=Batching(batch_size=2, buckets=(4, 8, 16)),
        trial_seeds=(0,),
        num_epochs=1,
    )
    assert made.shapes() == ((2, 4), (2, 10))
    assert made.report()["rows_per_bucket"] == {"4": 1, "10": 2}
    assert made.report()["padding_share"] == pytest.approx(1 - 20 / 24)


def test_rows_beyond_the_last_bucket_are_cut_as_the_tokenizer_would(tokenizer, caplog):
    text = " ".join(f"w{n}" for n in range(20))
    rows = Split(("a", "b"), (text, "w1"), np.zeros(2, np.int32))
    tokens = tokenize(rows, tokenizer, max_length=64, data="d")
    with caplog.at_level(logging.WARNING):
        made = TrainPipeline(
            tokens,
            rows.labels,
            batching=Batching(batch_size=2, buckets=(9,)),
            trial_seeds=(0,),
            num_epochs=1,
        )
    assert "1 of 2 rows are longer than the last bucket of 9" in caplog.text
    assert made.report()["num_truncated"] == 1
    batch = made.batch_at(0)
    tokenizer.enable_truncation(9)
    long = batch["ids"][0][batch["index"][0] == 0][0]
    assert long.tolist() == tokenizer.encode(text).ids[:9]
    assert long[-1] == 3


def test_evaluation_sees_every_row_once_in_the_same_order():
    batching = Batching(batch_size=7, buckets=BUCKETS)
    batches = list(eval_batches(tokens_of(LENGTHS), LABELS, batching))
    index = np.concatenate([b["index"] for b in batches])
    weight = np.concatenate([b["weight"] for b in batches])
    assert sorted(index[index >= 0]) == list(range(61))
    assert ((index >= 0) == (weight == 1)).all()
    assert all(b["ids"].shape == (7, b["ids"].shape[1]) for b in batches)
    for batch in batches:
        real = batch["index"] >= 0
        rows = batch["index"][real]
        assert (np.diff(rows) > 0).all()
        assert batch["mask"][real].sum(axis=1).tolist() == [LENGTHS[r] for r in rows]
        assert (batch["label"][real] == LABELS[rows]).all()
        assert batch["mask"].any(axis=1).all()
    again = eval_batches(tokens_of(LENGTHS), LABELS, batching)
    for first, second in zip(batches, again, strict=True):
        same(first, second)
    huge = list(eval_batches(tokens_of([3] * 5), LABELS[:5], Batching(batch_size=4096)))
    assert [b["ids"].shape for b in huge] == [(4096, 16)]


def test_a_stored_position_is_accepted_by_its_own_run_only():
    made = pipeline()
    state = json.loads(json.dumps(made.state(12)))
    made.check_state(state)
    others = {
        "batching": pipeline(seed=1),
        "trial_seeds": pipeline(trial_seeds=(0, 1, 3)),
        "labels": pipeline(labels=(LABELS + 1) % 5),
        "process_count": pipeline(process_count=2),
    }
    for field, other in others.items():
        with pytest.raises(Corrupt, match=f"other data: {field} was"):
            other.check_state(state)
    with pytest.raises(Corrupt, match="other data: batching was"):
        pipeline(batch_size=4).check_state(state)
    for field in ("tokens", "version"):
        with pytest.raises(Corrupt, match=f"other data: {field} was"):
            made.check_state({**state, field: "x"})
        with pytest.raises(Corrupt, match=f"has no '{field}'"):
            made.check_state({k: v for k, v in state.items() if k != field})
    with pytest.raises(Corrupt, match="position 28"):
        made.check_state({**state, "position": 28})


def test_the_order_is_the_one_that_version_1_promised():
    """A change here breaks resuming: raise ORDER_VERSION with it."""
    made = pipeline([3] * 10, trial_seeds=(0, 1), batch_size=4)
    assert [made.batch_at(step)["index"].tolist() for step in range(3)] == [
        [[0, 2, 3, 1], [8, 7, 5, 6]],
        [[8, 5, 7, 6], [9, 0, 3, 4]],
        [[4, 9, -1, -1], [2, 1, -1, -1]],
    ]
    lengths = [pipeline().batch_at(step)["ids"].shape[-1] for step in range(9)]
    assert lengths == [16, 4, 4, 16, 8, 16, 16, 16, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": None}, "num_epochs or num_steps"),
        ({"num_steps": 3}, "not both"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"num_epochs": None, "num_steps": 0}, "num_steps must be at least 1"),
        ({"trial_seeds": ()}, "trial seeds"),
        ({"trial_seeds": (-1,)}, "trial seeds"),
        ({"process_count": 3}, "batch_size = 8 cannot be shared out to 3"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"labels": LABELS[:4]}, "61 tokenized rows have 4 labels"),
        ({"labels": LABELS - 1}, "has label -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        pipeline(**options)


def test_positions_outside_the_run_are_refused():
    made = pipeline()
    with pytest.raises(BadInput, match="cannot start at step 28"):
        made.iterate(28)
    for step in (-1, 27):
        with pytest.raises(IndexError):
            made.batch_at(step)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"buckets": ()},
        {"buckets": (8, 4)},
        {"buckets": (4, 4)},
        {"buckets": (0, 4)},
        {"seed": -1},
    ],
)
def test_batching_checks_itself(options):
    with pytest.raises(BadInput):
        Batching(**options)


def test_no_rows_and_buckets_without_room_are_refused(tokenizer):
    none = Tokens(
        ids=np.zeros(0, np.int32),
        offsets=np.zeros(1, np.int64),
        max_length=4,
        num_truncated=0,
        num_suffix=0,
        pad_id=0,
        fingerprint="f",
    )
    with pytest.raises(BadInput, match="no rows"):
        eval_batches(none, LABELS[:0], Batching())
    rows = Split(("a",), ("w1 w2",), np.zeros(1, np.int32))
    tokens = tokenize(rows, tokenizer, max_length=64, data="d")
    with pytest.raises(BadInput, match="no room for text"):
        eval_batches(tokens, rows.labels, Batching(buckets=(1,)))
