"""The report of a run's ranks: what is shown, what is written, how to go on."""

import io
import shlex

import pandas as pd
import pytest
from rank_histories import OVERRIDES, TOLD, history, recorded
from rich.console import Console

from lowrank.core.errors import CannotWrite, Corrupt
from lowrank.io.history import load_ranks
from lowrank.report.ranks import (
    MOST,
    report_ranks,
    retrain,
    show_ranks,
    write_ranks,
)


@pytest.fixture
def run(tmp_path):
    return recorded(tmp_path / "run", told=TOLD)


def shown(found, width=80):
    console = Console(file=io.StringIO(), width=width)
    show_ranks(found, console)
    return console.file.getvalue()


def test_a_table_shows_both_ends_and_how_often_a_layer_moved(run):
    text = shown(load_ranks(run))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.split("\n")
    ]
    assert [row for row in rows if row] == [
        ["a[0]/kernel", "2", "1", "2"],
        ["a[1]/kernel", "2", "1", "1"],
        ["b/kernel", "1", "2", "1"],
    ]
    assert "budget used: 5 to 4 components, time average 4.8" in " ".join(text.split())
    assert retrain(load_ranks(run)) in text, "in one line, to be copied"


def test_the_report_is_whole(run):
    path = report_ranks(str(run), Console(file=io.StringIO()))
    assert path == run / "ranks" / "ranks.md"
    text = path.read_text()
    assert "2 births, 3 deaths, 0 revivals; 3 of 3 layers moved, 0 ended" in text
    assert "2 events, before steps 4 to 8 of 10" in text
    assert "| `b/kernel` | 1 | 2 | 1 | 1 | 0 | 0 |" in text
    assert retrain(load_ranks(run)) in text
    for line in text.split("\n"):
        if line.startswith("!["):
            assert (path.parent / line.split("(")[1].rstrip(")")).stat().st_size > 5000
    assert text.count("![") == 3
    moves = pd.read_csv(path.parent / "moves.csv")
    assert moves["deaths"].sum() == 3
    # Written beside what the run is made of: that is as it was.
    assert load_ranks(run).final


def test_many_layers_are_all_in_the_table_of_values(tmp_path):
    found = history([[2] * (MOST + 5), [1] * (MOST + 5)], [0, 5], directory=tmp_path)
    text = write_ranks(found).read_text()
    assert "5 more are in ranks.csv" in text
    assert len(pd.read_csv(tmp_path / "ranks" / "ranks.csv")) == MOST + 5


def test_the_line_that_retrains_is_that_of_the_run_without_its_ranks(run):
    words = shlex.split(retrain(load_ranks(run)))
    assert words[:3] == ["python", "-m", "experiments.train"]
    assert words[3:-2] == [OVERRIDES[0], OVERRIDES[-1]]
    assert words[-2:] == ["ranks=given", f"ranks.from={run}"]


def test_a_folder_with_odd_signs_is_quoted_for_both_readers(tmp_path):
    run = recorded(tmp_path / "a=b, c", told=TOLD)
    assert shlex.split(retrain(load_ranks(run)))[-1] == f"ranks.from='{run}'"


def test_damaged_arguments_and_a_closed_folder_are_errors(run):
    (run / "ranks").write_text("in the way")
    with pytest.raises(CannotWrite):
        write_ranks(load_ranks(run))
    (run / ".hydra" / "overrides.yaml").write_text("[ranks=uniform]")
    with pytest.raises(Corrupt, match=r"overrides.yaml has sha256"):
        retrain(load_ranks(run))
