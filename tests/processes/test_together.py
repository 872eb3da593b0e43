"""Two processes with four devices each do what one with eight does."""

import json

import numpy as np
import pytest
from lives import LONG, Fault
from safetensors.numpy import load_file
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


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_do_what_one_does(crew, tmp_path, mesh):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert crew.alone(alone, *MESHES[mesh]) == 0, crew.said(0)
    assert crew.run(2, both, *MESHES[mesh]) == [0, 0], crew.all_said()
    close_runs(alone, both)
    environment = json.loads((both / "environment.json").read_text())
    assert environment["num_processes"] == 2
    names = lambda folder: sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if "checkpoints" not in str(p)
    )
    assert names(alone) == names(both)


def test_ranks_move_alike(crew, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    moving = (
        "ranks=fisher",
        "ranks.every=4",
        "ranks.measure_every=2",
        "optim.epochs=4",
        "optim.lr=0.005",
    )
    assert crew.alone(alone, *moving) == 0, crew.said(0)
    assert crew.run(2, both, *moving) == [0, 0], crew.all_said()
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
