"""Batches of rows are a function of the step, and a seed's own."""

import numpy as np
import pytest

from lowrank.core.errors import BadInput, Corrupt
from lowrank.data.rows import RowPipeline, Rows
from lowrank.train.batches import TrainBatches, entries_of, shape_of

NUM, FEATURES, TARGETS = 12, 3, 2


def rows(seed, count=NUM):
    rng = np.random.default_rng(seed)
    draw = lambda width: rng.normal(size=(count, width)).astype(np.float32)
    return Rows(draw(FEATURES), draw(TARGETS))


def made(seeds=(4, 7, 4), **more):
    given = {"trial_seeds": seeds, "batch_size": 4, "num_steps": 7, **more}
    return RowPipeline({seed: rows(seed) for seed in seeds}, **given)


def test_it_is_what_training_asks_for():
    assert isinstance(made(), TrainBatches)
    (batch,) = made().examples()
    assert shape_of(batch) == (4, FEATURES)
    assert made().shapes() == ((4, FEATURES),)
    assert entries_of(batch) == 4, "a row is one activation, whatever its features"
    tokens = {"ids": np.zeros((2, 4, 5)), "label": np.zeros((2, 4))}
    assert (shape_of(tokens), entries_of(tokens)) == ((4, 5), 20)


def test_every_row_is_seen_once_an_epoch_with_its_own_target():
    pipeline = made()
    assert pipeline.steps_per_epoch == 3
    batches = [pipeline.batch_at(step) for step in range(6)]
    for trial, seed in enumerate((4, 7, 4)):
        data = rows(seed)
        for epoch in (batches[:3], batches[3:]):
            index = np.concatenate([batch["index"][trial] for batch in epoch])
            assert sorted(index) == list(range(NUM))
        for batch in batches:
            own = batch["index"][trial]
            np.testing.assert_array_equal(batch["x"][trial], data.x[own])
            np.testing.assert_array_equal(batch["y"][trial], data.y[own])
            assert (batch["weight"] == 1).all()
    first = [batch["index"][0].tolist() for batch in batches]
    assert first[:3] != first[3:], "each epoch has an order of its own"


def test_a_seed_has_its_order_whoever_is_beside_it():
    alone, beside = made((7,)), made((4, 7, 4))
    for step, batch in alone.iterate():
        other = beside.batch_at(step)
        for name, value in batch.items():
            np.testing.assert_array_equal(value[0], other[name][1])


def test_a_run_that_continues_sees_what_it_would_have_seen():
    whole = dict(made().iterate())
    later = dict(made().iterate(5))
    assert [*later] == [5, 6]
    for step, batch in later.items():
        for name, value in batch.items():
            np.testing.assert_array_equal(value, whole[step][name])
    with pytest.raises(IndexError):
        made().batch_at(7)


def test_a_position_belongs_to_its_data():
    state = made().state(2)
    made().check_state(state)
    with pytest.raises(Corrupt, match="batch_size was 4 and is 6"):
        made(batch_size=6).check_state(state)
    with pytest.raises(Corrupt, match="rows was"):
        made((4, 7, 9)).check_state({**state, "trial_seeds": [4, 7, 9]})
    with pytest.raises(Corrupt, match="position 8"):
        made().check_state({**state, "position": 8})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 5}, "does not divide the 12 rows"),
        ({"batch_size": 0}, "does not divide"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"trial_seeds": ()}, "trial seeds"),
        ({"trial_seeds": (-1,)}, "trial seeds"),
        ({"trial_seeds": (5,)}, "seed 5 have no rows"),
    ],
)
def test_bad_numbers_are_refused(change, words):
    with pytest.raises(BadInput, match=words):
        made(**change)


def test_rows_of_different_shapes_are_refused():
    given = {"trial_seeds": (1, 2), "batch_size": 4, "num_steps": 1}
    with pytest.raises(BadInput, match="different shapes"):
        RowPipeline({1: rows(1), 2: rows(2, 8)}, **given)
