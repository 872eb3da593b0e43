"""What a run's ranks did can be read back: moves, budgets, final ranks."""

import subprocess
import sys

import numpy as np
import pytest
from rank_histories import ARRAYS, RANKS, TOLD, history, recorded

from lowrank.core.errors import BadInput, Corrupt
from lowrank.io.history import load_ranks

MOVES = ["event", "step", "layer", "births", "deaths", "revivals"]


def rows(frame, names):
    return [tuple(row) for row in frame[names].itertuples(index=False)]


def test_ranks_over_time_are_those_of_every_layer(tmp_path):
    found = load_ranks(recorded(tmp_path / "run", told=TOLD)).ranks
    expected = [
        (event, step, layer, ranks[event])
        for event, step in enumerate((0, 4, 8))
        for layer, ranks in RANKS.items()
    ]
    assert rows(found, ["event", "step", "layer", "rank"]) == expected
    assert found["site"].tolist()[:3] == ["a/kernel", "a/kernel", "b/kernel"]


def test_moves_tell_an_exchange_that_ranks_do_not(tmp_path):
    found = load_ranks(recorded(tmp_path / "run", told=TOLD))
    assert rows(found.moves, MOVES) == [
        (1, 4, "a[0]/kernel", 0, 1, 0),
        (1, 4, "b/kernel", 1, 0, 0),
        (2, 8, "a[0]/kernel", 1, 1, 0),
        (2, 8, "a[1]/kernel", 0, 1, 0),
    ]
    assert rows(found.summary, ["layer", "start", "final", "moved"]) == [
        ("a[0]/kernel", 2, 1, 2),
        ("a[1]/kernel", 2, 1, 1),
        ("b/kernel", 1, 2, 1),
    ]
    assert found.final == {layer: ranks[-1] for layer, ranks in RANKS.items()}


def test_budgets_and_their_time_averages(tmp_path):
    found = load_ranks(recorded(tmp_path / "run", told={**TOLD, "target": [6, 5, 4]}))
    assert rows(found.budget, ["step", "duration", "target", "used", "forward"]) == [
        (0, 4, 6, 5, 5), (4, 4, 5, 5, 5), (8, 2, 4, 4, 4),
    ]  # fmt: skip
    average = {"target": (4 * 6 + 4 * 5 + 2 * 4) / 10, "used": 4.8, "forward": 4.8}
    assert found.averages == pytest.approx(average, rel=1e-12)


def test_parameters_are_counted_at_the_cost_of_each_layer(tmp_path):
    found = load_ranks(recorded(tmp_path / "run", told={**TOLD, "unit": "parameters"}))
    assert found.budget["used"].tolist() == [47, 44, 34]
    assert found.averages["used"] == pytest.approx((4 * 47 + 4 * 44 + 2 * 34) / 10)


def test_losers_that_keep_their_gates_are_computed_with_and_come_back(tmp_path):
    found = load_ranks(recorded(tmp_path / "run", told={**TOLD, "revivable": True}))
    assert found.budget["forward"].tolist() == [5, 5, 4]
    assert found.moves["births"].sum() == 0
    assert found.moves["revivals"].sum() == 2
    early = load_ranks(
        recorded(tmp_path / "early", told={**TOLD, "revivable": True, "end": 9})
    )
    assert early.budget["forward"].tolist() == [5, 5, 5], "the last event never was"


@pytest.mark.parametrize("revivable", [True, False])
def test_a_rank_is_the_last_one_and_what_moved(revivable):
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 6, (9, 7))
    gained = np.maximum(np.diff(grid, axis=0), 0) + rng.integers(0, 2, (8, 7))
    found = history(grid, range(0, 90, 10), gained=gained, revivable=revivable)
    replay = np.repeat(grid[:1], 9, axis=0)
    place = {layer: at for at, layer in enumerate(found.layers)}
    for one in found.moves.itertuples():
        change = one.births + one.revivals - one.deaths
        replay[one.event :, place[one.layer]] += change
    np.testing.assert_array_equal(replay, grid)


def test_what_is_no_run_of_moving_ranks_is_refused(tmp_path):
    with pytest.raises(BadInput, match="there is no run directory"):
        load_ranks(tmp_path / "nowhere")
    recorded(tmp_path / "sweep" / "one", told=TOLD)
    with pytest.raises(BadInput, match=r"has no status.json.*name the directory of"):
        load_ranks(tmp_path / "sweep")
    recorded(tmp_path / "fixed", name="given")
    with pytest.raises(BadInput, match=r"stayed as they were \(ranks=given\)"):
        load_ranks(tmp_path / "fixed")
    recorded(tmp_path / "half", told=TOLD, finish=False)
    with pytest.raises(BadInput, match="holds no finished run"):
        load_ranks(tmp_path / "half")


@pytest.mark.parametrize("name", ["ranks.npz", "moves.json"])
def test_damage_is_seen(tmp_path, name):
    directory = recorded(tmp_path / "run", told=TOLD)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(Corrupt, match=f"{name} has sha256"):
        load_ranks(directory)
    (directory / name).unlink()
    with pytest.raises(Corrupt, match=f"{name}.*(read|No such file)"):
        load_ranks(directory)


@pytest.mark.parametrize(
    ("told", "arrays", "said"),
    [
        ({"schema": 2}, {}, "has schema 2, and this version reads 1"),
        ({"target": [5, 5]}, {}, "do not fit together"),
        ({"sites": {"c/kernel": {"layers": 2, "cost": 1}}}, {}, "'c.kernel'"),
        ({}, {"b.kernel": np.array([1, 2], np.int32)}, "do not fit together"),
        ({}, {"b.kernel": np.array([1.0, 2.5, 2.0])}, "are no whole numbers"),
        ({}, {"b.kernel": np.array([1, 3, 2], np.int32)}, "gains and has not"),
        ({}, {"steps": np.array([0, 8, 4], np.int32)}, "steps fall"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, told, arrays, said):
    recorded(tmp_path / "run", told={**TOLD, **told}, arrays={**ARRAYS, **arrays})
    with pytest.raises(Corrupt, match=said):
        load_ranks(tmp_path / "run")


def test_reading_loads_no_base_and_draws_nothing():
    code = (
        "import lowrank, sys; lowrank.load_ranks\n"
        "print({'flax', 'orbax', 'matplotlib', 'lowrank.run'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
