"""A study tunes apart from where it judges, ends as if never stopped, and says so."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from small import protocol

from experiments.ranks_protocol import arms, report, study, tasks, training
from experiments.ranks_protocol.arms import ARMS, Place
from experiments.ranks_protocol.measures import budgets, trajectory
from experiments.ranks_protocol.real import SOURCES
from experiments.ranks_protocol.settings import read
from experiments.ranks_protocol.tasks import TASKS
from lowrank.allocate.adaptive import Adaptive
from lowrank.allocate.fixed import Given, Uniform
from lowrank.core.errors import BadInput, NonFinite, UnknownName
from lowrank.run.door import CONF, resolve

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))
TASK = TASKS["heterogeneous"]


def files(settings):
    """The records of all trials."""
    return sorted(Path(settings.records).rglob("*-seed*.json"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return protocol(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def found(settings):
    seen = []
    done = study.run(settings, lambda text, steps: seen.append(steps))
    assert sum(seen) == study.work(settings)
    return done


def test_every_arm_ends_with_the_same_budget(found, settings):
    judged = found["heterogeneous"]["judged"]
    assert [*judged] == settings.arms
    for arm, records in judged.items():
        assert [one["seed"] for one in records] == settings.judged, arm
        for one in records:
            assert sum(one["ranks"].values()) == 16
            assert one["budgets"]["final_components"] == 16
            assert math.isfinite(one["error"])
    assert all(one["misallocation"] == 0 for one in judged["oracle"])
    assert all(one["misallocation"] == 0.5 for one in judged["uniform"])
    for one in judged["norm"]:
        assert 16 < one["budgets"]["average_components"] < 64
        assert one["budgets"]["open_flops"] < one["budgets"]["held_flops"]


def test_the_same_command_trains_nothing_again(found, settings, monkeypatch):
    monkeypatch.setattr(study, "train", None)
    assert study.run(settings) == found


def test_a_study_that_was_stopped_ends_as_if_it_was_not(found, settings):
    before = {file: file.read_bytes() for file in files(settings)}
    lost, torn = files(settings)[0], files(settings)[-1]
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:20])
    again = study.run(settings)
    timeless = lambda done: {
        task: {name: value for name, value in own.items() if name != "seconds"}
        for task, own in done.items()
    }
    assert timeless(again) == timeless(found)
    assert {file: file.read_bytes() for file in files(settings)} == before
    assert again["heterogeneous"]["seconds"] > 0


def test_a_study_tells_how_long_it_took_whenever_that_was(found, settings):
    seconds = [
        json.loads(file.read_text())["seconds"]
        for file in Path(settings.records).rglob(study.SECONDS)
    ]
    again = study.run(settings)
    assert again["heterogeneous"]["seconds"] == pytest.approx(sum(seconds))
    told = report.results({**again, "decaying": again["heterogeneous"]}, settings)
    assert told["seconds"] == pytest.approx(2 * sum(seconds))
    slow = {**told, "seconds": 5400.0, "processors": 2}
    assert "took 90 minutes on 2 processors" in report.markdown(slow)


def test_another_protocol_takes_no_record_of_this_one(found, settings, monkeypatch):
    other = dataclasses.replace(settings, steps=settings.steps + 1)

    def told(*given):
        raise RuntimeError("trains")

    monkeypatch.setattr(study, "train", told)
    with pytest.raises(RuntimeError, match="trains"):
        study.run(other)


def test_results_are_written_whole(found, settings):
    told = report.results(found, settings)
    json_file, text = report.write(told, settings.results)
    assert json.loads(json_file.read_text())["protocol"]["seeds"] == 2
    assert text.read_text() == report.markdown(told)


def trials_of(settings, *names, rates=(0.01,), seeds=(2000,)):
    every = {name: list(rates) for name in names}
    return study._trials(TASK, every, seeds, settings, {}, {})


def test_rates_are_tuned_on_seeds_that_nothing_is_judged_on(tmp_path, monkeypatch):
    settings = protocol(tmp_path, rates=[0.003, 0.01], tuning_seeds=2)
    assert not {*settings.tuned} & {*settings.judged}
    seen = []

    def fake(task, pack, protocol, tick):
        seen.extend(pack)
        # On judged seeds the other rate is the better one.
        good = lambda t: (t.rate == 0.003) == (t.seed in settings.tuned)
        return [
            {
                **training._base(task, trial),
                "error": 1.0 if good(trial) else 2.0,
                "ranks": {},
            }
            for trial in pack
        ]

    monkeypatch.setattr(study, "train", fake)
    found = study.run(settings)["heterogeneous"]
    assert found["rates"] == dict.fromkeys(settings.arms, 0.003)
    tuned = {(t.arm, t.seed, t.rate) for t in seen if t.seed in settings.tuned}
    assert tuned == {
        (arm, seed, rate)
        for arm in settings.arms
        for seed in settings.tuned
        for rate in settings.rates
    }, "every arm has the same trials"
    judged = [t for t in seen if t.seed in settings.judged]
    assert {t.rate for t in judged} == {0.003}
    assert len(judged) == len(settings.arms) * settings.seeds


def test_the_best_rate_has_the_least_mean_log_error_and_no_failure():
    one = lambda rate, error, seed=1000: {
        "arm": "norm", "rate": rate, "error": error, "seed": seed
    }  # fmt: skip
    assert study.best_rate([one(0.1, 1.0), one(0.2, 0.5)], [0.1, 0.2]) == 0.2
    # Means of errors themselves would say 0.2.
    rows = [one(0.1, 1e-4), one(0.1, 1.0), one(0.2, 0.4), one(0.2, 0.4)]
    assert study.best_rate(rows, [0.1, 0.2]) == 0.1
    rows = [one(0.1, 1e-9), one(0.1, None), one(0.2, 0.4), one(0.2, 0.4)]
    assert study.best_rate(rows, [0.1, 0.2]) == 0.2
    with pytest.raises(NonFinite, match="smaller rates"):
        study.best_rate([one(0.1, None)], [0.1])
    assert not study.able([{**one(0.1, None), "arm": "shuffled"}])
    assert study.able([one(0.1, None)])
    # A seed that failed at every rate says nothing about rates.
    rows = [one(0.1, 1.0), one(0.2, 0.5), one(0.1, None, 1001), one(0.2, None, 1001)]
    assert study.best_rate(rows, [0.1, 0.2]) == 0.2


def test_packs_share_program_and_base(tmp_path):
    settings = protocol(
        tmp_path, arms=[*ARMS], bases=2, steps=60, end=40, every=5, seeds=3
    )
    free = [name for name, arm in ARMS.items() if not arm.needs]
    trials = trials_of(settings, *free, seeds=settings.judged)
    made = list(study.packs(TASK, trials, settings))
    assert sorted(map(id, trials)) == sorted(id(t) for pack in made for t in pack)
    for pack in made:
        assert len({t.seed % 2 for t in pack}) == 1
        assert len({arms.program(t.allocator) for t in pack}) == 1
    assert len(made) == 2 * 8, "fixed ranks, and seven importances, on two bases"
    apart = dataclasses.replace(TASK, apart=True)
    alone = list(study.packs(apart, trials, settings))
    assert len(alone) == 2 * len(free)
    assert all(len({trial.arm for trial in pack}) == 1 for pack in alone)


def test_the_seeds_of_arms_share_data_and_order(settings):
    batches = TASK.batches([2000, 2001, 2000], settings)
    for step in range(5):
        batch = batches.batch_at(step)
        np.testing.assert_array_equal(batch["x"][0], batch["x"][2])
        assert not np.allclose(batch["x"][0], batch["x"][1])


def test_who_takes_the_ranks_of_others_gets_those_of_its_seed(settings):
    ranks = {seed: {"layer0/kernel": seed - 1999} for seed in settings.judged}
    records = {
        "fisher": [
            {"arm": "fisher", "seed": seed, "rate": rate, "ranks": own}
            for seed, own in ranks.items()
            for rate in (0.1, 0.2)
        ]
    }
    made = study._trials(
        TASK, {"retrain": [0.5]}, settings.judged, settings, records, {"fisher": 0.2}
    )
    assert [trial.allocator for trial in made] == [
        Given(ranks=own) for own in ranks.values()
    ]


def test_a_seed_whose_ranks_failed_is_left_out_and_named(settings, tmp_path):
    """The other seeds of the arm that takes them are trained and told."""
    lost = {"arm": "fisher", "seed": 2000, "rate": 0.2, "ranks": None}
    kept = {**lost, "seed": 2001, "ranks": {"layer0/kernel": 1}}
    made = study._trials(
        TASK, {"retrain": [0.5]}, [2000, 2001], settings, {"fisher": [lost, kept]},
        {"fisher": 0.2},
    )  # fmt: skip
    assert [trial.allocator for trial in made] == [None, Given(ranks=kept["ranks"])]
    found = study._trained(
        TASK, made[:1], settings, tmp_path, lambda text, steps: None, [], ""
    )
    (one,) = found["retrain"]
    assert one["error"] is None
    assert "fisher, whose ranks it takes, failed" in one["failed"]


def test_records_of_other_code_are_not_taken(settings, tmp_path, monkeypatch):
    trained = []

    def train(task, pack, protocol, tick):
        trained.append(len(pack))
        return [training.failed(task, trial, "not here") for trial in pack]

    monkeypatch.setattr(study, "train", train)
    allocator = ARMS["uniform"].allocator(
        Place(training.slots_for(TASK.model(2000, settings)), 16, "components", None,
        None, 2000), settings,
    )  # fmt: skip
    pack = [training.Trial("uniform", 2000, 0.01, allocator)]
    again = lambda: study._stored(TASK, pack, settings, tmp_path, lambda steps: None)
    assert again() == again()
    assert trained == [1]
    monkeypatch.setattr(study, "code", lambda: "other")
    again()
    assert trained == [1, 1]


def test_equal_ranks_have_no_shuffle_and_the_seed_is_left_out(settings, tmp_path):
    slots = training.slots_for(TASK.model(2000, settings))
    equal = slots.named(slots.ranks)
    place = Place(slots, 16, "components", None, equal, 2000)
    allocator = ARMS["shuffled"].allocator(place, settings)
    trial = training.Trial("shuffled", 2000, 0.01, allocator)
    found = study._trained(
        TASK, [trial], settings, tmp_path, lambda text, steps: None, [], ""
    )
    (one,) = found["shuffled"]
    assert one["error"] is None
    assert "no shuffle" in one["failed"]


def test_average_has_the_time_average_of_the_pruned_arms(settings):
    slots = training.slots_for(TASK.model(2000, settings))
    place = Place(slots, 16, "components", None, None, 2000)
    own = ARMS["average"].allocator(place, settings)
    pruned = ARMS["norm"].allocator(place, settings)
    assert isinstance(pruned, Adaptive)
    assert isinstance(own, Uniform)
    table = pruned.on(slots, settings.steps).constants["budget"][: settings.steps]
    assert own.budget == math.ceil(table.mean())
    assert own.budget is not None
    assert own.budget > 16


def test_flops_and_parameters_by_hand(settings):
    adapted = TASK.model(2000, settings)
    ranks = np.array([[2] * 8, [1] * 8])
    found = budgets(ranks, adapted, Uniform(), 64)
    assert found.final_components == 8
    assert found.final_parameters == 8 * (32 + 32)
    assert found.average_components == 12
    # Base: forward and the gradient of activations. Pairs: forward and twice back.
    base = 2 * 2 * 8 * 2 * 32 * 32
    pairs = 3 * (16 + 8) * 2 * (32 + 32)
    assert found.open_flops == 64 * (base + pairs) == found.held_flops
    found = budgets(ranks, adapted, Adaptive(importance="fisher"), 64)
    held = 3 * 2 * 64 * 2 * 64
    assert found.held_flops == 64 * (base + held)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tasks": ["heterogenous"]}, UnknownName, "Nearest.*heterogeneous"),
        ({"arms": ["uniform", "fischer"]}, UnknownName, "Nearest.*fisher"),
        ({"arms": ["uniform", "retrain"]}, BadInput, "add 'fisher' to arms"),
        ({"arms": ["norm"]}, BadInput, "add it to arms"),
        ({"end": 14}, BadInput, "ranks.end"),
        ({"rates": []}, BadInput, "rates"),
        ({"rates": [0.1, 0.1]}, BadInput, "twice"),
        ({"seeds": 0}, BadInput, "seeds must be at least 1"),
        ({"tuning_seeds": 1001}, BadInput, "judged where they are tuned"),
        ({"first_seed": 1999}, BadInput, "give 2000 or more"),
        ({"noise": 0.0}, BadInput, "without noise"),
        ({"batch_size": 48}, BadInput, "does not divide"),
        ({"wanted": {"equivalence": 0.0}}, BadInput, r"wanted\.equivalence = 0\.0"),
        ({"wanted": {"points": -1.0}}, BadInput, r"wanted\.points = -1\.0 is a margin"),
        ({"stepz": 3}, UnknownName, "Nearest.*steps"),
    ],
)
def test_bad_input_is_found_before_any_work(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        study.run(protocol(tmp_path, **change))
    assert not (tmp_path / "records").exists()


def test_an_unknown_size_is_an_error_that_names_the_others(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ranks_protocol", "size=huge"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert all(size in done.stderr for size in SIZES)


#: They are to end in an hour and a half.
BRIEF = ("standard", "claims")


@pytest.mark.parametrize("size", SIZES)
def test_every_size_composes_and_all_its_arms_are_possible(size):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve(compose("ranks_protocol", overrides=[f"size={size}"]))
    settings = read(config)
    assert {*settings.tasks} <= {*TASKS}
    # These make no claim of their own.
    left_out = {"ramp", "activation"} if size in BRIEF else set()
    assert {*settings.arms} == {*ARMS} - left_out
    if size in ("standard", "full"):
        assert {*settings.real.tasks} == {*SOURCES}
    if size != "smoke":
        assert settings.seeds >= 8
        assert settings.steps >= 1000
    # All of them at full size takes minutes; two seeds on one base are enough, and of
    # real text what is possible does not depend on the size.
    few = {"seeds": 2, "tuning_seeds": 1, "bases": 1, "real": None}
    study.check(dataclasses.replace(settings, **few))
    for part in settings.parts:
        arms.check(part)
        assert tasks.chosen(part.tasks)


def test_a_trajectory_counts_every_step(settings):
    trial = trials_of(settings, "norm")[0]
    slots = training.slots_for(TASK.model(2000, settings))
    table = trial.allocator.on(slots, settings.steps).constants["budget"]
    kept = []

    def spy(fitted, number, slots, steps):
        kept.append(trajectory(fitted, number, slots, steps))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.measures, "trajectory", spy)
        training.train(TASK, [trial], settings)
    (ranks,) = kept
    np.testing.assert_array_equal(ranks.sum(axis=1), table[: settings.steps])


@pytest.mark.slow
def test_the_smoke_command_runs_to_its_end(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.ranks_protocol", "size=smoke",
            f"records={tmp_path / 'records'}", f"results={tmp_path / 'results'}",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results.md").read_text()
    for arm in ARMS:
        assert f"\n| {arm} |" in text
