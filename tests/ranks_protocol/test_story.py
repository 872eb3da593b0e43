"""A notebook shows what the results say: frames and figures of a made-up study."""

import io
import json

import numpy as np
import pytest
from test_verdicts import GOOD, settings, study

from experiments.ranks_protocol import report, story
from lowrank.core.errors import BadInput

LAYERS = ("one", "two", "three")
TUNED = {0.003: 0.4, 0.01: 0.1, 0.03: 0.2}


def with_ranks(own, truth):
    for arm, records in own["judged"].items():
        for one in records:
            one["ranks"] = {"one": 1, "two": one["seed"] % 2, "three": 4}
            one["truth"] = truth
        own["tuned"][arm] = [
            {"seed": 1000, "rate": rate, "error": error}
            for rate, error in TUNED.items()
        ]
    return own


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A teacher, and a text at two budgets, through the file that a study leaves."""
    own = {"heterogeneous": with_ranks(study(**GOOD)["heterogeneous"],
                                       dict.fromkeys(LAYERS, 2))}  # fmt: skip
    arms = {"uniform": (0.0,), "fisher": (-0.5, 0.01), "random": (0.1, 0.01)}
    for name in ("trec6@2", "trec6@4"):
        text = with_ranks(study(**arms)["heterogeneous"], None)
        own[name] = {**text, "in_points": True}
    results = report.results(own, settings())
    path = tmp_path_factory.mktemp("story") / "study.json"
    path.write_text(json.dumps(results))
    return story.load(path)


def drawn(figure):
    """Every text of a figure; it can be saved."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    assert len(file.getvalue()) > 1000
    return [
        text.get_text()
        for text in figure.findobj(match=lambda x: hasattr(x, "get_text"))
    ]


def test_frames_are_the_tables(found):
    assert {*story.outcomes(found)["answer"]} == {"met"}
    table = story.arms(found, "heterogeneous")
    assert [*table.index] == [*GOOD]
    np.testing.assert_allclose(table.loc["oracle", "to uniform"], -1.8, atol=1e-6)
    assert table.loc["oracle", "low"] < -1.8 < table.loc["oracle", "high"]
    assert np.isnan(table.loc["uniform", "to uniform"])


def test_ratios_are_where_the_table_has_them(found):
    figure = story.ratios(found)
    (axes,) = figure.axes
    line, _, _ = axes.containers[0]
    table = story.arms(found, "heterogeneous").drop("uniform")
    names = [label.get_text() for label in axes.get_yticklabels()]
    for x, y in zip(*line.get_data(), strict=True):
        assert x == pytest.approx(table.loc[names[int(y)], "to uniform"])
    assert "heterogeneous" in drawn(figure)


def test_ranks_of_a_seed_stand_beside_its_teacher(found):
    figure = story.ranks(found, "heterogeneous")
    grid = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(grid[0], [2, 2, 2])
    np.testing.assert_array_equal(grid[1], [1, 0, 4])
    odd = story.ranks(found, "heterogeneous", seed=2001)
    assert np.asarray(odd.axes[0].images[0].get_array())[1].tolist() == [1, 1, 4]
    assert "the teacher" in drawn(figure)
    assert "the teacher" not in drawn(story.ranks(found, "trec6@2"))


def test_rates_are_means_of_the_tuning_seeds(found):
    figure = story.rates(found, "heterogeneous")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == [*GOOD]
    np.testing.assert_allclose(lines[0].get_ydata(), [*TUNED.values()])
    assert "learning rate" in drawn(figure)


def test_texts_are_points_by_budget(found):
    figure = story.texts(found)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4"]
    assert {"fisher", "random", "trec6"} <= {*drawn(figure)}
    shown = axes.containers[0][0].get_ydata()
    expected = story.arms(found, "trec6@2").loc["fisher", "to uniform"]
    np.testing.assert_allclose(shown, [100 * expected] * 2)


def test_what_is_no_study_is_refused(found, tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    for name in ("missing.json", "other.json"):
        with pytest.raises(BadInput, match=name):
            story.load(tmp_path / name)
    with pytest.raises(BadInput, match="it has heterogeneous"):
        story.ranks(found, "imaginary")
    with pytest.raises(BadInput, match="the seeds are 2000"):
        story.ranks(found, "heterogeneous", seed=1)
    teacher = {**found, "tasks": {"heterogeneous": found["tasks"]["heterogeneous"]}}
    with pytest.raises(BadInput, match="no real text"):
        story.texts(teacher)
    bare = {**found["tasks"]["heterogeneous"], "tuned": {}}
    with pytest.raises(BadInput, match="one learning rate"):
        story.rates({**found, "tasks": {"heterogeneous": bare}}, "heterogeneous")
