"""A sweep that is halved on the way: who trains how far, kills, refusals, a real one.

Mostly with a pack that trains nothing, but logs, saves and is taken apart.
"""

import importlib
import json
import shutil

import optuna
import pytest
from fake_packs import FakePack, Killed, Seen, facts, only_sweep
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from tiny_run import predictions

from lowrank.core.errors import (
    BAD_INPUT,
    BUG,
    CORRUPT,
    NON_FINITE,
    NonFinite,
    OutOfMemory,
)
from lowrank.io.record import Record
from lowrank.io.seals import read_sealed
from lowrank.io.view import load_record
from lowrank.report.arms import records
from lowrank.run.door import name_sweep
from lowrank.run.packs import Outcome, run_pack
from lowrank.run.prepare import directory_of
from lowrank.run.settings import read
from lowrank.sweeps.ask import _tell as tell
from lowrank.sweeps.load import load_sweep
from lowrank.sweeps.report import write_report

pytestmark = pytest.mark.long

#: 18 steps, a validation every third, rungs at 3, 6 and 12: 8, 4, 2 trials, and 1.
RULE = (
    "sweep=halving",
    "sweep.halving.eta=2",
    "sweep.halving.first=3",
    "loop.evaluate_every=3",
)
GRID = ("optim.lr=0.1,0.2,0.3,0.4", "seed=1,2")
STEPS, EVERY = 18, 3


class RacePack(FakePack):
    """Trials whose accuracy grows with the step, the faster the lower their rate.

    Attributes:
      seen: (number of trials, until, whether it was gathered) of every call.
      spoiled: (rate, seed) of trials whose numbers cease to be finite.
      kill: At which of its own calls, or of the sweep's steps, to die; counted down.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.spoiled = [], set()
        self.kill: int | None = None

    def strike(self):
        if self.kill is not None:
            self.kill -= 1
            if self.kill == 0:
                raise Killed

    def __call__(self, settings, overrides, *, folder, until=None, origins=()):
        self.strike()
        self.seen.append((len(settings), until, bool(origins)))
        if len(settings) > self.widest:
            raise OutOfMemory("RESOURCE_EXHAUSTED")
        if {one.seed for one in settings} & self.bugs:
            raise ZeroDivisionError("a bug")
        ids = [one.trial_id for one in settings]
        begun = max((int(p.name) for p in folder.glob("[0-9]*")), default=0)
        for one, origin in zip(ids, origins, strict=False):
            begun = begun or origin.step
            saved = json.loads((origin.folder / f"{origin.step}/ids").read_text())
            assert list(origin.trials) == saved
            assert saved[origin.row] == one, "a state is that of its own trial"
        end = until or STEPS
        outcomes = [self.train(one, begun, end) for one in settings]
        (folder / str(end)).mkdir(parents=True, exist_ok=True)
        (folder / str(end) / "ids").write_text(json.dumps(ids))
        self.strike()
        return outcomes

    def train(self, settings, begun, end):
        directory, lr = directory_of(settings), settings.optim.lr
        identity = {**facts(settings), "config": settings.trial_id}
        with Record.open(
            directory, config=settings.config, identity=identity
        ) as record:
            path = record.path("metrics.jsonl")
            lines = path.read_text().splitlines() if path.exists() else []
            lines = [one for one in lines if json.loads(one)["step"] <= begun]
            assert [json.loads(one)["step"] for one in lines] == [
                *range(EVERY, begun + 1, EVERY)
            ], "what was logged before the rung is there"
            for step in range(begun + EVERY, end + 1, EVERY):
                row = {"step": step, "time": 1.0, "validation/accuracy": step - lr}
                lines.append(json.dumps(row))
            path.write_text("\n".join(lines) + "\n")
            if (lr, settings.seed) in self.spoiled:
                return Outcome(None, NonFinite("loss is not finite"))
            if end < STEPS:
                record.set_status("preempted", "waits")
                return Outcome(None, paused=end)
            found = {"accuracy": {"estimate": STEPS - lr}}
            result = {"scores": {"validation": {"metrics": found}}, "steps": STEPS}
            record.result(result)
        return Outcome(result)


def left(directory):
    """What a sweep has left: decisions, and what became of every trial."""
    found = {p.name: p.read_text() for p in (directory / "rungs").iterdir()}
    states = {
        one["trial"]: (one["status"], one["reason"], one["best.accuracy"])
        for one in load_sweep(directory).trials.to_dict("records")
    }
    return found, states


def test_each_rung_keeps_the_best_of_all_packs_in_narrower_ones(sweep, tmp_path):
    pack = RacePack()
    code, said = sweep(pack, "sweep.width=4", *RULE, grid=GRID)
    assert code == 0, said
    assert pack.seen == [
        (4, 3, False), (4, 3, False), (4, 6, True), (2, 12, True), (1, None, True)
    ]  # fmt: skip
    directory = only_sweep(tmp_path)
    decisions = [read_sealed(p) for p in sorted((directory / "rungs").iterdir())]
    assert [(d["step"], d["keep"], len(d["order"])) for d in decisions] == [
        (3, 4, 8), (6, 2, 4), (12, 1, 2)
    ]  # fmt: skip
    loaded = load_sweep(directory)
    states = {one["trial"]: one for one in records(loaded.trials)}
    assert sorted(one["status"] for one in states.values()) == ["cut"] * 7 + ["done"]
    for one in decisions:
        for place, (trial, value) in enumerate(one["order"][one["keep"] :]):
            reason = states[trial]["reason"]
            told = f"place {one['keep'] + place + 1} of {len(one['order'])}"
            assert f"cut at step {one['step']} by halving: {told}" in reason
            assert value == one["step"] - states[trial]["optim.lr"]
    done = [one for one in states.values() if one["status"] == "done"]
    assert [one["optim.lr"] for one in done] == [0.1]
    arms = loaded.arms()
    assert sum(arms["num_done"].tolist()) == 1, "what was cut has no mean, low or high"
    jobs = {job.cfg.optim.lr: job for _, job, _ in Seen.jobs}
    assert all(job.status is JobStatus.COMPLETED for _, job, _ in Seen.jobs)
    assert jobs[0.4].return_value is None
    assert said.count("rung at step") >= 3
    text = write_report(loaded).read_text()
    assert "## Rungs" in text
    assert "cut at step 6 by halving" in text
    seen = list(pack.seen)
    code, said = sweep(pack, *RULE, grid=GRID)
    assert (code, pack.seen) == (0, seen), "the same line has nothing to do"


#: After how many of these a life ends: a pack begins, a pack has ended, a decision is
#: sealed, a mark is made.
LIVES = (2, 5, 1, 4, 5, 5)


@pytest.mark.faults
def test_a_sweep_killed_again_and_again_ends_the_same(sweep, tmp_path, monkeypatch):
    pack, grid = RacePack(), ("optim.lr=0.1,0.2,0.3,0.4",)
    where = tmp_path / "multirun"
    code, said = sweep(pack, *RULE, "sweep.width=2", "sweep.name=whole", grid=grid)
    assert code == 0, said
    for place in ("halving.store", "runner.mark_cut"):
        module, name = place.split(".")
        real = getattr(importlib.import_module(f"lowrank.sweeps.{module}"), name)

        def struck(*given, real=real):
            real(*given)
            pack.strike()

        monkeypatch.setattr(f"lowrank.sweeps.{place}", struck)
    found = []
    for number, pack.kill in enumerate(LIVES):
        # Planned anew, the packs would have another width.
        with pytest.raises(Killed):
            sweep(pack, *RULE, f"sweep.width={2 + number % 2}", "sweep.name=killed",
                  grid=grid)  # fmt: skip
        statuses = [json.loads(p.read_text())["status"]
                    for p in (where / "killed").glob("*/status.json")]  # fmt: skip
        decisions = len(list((where / "killed").glob("rungs/*")))
        found.append((decisions, statuses.count("cut")))
    assert found == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2), (2, 3)]
    pack.kill = None
    code, said = sweep(pack, *RULE, "sweep.name=killed", grid=grid)
    assert code == 0, said
    assert left(where / "killed") == left(where / "whole")


@pytest.mark.faults
def test_a_trial_that_fails_is_last_and_one_that_did_not_come_is_waited_for(
    sweep, tmp_path
):
    pack = RacePack()
    pack.spoiled, pack.bugs = {(0.1, 1)}, {2}
    line = (*RULE, "sweep.width=1", "sweep.name=mine")
    grid = ("optim.lr=0.1,0.2", "seed=1,2")
    code, said = sweep(pack, *line, grid=grid)
    assert code == BUG
    assert "the rung at step 3 is not decided" in said
    assert not (tmp_path / "multirun/mine/rungs").exists()
    pack.bugs = set()
    code, said = sweep(pack, *line, grid=grid)
    assert code == NON_FINITE
    states = load_sweep(tmp_path / "multirun" / "mine").trials
    done = states[states["status"] == "done"]
    assert (done["optim.lr"].tolist(), done["seed"].tolist()) == ([0.1], [2])
    count = len(pack.seen)
    code, said = sweep(pack, *line, grid=grid)
    assert (code, len(pack.seen)) == (NON_FINITE, count), "its failure was decided on"
    assert "loss is not finite" in said


@pytest.mark.faults
def test_a_gathered_pack_that_is_too_wide_is_gathered_again_in_halves(sweep):
    class Shrinking(RacePack):
        """The device loses its room after the first rung."""

        def __call__(self, *given, until=None, **more):
            self.widest = 2 if until == 6 else 99
            return super().__call__(*given, until=until, **more)

    pack = Shrinking()
    code, said = sweep(pack, *RULE, grid=GRID)
    assert code == 0, said
    later = [one for one in pack.seen if one[1] == 6]
    assert later == [(4, 6, True), (2, 6, True), (2, 6, True)]


@pytest.mark.faults
def test_without_its_sources_a_pack_trains_from_the_start(sweep, tmp_path):
    pack = RacePack()
    pack.kill = 4
    grid = ("optim.lr=0.1,0.2,0.3,0.4",)
    with pytest.raises(Killed):
        sweep(pack, *RULE, grid=grid)
    for folder in only_sweep(tmp_path).glob("packs/*/[0-9]*"):
        shutil.rmtree(folder)
    pack.kill = None
    code, said = sweep(pack, *RULE, grid=grid)
    assert code == 0, said
    assert "no pack has a checkpoint of all its trials" in said


@pytest.mark.slow
def test_another_rule_is_refused_and_none_trains_all_to_the_end(sweep, tmp_path):
    pack, grid = RacePack(), ("optim.lr=0.1,0.2,0.3,0.4",)
    sweep(pack, *RULE, "sweep.name=mine", grid=grid)
    code, said = sweep(pack, *RULE, "sweep.halving.eta=4", "sweep.name=mine", grid=grid)
    assert code == CORRUPT
    assert "another rule or with other trials" in said
    code, said = sweep(pack, "loop.evaluate_every=3", "sweep.name=mine", grid=grid)
    assert code == 0, said
    assert pack.seen[-1] == (3, None, False)
    states = load_sweep(tmp_path / "multirun" / "mine").trials
    assert states["status"].tolist() == ["done"] * 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sweep.halving.eta=1"], "sweep.halving: sweep.halving.eta must be"),
        (["sweep.halving.metric=luck"], "sweep.halving.metric = 'luck' is not"),
        (["sweep.halving.min_steps=18"], "cuts nobody"),
        (["non_finite.action=rollback"], "non_finite.action=rollback"),
        (["hydra/launcher=basic"], "-m hydra/launcher=packed"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(sweep, arguments, told):
    pack = RacePack()
    code, said = sweep(pack, *RULE, *arguments, grid=("optim.lr=0.1,0.2",))
    assert code == BAD_INPUT, said
    assert told in said
    assert pack.seen == []


def test_a_dry_run_shows_the_rungs(sweep, tmp_path):
    code, said = sweep(
        RacePack(), *RULE, "sweep.dry_run=true", "data.batching.buckets=[16]",
        grid=("optim.lr=0.1,0.2,0.3,0.4",),
    )  # fmt: skip
    assert code == 0, said
    assert "4 trials, 2 from step 3, 1 from step 6 of 16, by accuracy" in said
    assert not list(tmp_path.rglob("rungs"))


def test_halving_is_part_of_a_sweeps_name():
    def name(*arguments):
        name_sweep(["-m", "seed=1,2", *arguments])
        return OmegaConf.create({"name": "${sweep_name:null}"}).name

    assert name() == name("sweep=default") == name("sweep.width=2")
    assert name("sweep=halving") not in (name(), name(*RULE[:2]))
    assert name("sweep=halving") == name("sweep=halving", "sweep.width=2")


@pytest.mark.slow
def test_four_trials_halved_for_real(sweep, world, tmp_path):
    """The one that goes on leaves what it leaves alone, as in `test_packs`."""
    small = (
        "delta.rank=4", "optim.epochs=1", "data.batching.buckets=[16]",
        "loop.evaluate_every=4", "sweep=halving", "sweep.halving.eta=4",
        "sweep.width=2",
    )  # fmt: skip
    grid = ("optim.lr=1e-5,0.02", "seed=1,2")
    code, said = sweep(run_pack, *small, grid=grid)
    assert code == 0, said
    trials = records(load_sweep(only_sweep(tmp_path)).trials)
    assert sorted(one["status"] for one in trials) == ["cut", "cut", "cut", "done"]
    (kept,) = (one for one in trials if one["status"] == "done")
    assert kept["optim.lr"] == 0.02
    record = load_record(only_sweep(tmp_path) / kept["directory"])
    config = {**record.config, "run": {**record.config["run"], "directory": "alone"}}
    (alone,) = run_pack([read({**config, "sweep": None})])
    assert record.result is not None
    assert alone.result is not None
    for name in ("steps", "best_step", "skipped_steps"):
        assert record.result[name] == alone.result[name]
    for split in ("validation", "test"):
        both = [predictions(path, split)["logits"] for path in
                (record.directory, tmp_path / "alone")]  # fmt: skip
        assert abs(both[0] - both[1]).max() < 1e-3


def test_a_study_is_told_of_a_cut_trial_as_pruned():
    """No value: what it had at its rung is not what others had at the end."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "x": optuna.distributions.FloatDistribution(0, 1)
    }
    numbers = [study.ask(space).number for _ in range(2)]
    for number, value in zip(numbers, (None, 0.5), strict=True):
        job = JobReturn(status=JobStatus.COMPLETED)
        job.return_value = value
        tell(study, number, job, halving=True)
    assert [one.state.name for one in study.trials] == ["PRUNED", "COMPLETE"]
