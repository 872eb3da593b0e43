"""Figures of ranks show the numbers of the history, whatever its layers are called."""

import itertools

import numpy as np
import pytest
from rank_histories import TOLD, history, recorded

from lowrank.io.history import load_ranks
from lowrank.report.rank_figures import (
    budget_over_time,
    draw_ranks,
    final_ranks,
    place_of,
    ranks_over_time,
    shorten,
)


@pytest.fixture
def small(tmp_path):
    return load_ranks(recorded(tmp_path / "run", told={**TOLD, "target": [6, 5, 4]}))


def stack(kinds, depth, **more):
    layers = [f"block[{d}]/{kind}/kernel" for kind in kinds for d in range(depth)]
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 9, (6, len(layers)))
    return history(ranks, [0, 10, 20, 30, 40, 50], layers=layers, **more)


def labels(axis, **more):
    return [label.get_text() for label in axis.get_ticklabels(**more)]


def test_the_map_has_a_row_per_layer_and_a_field_per_event(small):
    axes, bar = ranks_over_time(small).figure.axes
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array(), [[2, 1, 1], [2, 2, 1], [1, 2, 2]])
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 4, 8, 10])
    assert labels(axes.yaxis) == ["a", "b"]
    assert labels(axes.yaxis, minor=True) == ["0", "1", ""]
    assert axes.get_xlabel() == "training step"
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first layer is on top"
    assert bar.get_ylabel() == "rank, components"


def test_a_layer_without_a_correction_is_grey_and_no_other():
    (mesh,) = (
        ranks_over_time(history([[2, 1], [0, 1]], [0, 5])).figure.axes[0].collections
    )
    colors = mesh.cmap(mesh.norm(np.array([0, 1, 2])))[:, :3]
    spread = np.ptp(colors, axis=1)
    assert spread[0] == 0
    assert (spread[1:] > 0.1).all()


def test_the_budget_is_drawn_as_asked_for_and_as_used(small):
    top, bottom = budget_over_time(small).figure.axes
    drawn = {one.get_label().split(":")[0]: one for one in top.patches}
    assert set(drawn) == {"used", "target"}
    for name, values in {"used": [5, 5, 4], "target": [6, 5, 4]}.items():
        data = drawn[name].get_data()
        np.testing.assert_array_equal(data.values, values)
        np.testing.assert_array_equal(data.edges, [0, 4, 8, 10])
    assert drawn["used"].get_label() == "used: 5 to 4, time average 4.8"
    assert drawn["target"].get_label() == "target: 6 to 4, time average 5.2"
    assert top.lines[0].get_ydata()[0] == pytest.approx(4.8)
    assert top.get_ylabel() == "budget, components"
    bars = {
        one.get_label(): [(b.get_x() + b.get_width() / 2, b.get_height()) for b in one]
        for one in bottom.containers
    }
    assert bars.keys() == {"births", "deaths"}
    assert bars["births"] == [pytest.approx((4, 1)), pytest.approx((8, 1))]
    assert bars["deaths"] == [pytest.approx((4, -1)), pytest.approx((8, -2))]


def test_what_was_computed_with_is_a_line_where_losers_keep_their_gates():
    found = history([[3, 3], [2, 1]], [0, 5], revivable=True)
    top = budget_over_time(found).figure.axes[0]
    assert {one.get_label().split(":")[0] for one in top.patches} == {
        "computed with", "used", "target",
    }  # fmt: skip


def test_final_ranks_stand_by_kind_and_layer(small):
    axes = final_ranks(small).figure.axes[0]
    shown = np.ma.filled(axes.get_images()[0].get_array().astype(float), np.nan)
    # b has no number: a column of its own.
    np.testing.assert_array_equal(shown, [[np.nan, 1, 1], [2, np.nan, np.nan]])
    assert [text.get_text() for text in axes.texts] == ["1", "1", "2"]
    assert labels(axes.xaxis) == ["", "0", "1"]
    assert axes.get_xlabel() == "layer"


def test_layers_are_in_the_order_of_their_numbers():
    layers = [f"block[{d}]/kernel" for d in (10, 2, 0)]
    found = history([[5, 6, 7], [1, 2, 3]], [0, 5], layers=layers)
    axes = ranks_over_time(found).figure.axes[0]
    np.testing.assert_array_equal(
        axes.collections[0].get_array(), [[7, 3], [6, 2], [5, 1]]
    )
    assert labels(axes.yaxis, minor=True) == ["0", "2", "10"]


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("encoder/layer[3]/query/kernel", ("encoder/layer/query/kernel", "3")),
        ("encoder/layer_11/fc1/kernel", ("encoder/layer_*/fc1/kernel", "11")),
        ("grid/cell[2,1]/kernel", ("grid/cell/kernel", "2,1")),
        ("head/kernel", ("head/kernel", "")),
    ],
)
def test_a_name_is_a_kind_and_a_number(layer, place):
    assert place_of(layer) == place


@pytest.mark.parametrize(
    ("kinds", "short"),
    [
        (["e/l/q/kernel", "e/l/m/up/kernel"], (["q", "m/up"], "e/l", "kernel")),
        (["a/kernel"], (["a/kernel"], "", "")),
        (["a/b", "a/b", "a/c"], (["b", "b", "c"], "a", "")),
        (["x/kernel", "kernel"], (["x/kernel", "kernel"], "", "")),
    ],
)
def test_what_all_names_share_is_left_out(kinds, short):
    assert shorten(kinds) == short


@pytest.mark.parametrize(
    "found",
    [
        stack(["q", "k", "v", "o", "gate", "up", "down"], 48),
        stack(
            [
                f"kind_{letter}{other}"
                for letter in "abcdefghij"
                for other in "abcdefghi"
            ],
            1,
        ),
        stack(["q"], 1),
        stack(["q", "v"], 130),
    ],
    ids=["deep", "many kinds", "one", "very deep"],
)
@pytest.mark.parametrize("draw", [ranks_over_time, final_ranks])
def test_no_label_covers_another(found, draw):
    figure = draw(found).figure
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert max(figure.get_size_inches()) < 16
    for axis, side in ((axes.yaxis, "y"), (axes.xaxis, "x")):
        for minor in (False, True):
            boxes = [
                label.get_window_extent()
                for label in axis.get_ticklabels(minor=minor)
                if label.get_text()
            ]
            ends = sorted(
                (getattr(b, f"{side}0"), getattr(b, f"{side}1")) for b in boxes
            )
            for (_, before), (after, _) in itertools.pairwise(ends):
                # Figures have no descenders: boxes of text may touch.
                assert after > before - 2


@pytest.mark.parametrize(
    "found",
    [
        history([[0, 0], [0, 0]], [0, 5]),
        history([[3, 2]], [0]),
        history([[3, 2], [1, 1]], [0, 0]),
        history([[3, 2], [1, 1]], [0, 5], num_steps=5),
    ],
    ids=["no rank", "no event", "before the first step", "after the last step"],
)
def test_odd_histories_are_drawn(tmp_path, found):
    for drawing in draw_ranks(found):
        assert len(drawing.save(tmp_path)) == 2
