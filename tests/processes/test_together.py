"""Two processes with four devices each do what one with eight does."""

import json
import re

import numpy as np
import pytest
from lives import LONG, Fault
from safetensors.numpy import load_file
from tiny_language import talking_run
from tiny_run import metric_rows, position

pytestmark = pytest.mark.long

MESHES = {
    "data 8": ("mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1"),
    "fsdp 2 x tensor 4": ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"),
    "data 2 x fsdp 2 x tensor 2": (),
}


def result(directory):
    return json.loads((directory / "result.json").read_text())


def close_runs(one, other):
    """Asserts that two runs are one, but for the order of sums."""
    for left, right in zip(metric_rows(one), metric_rows(other), strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    ours, theirs = (load_file(d / "trained.safetensors") for d in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=2e-3, atol=2e-5)
    assert result(one)["steps"] == result(other)["steps"]
    assert result(one)["best_step"] == result(other)["best_step"]


def both_ways(crew, tmp_path, *overrides):
    """The directories of a run on one process and on two."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert crew.alone(alone, *overrides) == 0, crew.said(0)
    assert crew.run(2, both, *overrides) == [0, 0], crew.all_said()
    close_runs(alone, both)
    return alone, both


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_do_what_one_does(crew, tmp_path, mesh):
    alone, both = both_ways(crew, tmp_path, *MESHES[mesh])
    environment = json.loads((both / "environment.json").read_text())
    assert environment["num_processes"] == 2
    names = lambda folder: sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if "checkpoints" not in str(p)
    )
    assert names(alone) == names(both)


def test_a_language_model_speaks_and_forgets_alike(crew, tmp_path):
    """Its answers, and what it knew before, are asked of the parts of all processes."""
    known = tmp_path / "known.txt"
    known.write_text("x is big in red\n\ny is small in blue\n" * 8)
    crew.small = talking_run(tmp_path)
    directories = both_ways(crew, tmp_path, f"evaluate.known={known}")
    wanted, found = (result(one)["scores"]["known"] for one in directories)
    for name in ("loss", "base_loss", "rise"):
        one, other = (x["metrics"][name]["estimate"] for x in (found, wanted))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5), name
    said = [np.load(one / "predictions" / "test.npz") for one in directories]
    np.testing.assert_array_equal(said[0]["answer"], said[1]["answer"])


def test_a_function_of_the_users_own_is_trained_alike(crew, world, tmp_path):
    world.write_own_model(tmp_path)
    both_ways(
        crew, tmp_path, "base.source=python:own_model:load", "delta.targets=mix/kernel",
        "data.batching.buckets=[16]", "mesh.rules={mix/kernel: [fsdp, tensor]}",
    )  # fmt: skip


def test_a_start_that_reads_the_base_is_alike(crew, tmp_path):
    both_ways(crew, tmp_path, "delta=full", "optim.lr=0.001", "optim.eps=1e-5")


def test_no_device_holds_more_of_the_base_than_its_part(crew, tmp_path):
    """Not even the first one of a process, where JAX puts what has no place."""
    faults = {n: [Fault("weigh", "compilation")] for n in range(2)}
    assert crew.run(2, tmp_path / "run", faults=faults) == [0, 0], crew.all_said()
    for index in range(2):
        (told,) = re.findall(r"devices hold ([\d ]+) bytes", crew.said(index))
        held = [*map(int, told.split())]
        assert len(held) == 4
        assert max(held) < 1.1 * min(held), held


def test_ranks_move_alike(crew, tmp_path):
    moving = (
        "ranks=fisher",
        "ranks.every=4",
        "ranks.measure_every=2",
        "optim.epochs=4",
        "optim.lr=0.005",
    )
    alone, both = both_ways(crew, tmp_path, *moving)
    with np.load(alone / "ranks.npz") as ours, np.load(both / "ranks.npz") as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_run_that_is_finished_is_left_alone(crew, tmp_path):
    directory = tmp_path / "run"
    assert crew.run(2, directory) == [0, 0], crew.all_said()
    before = (directory / "result.json").stat().st_mtime_ns
    assert crew.run(2, directory) == [0, 0], crew.all_said()
    assert (directory / "result.json").stat().st_mtime_ns == before
    assert "finished earlier" in crew.said(0)


def test_a_run_goes_on_in_another_number_of_processes(crew, tmp_path, undisturbed):
    directory = tmp_path / "run"
    halfway = [*LONG, "loop.stop_after=30"]
    assert crew.run(2, directory, *halfway) == [75, 75], crew.all_said()
    assert position(directory) == 30
    assert crew.run(1, directory, *LONG) == [0], crew.all_said()
    close_runs(undisturbed, directory)


def test_the_first_process_alone_speaks(crew, tmp_path):
    assert crew.run(2, tmp_path / "run") == [0, 0]
    assert "accuracy" in crew.said(0)
    assert "accuracy" not in crew.said(1)


def test_one_that_compiles_longer_is_waited_for(crew, tmp_path):
    # Exchanges of XLA:CPU would give up after 30 s; the other compiles for some time.
    later = {1: [Fault("sleep", "compilation", value=55)]}
    assert crew.run(2, tmp_path / "run", faults=later) == [0, 0], crew.all_said()
