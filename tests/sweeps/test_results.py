"""Files, tables and reports of a sweep say what its records say."""

import io
import json
import re
import time

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from lowrank.core.errors import BadInput, CannotWrite, UnknownName
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.sweeps.load import load_sweep
from lowrank.sweeps.report import (
    compare,
    differences_section,
    head,
    report_sweep,
    write_report,
)
from lowrank.sweeps.results import send_summary, show_results, storable, write_results
from lowrank.track.trackers import Track

BEST = "delta.rank=8 optim.lr=0.001 optim.weight_decay=0"


def test_both_files_give_back_every_trial_and_digit(sweep):
    written = write_results(sweep)
    csv = pd.read_csv(sweep.directory / "results.csv", dtype={"trial": str})
    parquet = pd.read_parquet(sweep.directory / "results.parquet")
    for found in (csv, parquet):
        assert len(found) == len(sweep.trials) == 15
        assert list(found.columns) == list(sweep.trials.columns)
        both = found.merge(sweep.trials, on="trial", suffixes=("", " loaded"))
        assert len(both) == 15
        for name in ("best.accuracy", "optim.lr", "costs.step_flops"):
            np.testing.assert_array_equal(both[name], both[f"{name} loaded"])
    first = written.head(3)
    assert (first["delta.rank"] == 8).all()
    assert first["seed"].tolist() == [0, 1, 2]
    # Reading again, with the results among the trials, finds the same.
    assert len(load_sweep(sweep.directory).trials) == 15


def test_results_are_whole_or_as_they_were(sweep, monkeypatch):
    write_results(sweep)
    before = (sweep.directory / "results.csv").read_bytes()

    def refuse(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(CannotWrite, match=r"results\.csv.*No space"):
        write_results(load_sweep(sweep.directory))
    assert (sweep.directory / "results.csv").read_bytes() == before
    assert not list(sweep.directory.glob(".*.tmp"))


def test_mixed_columns_become_text_and_gaps_stay_gaps():
    frame = storable(
        pd.DataFrame({"a": [1, "x", None], "b": [None] * 3, "c": [1, 2, 3]})
    )
    assert frame["a"].tolist()[:2] == ["1", "x"]
    assert frame["a"].isna().tolist() == [False, False, True]
    assert frame["c"].tolist() == [1, 2, 3]
    frame.to_parquet(io.BytesIO())


def test_a_terminal_shows_ranked_arms_and_what_is_not_done(sweep):
    console = Console(file=io.StringIO(), width=140, color_system=None)
    show_results(sweep, console, most=2)
    text = console.file.getvalue()
    assert "15 trials: 14 done, 1 failed" in text
    mean = sweep.arms()["mean"][0]
    line = next(line for line in text.splitlines() if f"{mean:.4f}" in line)
    assert [cell.strip() for cell in line.split("│")][1:6] == [
        "1",
        "8",
        "0.001",
        "0",
        "3/3",
    ]
    assert "and 3 arms that came after" in text
    assert "NonFinite: the loss is nan at step 30" in text


def test_a_report_tells_arms_differences_figures_and_failures(sweep):
    path = write_report(sweep, margin=0.01)
    text = path.read_text()
    for image in re.findall(r"\]\((\S+\.png)\)", text):
        assert (sweep.directory / image).stat().st_size > 5000
        assert (sweep.directory / image).with_suffix(".svg").exists()
    assert len(re.findall(r"\]\((\S+\.png)\)", text)) == 5
    mean = sweep.arms()["mean"][0]
    assert f"| 8 | 0.001 | 0 | 3 of 3 | {mean:.4f} |" in text
    assert f"To `{BEST}`, paired over seeds. It was picked as the best" in text
    assert "within 0.01 either way" in text
    assert "NonFinite: the loss is nan at step 30" in text
    told = {one.arm: one for one in compare(sweep, margin=0.01)}
    table = pd.read_csv(sweep.directory / "differences.csv")
    assert dict(zip(table["arm"], table["verdict"], strict=True)) == {
        arm: one.verdict for arm, one in told.items()
    }
    for arm, one in told.items():
        assert (
            f"| `{arm}` | {one.difference.num_groups} | {one.difference.estimate:+.4f}"
            in text
        )
    # The arm of the diverged trial is compared over the seeds that it has.
    short = told["delta.rank=8 optim.lr=0.004 optim.weight_decay=0"]
    assert (short.difference.num_groups, short.unpaired) == (2, (2,))


def test_a_named_baseline_is_said_to_be_no_pick_and_has_to_exist(sweep):
    named = differences_section(compare(sweep, baseline=BEST), picked=False)
    assert f"To `{BEST}`, paired over seeds." in named
    assert "picked as the best" not in named
    assert "No margin was stated" in named
    with pytest.raises(UnknownName, match=r"'rank=8'.*delta\.rank=8"):
        compare(sweep, baseline="rank=8")


def test_a_report_says_where_one_code_was_to_be_expected(directory):
    for number, folder in enumerate(sorted(directory.iterdir())):
        status = read_sealed(folder / "status.json")
        status["identity"] |= {"code": f"c{number % 2}", "base": "b"}
        write_sealed(folder / "status.json", status)
    text = head(load_sweep(directory), "accuracy")
    assert "**2 fingerprints of code**" in text
    assert "fingerprints of base" not in text


def test_a_command_reports_and_refuses_what_it_does_not_know(sweep, capsys):
    config = {"directory": str(sweep.directory), "track": {"wandb": "disabled"}}
    report_sweep(config | {"by": "log_loss", "margin": 0.02})
    assert "Arms by validation log_loss, lowest first" in capsys.readouterr().out
    assert (sweep.directory / "results.parquet").exists()
    assert "within 0.02" in (sweep.directory / "report.md").read_text()
    for change, words in (
        ({"margins": 1}, "margins.*margin"),
        ({"level": "x"}, "level"),
    ):
        with pytest.raises(BadInput, match=words):
            report_sweep(config | change)


def test_a_summary_run_holds_the_tables_in_the_group_of_the_sweep(sweep):
    send_summary(sweep, Track(wandb="offline", group="first"), "first")
    send_summary(sweep, Track(wandb="offline", group="first"), "first")
    folder = sweep.directory / "wandb"
    (run,) = folder.glob("offline-run-*-first-summary")
    tables = [json.loads(f.read_text()) for f in run.glob("files/media/table/*.json")]
    assert sorted(len(table["data"]) for table in tables) == [5, 15]
    trials = max(tables, key=lambda table: len(table["data"]))
    at = {name: trials["columns"].index(name) for name in ("trial", "best.accuracy")}
    found = {row[at["trial"]]: row[at["best.accuracy"]] for row in trials["data"]}
    done = sweep.trials.set_index("trial")["best.accuracy"]
    assert found == done.to_dict()
    # W&B's own process writes the last of it after `finish` has returned.
    file, deadline = run / "run-first-summary.wandb", time.monotonic() + 60
    while b"summary" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    data = file.read_bytes()
    assert b"summary" in data
    assert b"first" in data
    assert len([*folder.glob("superseded-*")]) == 1
    # Nothing of it is taken for a trial.
    assert len(load_sweep(sweep.directory).trials) == 15
