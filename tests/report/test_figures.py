"""Figures show the numbers of the frame, and say why where they show none."""

import re

import numpy as np
import pandas as pd
import pytest

from lowrank.core.errors import BadInput
from lowrank.report.arms import arm_table, best_over, matched
from lowrank.report.drawing import Trials
from lowrank.report.figures import (
    best_by_rank,
    cost_quality,
    draw_all,
    heat_map,
    rate_curves,
    regularization_curves,
)

VARIED = ["delta.rank", "optim.lr", "optim.weight_decay"]


def value(rank, rate, decay, seed):
    return 0.5 + rank / 100 - abs(np.log10(rate) + 3) / 10 - decay + seed / 1000


def frame(ranks=(2, 8), rates=(1e-4, 1e-3, 1e-2), decays=(0.0,), seeds=(0, 1, 2)):
    rows = [
        {
            "status": "done", "seed": s, "delta.rank": r, "optim.lr": lr,
            "optim.weight_decay": w, "best.accuracy": value(r, lr, w, s),
            "costs.trained_parameters": 1000.0 * r, "costs.num_trials": 4,
            "costs.step_median_seconds": 0.4 + 0.1 * r, "costs.step_flops": 1e9,
            "directory": f"{r}-{lr}-{w}-{s}",
        }
        for r in ranks for lr in rates for w in decays for s in seeds
    ]  # fmt: skip
    return pd.DataFrame(rows)


def trials(found, varied=VARIED):
    return Trials(found, [n for n in varied if found[n].nunique() > 1], "best.accuracy")


def drawn_lines(drawing, panel=0):
    """label -> (x, y) of the lines that have a name."""
    lines = drawing.figure.axes[panel].get_lines()
    return {
        line.get_label(): (np.array(line.get_xdata()), np.array(line.get_ydata()))
        for line in lines
        if not line.get_label().startswith("_")
    }


def test_a_rate_curve_goes_through_the_means_of_the_seeds():
    drawing = rate_curves(trials(frame()))
    lines = drawn_lines(drawing)
    assert list(lines) == ["rank 2", "rank 8"]
    x, y = lines["rank 8"]
    np.testing.assert_allclose(x, [1e-4, 1e-3, 1e-2])
    np.testing.assert_allclose(y, [100 * value(8, lr, 0.0, 1) for lr in x], rtol=1e-12)
    (axes,) = drawing.figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "validation accuracy, %"
    assert "optim.lr" in axes.get_xlabel()
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    ends = [100 * value(8, lr, 0.0, s) for lr in x for s in (0, 2)]
    assert (band.min(), band.max()) == pytest.approx((min(ends), max(ends)))


def test_a_heat_map_has_a_cell_for_every_pair_and_gaps_stay_gaps():
    found = frame()
    found = found[~((found["delta.rank"] == 8) & (found["optim.lr"] == 1e-2))]
    drawing = heat_map(trials(found))
    image = drawing.figure.axes[0].get_images()[0].get_array()
    expected = [
        [100 * value(r, lr, 0.0, 1) for lr in (1e-4, 1e-3, 1e-2)] for r in (2, 8)
    ]
    np.testing.assert_allclose(image[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(image[1, :2], expected[1][:2], rtol=1e-12)
    assert np.isnan(np.ma.filled(image[1, 2], np.nan))
    texts = {t.get_text(): t.get_fontweight() for t in drawing.figure.axes[0].texts}
    assert texts[f"{expected[1][1]:.1f}"] == "bold"
    assert len(drawing.figure.axes[0].texts) == 6
    assert "\N{EN DASH}" in texts


def test_each_rank_stands_at_its_best_rate_with_its_interval():
    drawing = best_by_rank(trials(frame()))
    axes = drawing.figure.axes[0]
    notes = [text.get_text() for text in axes.texts]
    assert notes == ["lr 0.001", "lr 0.001"]
    segments = axes.collections[0].get_segments()
    half = 100 * 4.302652729911275 * 0.001 / 3**0.5  # t_(0.975, 2) s / sqrt(3)
    middle = 100 * value(2, 1e-3, 0.0, 1)
    low, high = sorted(point[1] for point in segments[0])
    assert (low, high) == pytest.approx((middle - half, middle + half), rel=1e-9)


def test_a_choice_among_other_settings_is_among_those_tried_everywhere():
    extra = frame(ranks=(8,), rates=(1e-3,), decays=(0.1, 0.3))
    # Tried at one rate only, and better there: it must not bend the curve.
    extra.loc[extra["optim.weight_decay"] == 0.1, "best.accuracy"] += 0.5
    found = pd.concat([frame(), extra], ignore_index=True)
    _, y = drawn_lines(rate_curves(trials(found)))["rank 8"]
    np.testing.assert_allclose(y[1], 100 * value(8, 1e-3, 0.0, 1), rtol=1e-12)
    lines = drawn_lines(regularization_curves(trials(found)))
    (name, (x, y)) = next(iter(lines.items()))
    assert (name, len(lines)) == ("rank 8", 1)
    np.testing.assert_allclose(x, [0, 0.1, 0.3])
    np.testing.assert_allclose(y[0], 100 * value(8, 1e-3, 0.0, 1), rtol=1e-12)


def test_where_no_choice_was_tried_everywhere_all_are_kept():
    arms = pd.DataFrame({"x": [1, 2], "other": ["a", "b"], "num_done": 1})
    assert len(matched(arms, ["other"], ["x"], [])) == 2
    arms = pd.DataFrame({"x": [1, 2, 2], "other": ["a", "a", "b"], "num_done": 1})
    assert matched(arms, ["other"], ["x"], [])["other"].tolist() == ["a", "a"]
    assert best_over(arms, ["x"])["other"].tolist() == ["a", "a"]


def test_costs_are_those_of_one_trial_and_equal_ones_are_no_panel():
    drawing = cost_quality(trials(frame()))
    assert len(drawing.figure.axes) == 2
    seconds = drawn_lines(drawing, panel=1)["rank 8"][0]
    np.testing.assert_allclose(seconds, (0.4 + 0.8) / 4)


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"rates": (1e-3,)}, {"rate_curves": "optim.lr", "heat_map": "optim.lr"}),
        ({"ranks": (8,)}, {"heat_map": "delta.rank", "best_by_rank": "delta.rank"}),
    ],
)
def test_a_figure_with_nothing_to_show_says_why(tmp_path, changes, absent):
    for drawing in draw_all(trials(frame(**changes))):
        written = drawing.save(tmp_path)
        if drawing.name in {*absent, "regularization"}:
            assert re.match(r"Not drawn: ", drawing.note)
            assert absent.get(drawing.name, "weight_decay") in drawing.note
            assert not written
            assert "<img" not in drawing._repr_html_()
        elif drawing.figure is not None:
            assert [p.suffix for p in written] == [".png", ".svg"]
            assert all(p.stat().st_size > 5000 for p in written)
            assert "<img" in drawing._repr_html_()


def test_the_same_trials_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        rate_curves(trials(frame())).save(tmp_path / name)
    files = [(tmp_path / n / "rate_curves.svg").read_bytes() for n in ("a", "b")]
    assert files[0] == files[1]


def test_trials_without_any_done_give_reasons_and_no_crash():
    found = frame().assign(status="running")
    assert all(drawing.figure is None for drawing in draw_all(trials(found)))


def test_an_arm_with_one_seed_twice_is_refused():
    found = pd.concat([frame(), frame().head(1)])
    with pytest.raises(BadInput, match=r"one arm and have seed 0: 2-0.0001-0.0-0"):
        arm_table(found, VARIED, "best.accuracy")
