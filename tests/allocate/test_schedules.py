"""Budgets are the formulas in exact arithmetic, at every step and at both ends."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.allocate import schedules
from lowrank.allocate.schedules import Window, at, average, curve, held, window
from lowrank.core.errors import BadInput, UnknownName

EXACT = {
    "linear": lambda p: p,
    "cubic": lambda p: 1 - (1 - p) ** 3,
    "late_cubic": lambda p: p**3,
}


def by_hand(shape, t, w, first, last):
    """The formula of the page in fractions, for one step."""
    if t <= w.begin and t < w.end:
        return first
    if t >= w.end:
        return last
    value = first + (last - first) * EXACT[shape](Fraction(t - w.begin, w.length))
    return math.ceil(value) if last > first else math.floor(value)


@pytest.mark.parametrize("shape", [*EXACT])
@pytest.mark.parametrize(
    ("first", "last", "begin", "end", "steps"),
    [(864, 576, 100, 800, 1000), (576, 864, 0, 999, 1000), (90000, 3, 7, 1777, 2000),
     (5, 4, 3, 4, 9), (12, 12, 1, 5, 9)],
)  # fmt: skip
def test_budgets_equal_the_formula_at_every_step(shape, first, last, begin, end, steps):
    w = Window(begin, end, 10, steps)
    found = curve(shape, w, first, last)
    expected = [by_hand(shape, t, w, first, last) for t in range(steps + 1)]
    np.testing.assert_array_equal(found, expected)
    assert found[begin] == first
    assert found[end] == last
    assert (np.diff(found) * np.sign(last - first) >= 0).all(), "it turns back"


def test_the_cubic_is_that_of_adalora_s_code():
    """Not of the paper's Eq. 14, which gives 1188 at the beginning of this window."""
    begin, final, total, b0, bt = 100, 200, 1000, 864, 576
    found = curve("cubic", Window(begin, total - final, 1, total), b0, bt)

    def code(t):
        if t <= begin:
            return b0
        if t > total - final:
            return bt
        coeff = 1 - (t - begin) / (total - final - begin)
        return int(bt + (b0 - bt) * coeff**3)

    expected = np.array([code(t) for t in range(total + 1)])
    # The code cuts a double: where the exact value is whole it may be one lower.
    off = np.flatnonzero(found != expected)
    assert len(off) <= 3
    assert (found[off] - expected[off] == 1).all()
    assert found[100] == 864
    assert found[800] == 576


def test_float32_would_be_wrong_somewhere():
    """Why budgets are looked up: the obvious formula in float32 is off by one."""
    one = np.float32
    p = np.arange(300, dtype=one) / one(300)
    naive = np.floor(one(144) + one(432) * (one(1) - p) ** 3)
    assert (naive != curve("cubic", Window(0, 300, 1, 301), 576, 144)[:300]).any()


def test_the_cosine_is_exact_where_it_is_rational():
    w = Window(0, 600, 1, 700)
    found = curve("cosine", w, 800, 0)
    assert [found[t] for t in (0, 200, 300, 400, 600)] == [800, 600, 400, 200, 0]
    values = [800 - 400 * (1 - math.cos(math.pi * t / 600)) for t in range(600)]
    # Within rounding of the double, floor may go either way.
    assert np.abs(found[:600] - np.floor(values)).max() <= 1
    assert (found[:600] == np.floor(np.array(values) + 1e-9)).mean() > 0.99


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_a_staircase_reaches_its_end_and_never_more(length, every, first, more):
    w = Window(5, 5 + length, every, length + 10)
    table = curve("staircase", w, first, first + more)
    events = np.flatnonzero(w.events())
    assert len(events) == w.num_events
    assert events[-1] == w.end
    assert table[w.begin] == first
    assert (table[w.end :] == first + more).all()
    pace = -(-more // w.num_events)
    assert (np.diff(table) >= 0).all()
    assert np.diff(table).max(initial=0) <= pace


def test_a_staircase_of_a_pace():
    w = Window(10, 50, 10, 60)
    table = curve("staircase", w, 4, 9, pace=2)
    assert table[[10, 19, 20, 30, 40, 50]].tolist() == [4, 4, 6, 8, 9, 9]
    with pytest.raises(BadInput, match="climbs 2 at each, and may climb 1"):
        curve("staircase", w, 4, 9, pace=1)
    with pytest.raises(BadInput, match="grows, and the budget is to fall"):
        curve("staircase", w, 9, 4)


@given(st.data())
def test_events_and_the_budget_in_force(data):
    steps = data.draw(st.integers(2, 80))
    end = data.draw(st.integers(0, steps - 1))
    begin = data.draw(st.integers(0, end))
    w = Window(begin, end, data.draw(st.integers(1, 30)), steps)
    events = w.events()
    expected = [
        t == end or (begin < t < end and (t - begin) % w.every == 0)
        for t in range(steps + 1)
    ]
    np.testing.assert_array_equal(events, expected)
    table = curve("linear", w, 50, 20)
    in_force = held(table, w)
    now = 50 if end else 20
    for t in range(steps + 1):
        now = table[t] if events[t] else now
        assert in_force[t] == now
    assert in_force[-1] == 20
    assert average(in_force) == pytest.approx(np.mean(in_force[:steps]))
    assert average(in_force) >= average(table), "a shrinking budget is never ahead"


def test_swaps_fade_out():
    w = Window(0, 100, 10, 200)
    table = schedules.moves(w, 4)
    assert table[0] == 4
    assert (table[100:] == 0).all()
    assert (np.diff(table) <= 0).all()
    halves = [
        math.floor(4 * (1 - Fraction(t, 100) ** 3) + Fraction(1, 2)) for t in range(100)
    ]
    np.testing.assert_array_equal(table[:100], halves)


def test_a_traced_step_reads_the_same_and_trials_have_their_own():
    tables = jnp.stack(
        [
            jnp.asarray(curve(shape, Window(2, end, 1, 40), 30, 10))
            for shape, end in (("cubic", 30), ("linear", 20), ("cosine", 39))
        ]
    )
    read = jax.jit(jax.vmap(at, in_axes=(0, None)))
    for step in range(41):
        np.testing.assert_array_equal(read(tables, jnp.int32(step)), tables[:, step])
    assert at(tables[0], 99) == 10
    assert at(tables[0], -1) == 30


def test_windows_are_steps_or_fractions_of_the_run():
    assert window(0.15, 0.6, 5, 200) == Window(30, 120, 5, 200)
    assert window(30, 0.6, 5, 200) == window(0.15, 120, 5, 200)
    # A double's 0.29 * 100 is below 29.
    assert window(0.29, 0.57, 1, 100) == Window(29, 57, 1, 100)


@pytest.mark.parametrize(
    ("begin", "end", "every", "message"),
    [(0.5, 0.2, 1, "in this order"), (0, 100, 1, "run of 100"), (0, 1.0, 1, "run of"),
     (0, 150, 1, "run of 100"), (-1, 5, 1, "in this order"),
     (0.1, 1.5, 1, "no fraction"), (0, 5, 0, "ranks.every")],
)  # fmt: skip
def test_windows_beyond_the_run_are_refused(begin, end, every, message):
    with pytest.raises(BadInput, match=message):
        window(begin, end, every, 100)


def test_unknown_and_impossible_shapes_are_refused():
    w = Window(1, 5, 1, 9)
    with pytest.raises(UnknownName, match=r"'cubik' is unknown\. Nearest: 'cubic'"):
        curve("cubik", w, 3, 1)
    with pytest.raises(BadInput, match="'constant' cannot lead"):
        curve("constant", w, 3, 1)
    assert (curve("constant", w, 3, 3) == 3).all()
