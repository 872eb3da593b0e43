"""What a record says, a terminal shows: figures with intervals, and gaps as gaps."""

import io

import pytest
from rich.console import Console

from lowrank.report.tables import (
    cell,
    ranks_cell,
    show_comparison,
    show_preview,
    show_result,
    show_scores,
)


def metric(estimate, low=None, high=None):
    return {"estimate": estimate, "low": low, "high": high}


SCORES = {
    "metrics": {
        "accuracy": metric(0.8234, 0.8012, 0.8441),
        "macro_f1": metric(0.7),
        "worst_class_recall": metric(None),
        "log_loss": metric(0.51234, 0.4, 0.6),
    }
}
COSTS = {
    "device": "cpu x 1",
    "trained_parameters": 123456,
    "total_parameters": 22_000_000,
    "adapter_bytes": 2**21,
    "compile_seconds": 12.34,
    "step_median_seconds": 0.0456,
    "examples_per_second": None,
    "step_flops": 3.21e9,
    "step_peak_bytes": 100 * 2**20,
    "peak_resident_bytes": 3 * 2**29,
    "inference": {"merged, 1 x 16": {"median_seconds": 0.0021}},
}
RESULT = {
    "trial": "abc123",
    "data": {"name": "table/[red]mine"},
    "scores": {"validation": SCORES, "test": SCORES},
    "steps": 1200,
    "costs": COSTS,
}


def printed(show, value):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show(value, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "share", "shown"),
    [
        (metric(0.8234, 0.8012, 0.8441), True, "82.3 [80.1, 84.4]"),
        (metric(0.51234, 0.4, 0.6), False, "0.512 [0.400, 0.600]"),
        (metric(0.5), True, "50.0"),
        (metric(0.0, 0.0, 0.0), True, "0.0 [0.0, 0.0]"),
        (metric(None), True, "-"),
        (None, True, "-"),
    ],
)
def test_a_figure_stands_with_its_interval_or_as_a_dash(value, share, shown):
    assert cell(value, share) == shown


def test_a_result_shows_quality_beside_cost():
    text = printed(show_result, RESULT)
    for part in (
        "abc123", "82.3 [80.1, 84.4]", "123,456", "22,000,000", "2.00 MiB", "1,200",
        "12.3 s", "46 ms", "3.21 GF", "100 MiB", "1.50 GiB", "inference, merged",
        "2.1 ms",
    ):  # fmt: skip
        assert part in text, part
    line = next(line for line in text.splitlines() if "examples per second" in line)
    assert line.strip(" │").endswith("-")


def test_a_run_that_only_judged_has_gaps_and_no_lies():
    costs = dict.fromkeys(COSTS) | {
        name: COSTS[name]
        for name in (
            "device",
            "trained_parameters",
            "total_parameters",
            "adapter_bytes",
        )
    }
    text = printed(show_result, {**RESULT, "costs": costs})
    assert "compilation" in text
    assert "0.0 s" not in text


def test_names_are_shown_as_they_are_and_never_read_as_markup():
    assert "table/[red]mine" in printed(show_scores, RESULT)


def test_arms_stand_side_by_side():
    other = {"scores": {"test": {"metrics": {"accuracy": metric(0.5)}}}}
    text = printed(show_comparison, {"frozen probe": other, "LoRA": RESULT})
    line = next(line for line in text.splitlines() if "accuracy" in line)
    assert line.index("50.0") < line.index("82.3")
    assert "-" in next(line for line in text.splitlines() if "log loss" in line)


def test_a_preview_shows_sites_and_the_largest_step():
    site = {
        "path": "encoder/layer/attention/query/kernel", "layers": 6, "d_in": 384,
        "d_out": 384, "rank": 8, "ranks": [8] * 6, "parameters": 36864,
        "flops": 1234567.0,
    }  # fmt: skip
    shown = {
        "trial": "abc",
        "sites": [site],
        "whole": [],
        "sizes": {
            "trained_parameters": 36864,
            "total_parameters": 22_000_000,
            "adapter_bytes": 2**20,
        },
        "steps": 300,
        "batches": [[32, 16], [32, 64]],
        "step": {"flops": 2e9, "peak_bytes": 2**28},
    }
    text = printed(show_preview, shown)
    for part in (site["path"], "36,864", "1.23e+06", "nothing", "32x16, 32x64", "256"):
        assert part in text, part


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([8], "8"),
        ([8, 8, 8], "8"),
        ([4, 4, 4, 12, 12], "4 x3, 12 x2"),
        ([0, 8, 8, 2], "0, 8 x2, 2"),
    ],
)
def test_ranks_of_layers_are_told_in_their_order(ranks, text):
    assert ranks_cell(ranks) == text
