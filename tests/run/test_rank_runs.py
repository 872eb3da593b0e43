"""Ranks that move, in runs: within their budget, resumed, recorded, fed back."""

import dataclasses
import importlib
import shlex

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_run import counting_compilations, metric_rows

from experiments import ranks as ranks_door
from lowrank.allocate.fixed import Given, Uniform
from lowrank.allocate.recipes import AdaLoRA, Fisher, Norm
from lowrank.core.errors import BAD_INPUT, BadInput, NonFinite, Preempted, UnknownName
from lowrank.core.trees import fingerprint
from lowrank.data.pipeline import TrainPipeline
from lowrank.io.history import load_ranks
from lowrank.run.fit import fit
from lowrank.run.prepare import prepare, prepare_pack
from lowrank.run.ranks import final
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial
from lowrank.sharding.mesh import MeshSpec
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import AdamW

pytestmark = pytest.mark.long

OPTIM = AdamW(lr=0.01, epochs=2)
LOOP = LoopSpec(log_every=1, checkpoint_every=4)
WINDOW = {"begin": 1, "end": 11, "every": 3, "measure_every": 2}
#: As arguments, for a run of 16 steps.
ARGUMENTS = [f"ranks.{name}={value}" for name, value in WINDOW.items()]
EVENTS = [4, 7, 10, 11]


@pytest.fixture(scope="module")
def prepared(world):
    return prepare(read(world.config("data.batching.buckets=[16]", "ranks=norm")))


@pytest.fixture(scope="module")
def fitter(prepared):
    def fitted(*seeds, **more):
        batches = TrainPipeline(
            prepared.labeled.tokens["train"],
            prepared.labeled.task.splits["train"].labels,
            batching=prepared.settings.batching,
            trial_seeds=seeds,
            num_epochs=2,
        )
        rows = []
        options = {
            "optim": OPTIM,
            "validation": prepared.evaluation("validation"),
            "loop": LOOP,
            "ranks": Norm(**WINDOW),
            "log": lambda position, row: rows.append((position, list(row))),
            **more,
        }
        return fit(prepared.adapted, batches, seeds=seeds, **options), rows

    return fitted


@pytest.fixture(scope="module")
def plain(fitter):
    with counting_compilations() as compiled:
        found = fitter(0)
    return *found, compiled


def gates(fitted, trial=0):
    return {path: np.asarray(own["gate"]) for path, own in fitted.dials(trial).items()}


def same_gates(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def budget_of(prepared):
    return sum(prepared.adapted.ranks.values())


def test_a_run_ends_with_the_budget_of_the_fixed_one(prepared, plain):
    fitted, rows, _ = plain
    assert sum(gate.sum() for gate in gates(fitted).values()) == budget_of(prepared)
    assert len({gate.sum(axis=-1).max() for gate in gates(fitted).values()}) > 1
    told = {p: r[0]["train/ranks/budget"] for p, r in rows if "train/loss" in r[0]}
    budget = fitted.events.constants["budget"][0]
    assert told == {step + 1: budget[step] for step in range(16)}
    assert told[1] == 2 * budget_of(prepared)
    assert told[16] == budget_of(prepared)


def test_one_compilation_serves_the_whole_run(plain):
    _, _, compiled = plain
    assert len([name for name in compiled if "packed" in name]) == 1


def test_the_best_state_is_one_of_the_final_ranks(plain):
    fitted, rows, _ = plain
    name = "validation/accuracy"
    scored = {p: r[0][name] for p, r in rows if name in r[0] and p > 11}
    assert int(fitted.state.best_step[0]) == max(scored, key=scored.__getitem__)


def test_stopped_in_mid_schedule_it_goes_on_bit_for_bit(fitter, plain, tmp_path):
    with pytest.raises(Preempted):
        fitter(0, directory=tmp_path, loop=dataclasses.replace(LOOP, stop_after=6))
    found, _ = fitter(0, directory=tmp_path)
    assert fingerprint(found.state) == fingerprint(plain[0].state)
    same_gates(gates(found), gates(plain[0]))


@pytest.mark.parametrize(
    ("importance", "basis"),
    [
        ("norm", "own"),
        pytest.param("fisher", "own", marks=pytest.mark.slow),
        pytest.param("fisher", "singular", marks=pytest.mark.slow),
        pytest.param("activation", "own", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_choose_what_one_does(fitter, plain, importance, basis):
    ranks = Norm(**WINDOW, importance=importance, basis=basis)
    alone = plain[0] if importance == "norm" else fitter(0, ranks=ranks)[0]
    spread, _ = fitter(0, mesh=MeshSpec(data=8), ranks=ranks)
    same_gates(gates(spread), gates(alone))
    np.testing.assert_array_equal(
        spread.state.ranks["history"]["ranks"], alone.state.ranks["history"]["ranks"]
    )


@pytest.mark.slow
def test_a_pack_with_a_run_of_fixed_ranks_is_both_alone(fitter, plain):
    packed, _ = fitter(0, 0, ranks=[Norm(**WINDOW), Uniform()])
    same_gates(gates(packed), gates(plain[0]))
    fixed, _ = fitter(0, ranks=Uniform())
    assert fixed.events is None
    assert fixed.state.ranks == {}
    same_gates(gates(packed, 1), gates(fixed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [("norm", "ranks.decay=0.5"), ("random", "ranks.schedule=linear")],
)
def test_trials_of_other_ranks_and_schedules_are_each_alone(world, name, more):
    def fitted(*trials):
        base = ["data.batching.buckets=[16]", f"ranks={name}", *ARGUMENTS]
        pack = prepare_pack([read(world.config(*base, *own)) for own in trials])
        settings = [one.settings for one in pack.trials]
        found = fit(
            pack.variants.together,
            pack.batches,
            optim=[one.optim for one in settings],
            ranks=[one.ranks.moving for one in settings],
            slots=pack.slots(),
            seeds=[one.seed for one in settings],
            dials=pack.variants.dials(),
        )
        return [
            final(pack.variants.together, found.dials(trial))
            for trial in range(len(trials))
        ]

    # The first holds twice as many in a pack as it would alone.
    trials = (["delta.rank=2", "ranks.every=5"], ["delta.rank=4", "seed=1", more])
    for one, together in zip(trials, fitted(*trials), strict=True):
        (alone,) = fitted(one)
        assert together == alone
        assert len({*alone.values()}) > 1


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (Norm(**{**WINDOW, "end": 16}), "run of 16"),
        (
            Norm(**WINDOW, budget=10_000),
            "budget = 10000 components is out of reach",
        ),
        (Given(ranks={"nowhere": 1}), "given for 'nowhere'"),
        ([Norm(), Norm()], "1 trials have 2 sets of allocators"),
    ],
)
def test_what_cannot_be_is_refused_before_compiling(fitter, ranks, said):
    with counting_compilations() as compiled, pytest.raises(BadInput, match=said):
        fitter(0, ranks=ranks)
    assert not [name for name in compiled if "packed" in name]


def test_a_model_whose_examples_meet_is_refused_before_compiling(fitter, monkeypatch):
    """Only where every example's own gradient is measured."""
    module = importlib.import_module("lowrank.run.fit")
    plain = module.on_inputs

    def centred(apply, inputs, mesh):
        model = plain(apply, inputs, mesh)

        def meeting(*given, **more):
            logits = model(*given, **more)
            return logits - logits.mean(axis=-2, keepdims=True)

        return meeting

    monkeypatch.setattr(module, "on_inputs", centred)
    with (
        counting_compilations() as compiled,
        pytest.raises(BadInput, match="lets examples of a batch meet"),
    ):
        fitter(0, ranks=Fisher(**WINDOW))
    assert not [name for name in compiled if "packed" in name]


def test_programs_of_two_kinds_share_no_pack(fitter):
    with pytest.raises(BadInput, match="cannot share a program"):
        fitter(0, 1, ranks=[Norm(**WINDOW), AdaLoRA()])


def test_an_importance_that_is_no_number_ends_the_run(fitter, monkeypatch):
    broken = lambda terms: terms.c * np.nan
    monkeypatch.setattr("lowrank.train.ranks.signals.norms", broken)
    with pytest.raises(NonFinite, match="ranks of trial 0 cannot be chosen before"):
        fitter(0)


@pytest.fixture(scope="module")
def run(world):
    # So few that some layers are left with none.
    given = ["ranks=norm", *ARGUMENTS, "ranks.budget=10", "loop.log_every=1"]
    config = world.config(*given)
    result = run_trial(config, given)
    return world.runs / result["trial"], result, config


def test_a_run_records_its_ranks_over_time(run):
    directory, result, _ = run
    with np.load(directory / "ranks.npz") as stored:
        arrays = dict(stored)
    steps = arrays.pop("steps")
    rows = metric_rows(directory)
    told = {row["step"]: row for row in rows if "train/ranks/budget" in row}
    total = sum(x.reshape(len(steps), -1).sum(axis=1) for x in arrays.values())
    num_steps = result["steps"]
    assert steps[0] == 0
    assert len(steps) == 1 + len(EVENTS)
    assert [told[step + 1]["train/ranks/budget"] for step in steps] == total.tolist()
    final = yaml.safe_load((directory / "ranks.yaml").read_text())
    assert sum(final.values()) == total[-1] == told[num_steps]["train/ranks/budget"]


def test_the_adapter_holds_open_components_alone(run):
    directory, _, _ = run
    final = yaml.safe_load((directory / "ranks.yaml").read_text())
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    held = sorted(
        len(x) for name, x in tensors.items() if name.endswith("lora_A.weight")
    )
    assert held == sorted(rank for rank in final.values() if rank)
    assert 0 in final.values()
    opened = load_run(directory)
    wanted = []
    for path, dials in opened.dials.items():
        own = opened.trained[path]["a"]
        wanted += [
            np.asarray(rows)[np.asarray(gate) != 0].reshape(-1, rows[0].size)
            for rows, gate in zip(own, dials["gate"], strict=True)
            if np.asarray(gate).any()
        ]
    stored = [x for name, x in tensors.items() if name.endswith("lora_A.weight")]
    alike = lambda arrays: sorted(x.tobytes() for x in arrays)
    assert alike(stored) == alike(wanted)


def test_final_ranks_are_fed_back_at_the_same_scale(world, run):
    directory, _, _ = run
    final = yaml.safe_load((directory / "ranks.yaml").read_text())
    config = world.config("ranks=given", f"ranks.from={directory}")
    again = prepare(read(config))
    open_ = {name: rank for name, rank in final.items() if rank}
    found = {name: rank for name, rank in again.adapted.ranks.items() if rank}
    assert found == open_
    first = prepare(read(run[2]))
    assert again.adapted.ref_rank == first.adapted.ref_rank == 4
    for path in again.adapted.sites:
        assert again.adapted.max_rank(path) == max(again.adapted.layer_ranks(path))
        scales = [one.adapted.dials()[path]["scale"] for one in (again, first)]
        assert scales[0] == scales[1]
    # What a record says does not depend on the other run, and neither does its name.
    stored = dict(read(config).config)
    stored["ranks"] = {**stored["ranks"], "from": "/nowhere"}
    assert read(stored).trial_id == read(config).trial_id


def test_the_history_of_a_run_agrees_with_its_log_and_its_files(run):
    directory, result, _ = run
    found = load_ranks(directory)
    final = yaml.safe_load((directory / "ranks.yaml").read_text())
    assert found.final == final
    assert found.steps.tolist() == [0, *EVENTS]
    assert found.num_steps == result["steps"]
    rows = metric_rows(directory)
    told = [row["train/ranks/budget"] for row in rows if "train/ranks/budget" in row]
    used = found.budget
    assert np.repeat(used["used"], used["duration"]).tolist() == told
    assert found.averages["used"] == pytest.approx(np.mean(told))
    assert used["target"].tolist() == used["used"].tolist(), "met exactly"
    assert found.moves["deaths"].sum() == told[0] - told[-1]
    assert found.moves[["births", "revivals"]].sum().sum() == 0
    opened = load_run(directory)
    assert opened.ranks.final == final


def test_a_command_tells_the_ranks_and_the_line_it_gives_retrains(
    world, run, monkeypatch, capfd
):
    directory, _, config = run
    monkeypatch.setattr("sys.argv", ["ranks", f"directory={directory}"])
    ranks_door.main()
    shown = capfd.readouterr().out
    for name, rank in load_ranks(directory).final.items():
        (row,) = [line for line in shown.split("\n") if name in line]
        assert row.split("│")[3].strip() == str(rank)
    (line,) = [line for line in shown.split("\n") if "experiments.train" in line]
    again = prepare(read(world.config(*shlex.split(line)[3:])))
    assert {n: r for n, r in load_ranks(directory).final.items() if r} == {
        n: r for n, r in again.adapted.ranks.items() if r
    }
    wanted, given = (
        {k: v for k, v in read(one.config).config.items() if k not in ("ranks", "run")}
        for one in (read(config), again.settings)
    )
    assert wanted == given, "the control differs in its ranks alone"
    assert (directory / "ranks" / "ranks.md").exists()
    monkeypatch.setattr("sys.argv", ["ranks", f"directory={world.runs}"])
    with pytest.raises(SystemExit) as stop:
        ranks_door.main()
    assert stop.value.code == BAD_INPUT
    assert "not the directory of a run" in " ".join(capfd.readouterr().err.split())


def test_ranks_of_no_run_are_refused(world, tmp_path):
    for overrides, said in (
        (["ranks=given"], "needs ranks: ranks.from"),
        (["ranks=given", f"ranks.from={tmp_path}"], "cannot be read"),
        (["ranks=ramp", "+ranks.max_rank=3"], "leave it out"),
        (["ranks=norm", "delta=head"], "makes none"),
    ):
        with pytest.raises(BadInput, match=said):
            read(world.config(*overrides))
    with pytest.raises(UnknownName, match="given for 'nowhere'"):
        prepare(read(world.config("ranks=given", "ranks.ranks={nowhere: 1}")))
