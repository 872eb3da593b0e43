"""The protocol on real text: equal budgets, its own splits, and tables in points."""

import dataclasses

import numpy as np
import pytest
from tiny_run import SMALL

from experiments.ranks_protocol import real, report, study, tasks, verdicts
from experiments.ranks_protocol.arms import ARMS, Place
from experiments.ranks_protocol.real import Real
from experiments.ranks_protocol.settings import read
from lowrank.core.errors import BadInput, UnknownName

pytestmark = pytest.mark.long

WANTED = {
    "oracle": 0.05, "gain": -1.5, "misallocation": 0.02, "no_gain": 0.0,
    "equivalence": 0.02, "points": 0.01,
}  # fmt: skip
PART = {
    "tasks": ["words"], "ranks": [2], "arms": ["uniform", "fisher", "retrain"],
    "rates": [0.005, 0.02], "seeds": 2, "tuning_seeds": 1, "steps": 14, "batch_size": 8,
    "every": 2, "test_rows": 1000,
}  # fmt: skip


def protocol(folder, **more):
    fields = {
        "tasks": ["homogeneous"], "arms": ["uniform"], "rates": [0.01], "seeds": 2,
        "tuning_seeds": 1, "bases": 1, "steps": 14, "batch_size": 64, "rows": 128,
        "noise": 0.1, "test_rows": 64, "begin": 1, "end": 11, "every": 5,
        "wanted": WANTED, "level": 0.95, "records": str(folder / "records"),
        "results": str(folder / "results"), "real": PART,
    }  # fmt: skip
    return read({**fields, **more})


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    """A whole study with a text of one's own among its sources."""
    settings = protocol(tmp_path_factory.mktemp("text"))
    own = (*SMALL, *world.overrides())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "SOURCES", {"words": own})
        ticks = []
        done = study.run(settings, lambda text, steps: ticks.append(steps))
        assert sum(ticks) == study.work(settings)
        results = report.results(done, settings)
    return settings, done, results


def test_text_has_events_of_its_own(tmp_path):
    teachers, text = protocol(tmp_path).parts
    assert (teachers.every, text.every) == (5, 2)
    place = Place(None, 8, "components", None, None, 0)
    chosen = [ARMS["fisher"].allocator(place, part) for part in (teachers, text)]
    assert [one.every for one in chosen] == [5, 2]
    # What is measured has to be measured between any two of them.
    assert [one.measure_every for one in chosen] == [5, 2]


@pytest.mark.slow
def test_every_arm_ends_with_the_budget_of_the_name(found):
    _, done, _ = found
    assert [*done] == ["homogeneous", "words@2"]
    for rank in PART["ranks"]:
        judged = done[f"words@{rank}"]["judged"]
        assert [*judged] == PART["arms"]
        (layers,) = {len(one["ranks"]) for own in judged.values() for one in own}
        for own in judged.values():
            for one in own:
                assert one["truth"] is None
                assert sum(one["ranks"].values()) == rank * layers
                assert 0 <= one["error"] <= 1
        for moved, again in zip(judged["fisher"], judged["retrain"], strict=True):
            assert moved["ranks"] == again["ranks"]


def test_rates_are_chosen_by_validation_and_arms_judged_by_test(
    found, world, monkeypatch
):
    settings, _, _ = found
    asked = []
    own = (*SMALL, *world.overrides())
    monkeypatch.setattr(real, "SOURCES", {"words": own})
    monkeypatch.setattr(real, "score_trials", lambda *given, **more: [])
    monkeypatch.setattr(real, "sample", lambda own, *given: asked.append(given) or [])
    task, part = Real("words", 2), settings.parts[1]
    for seeds in (part.tuned, part.judged):
        task.errors(None, seeds, part)
    assert asked == [("validation", 1000), ("test", 1000)]


@pytest.mark.parametrize("count", [5, 1000])
def test_a_sample_is_drawn_without_order_and_alike_for_all(
    found, world, monkeypatch, count
):
    own = (*SMALL, *world.overrides())
    monkeypatch.setattr(real, "SOURCES", {"words": own})
    prepared = real._prepared(Real("words", 2).arguments).labeled
    tokens = prepared.tokens["test"]
    labels = prepared.task.splits["test"].labels
    whole = {(tuple(tokens.row(n)), int(labels[n])) for n in range(len(tokens))}
    seen = []
    for batch in real.sample(prepared, "test", count):
        for row, index in enumerate(batch["index"]):
            if index >= 0:
                ids = batch["ids"][row][batch["mask"][row] > 0]
                seen.append((index, tuple(ids), int(batch["label"][row])))
    numbers = sorted(index for index, _, _ in seen)
    assert numbers == [*range(min(count, len(tokens)))]
    assert {(ids, label) for _, ids, label in seen} <= whole
    if count < len(tokens):
        # Not the first ones, which may be of one class.
        first = {tuple(tokens.row(n)) for n in range(count)}
        assert {ids for _, ids, _ in seen} != first
    again = real.sample(prepared, "test", count)
    for one, other in zip(again, real.sample(prepared, "test", count), strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_the_error_is_the_share_of_wrong_labels(found):
    _, done, told = found
    rows = {row["arm"]: row for row in told["tasks"]["words@2"]["rows"]}
    judged = done["words@2"]["judged"]
    for arm, row in rows.items():
        each = [one["error"] for one in judged[arm]]
        assert row["error"] == pytest.approx(np.mean(each))
        if arm != "uniform":
            base = [one["error"] for one in judged["uniform"]]
            assert row["ratio"]["difference"]["estimate"] == pytest.approx(
                np.mean(np.subtract(each, base)), abs=1e-12
            )
            assert row["ratio"]["margin"] == 0.01


@pytest.mark.slow
def test_the_tables_are_in_points(found):
    settings, _, told = found
    text = report.markdown(told)
    assert "## words@2" in text
    assert "share of test rows with a wrong label" in text
    assert f"{settings.real.steps} steps of 8 rows" in text
    wrong = told["tasks"]["words@2"]["rows"][0]["error"]
    assert f"| {100 * wrong:.2f} % |" in text


def test_no_errors_at_all_can_be_compared():
    of = lambda *errors: [
        {"seed": seed, "error": error} for seed, error in enumerate(errors)
    ]
    assert verdicts.errors(of(0.0, 0.5), in_points=True) == {0: 0.0, 1: 0.5}
    with pytest.raises(ValueError, match=r"math domain|expected a positive"):
        verdicts.errors(of(0.0, 0.5))
    records = [
        {"rate": rate, "error": error, "arm": "norm", "seed": 1000}
        for rate, error in ((0.1, 0.2), (0.2, 0.0), (0.3, 0.0))
    ]
    assert study.best_rate(records, [0.1, 0.2, 0.3], in_points=True) == 0.2


@pytest.mark.parametrize(
    "name", ["words@2", "intents@", "intents@0", "intents@x", "@4"]
)
def test_a_name_that_is_no_task_is_refused(name):
    with pytest.raises(UnknownName, match="which is none"):
        tasks.find(name)


def test_names_say_source_and_budget():
    task = tasks.find("banking77@8")
    assert (task.name, task.rank, task.source) == ("banking77@8", 8, "banking77")
    assert "delta.rank=8" in task.arguments
    assert "ranks.max_rank=16" in task.arguments


def test_a_part_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(BadInput, match="group of fields"):
        protocol(tmp_path, real="intents")
    with pytest.raises(UnknownName, match="stepz"):
        protocol(tmp_path, real={**PART, "stepz": 3})
    part = protocol(tmp_path, real={**PART, "arms": ["fisher"]}).parts[1]
    with pytest.raises(BadInput, match="every arm is compared"):
        study.check(dataclasses.replace(part, tasks=["homogeneous"]))
