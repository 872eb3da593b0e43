"""A packed sweep of two processes: the first one leads, and both run every pack."""

import json

import pytest
from test_together import close_runs

pytestmark = pytest.mark.long

TRIALS = ("mesh.trial=2", "mesh.data=4", "mesh.fsdp=1", "mesh.tensor=1")
SWEPT = ("-m", "hydra/launcher=packed", "delta.rank=2,4", "seed=0,1")


def sweep(crew, count, folder, *overrides):
    given = (*SWEPT, f"hydra.sweep.dir={folder}", "run.root=null", *TRIALS)
    return crew.run(count, None, *given, *overrides)


def runs(folder):
    """Directories of trials, by what tells them apart."""
    found = {}
    for file in folder.glob("*/result.json"):
        found[json.loads(file.read_text())["trial"]] = file.parent
    return found


def test_a_sweep_of_two_processes_is_that_of_one(crew, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert sweep(crew, 1, one) == [0], crew.all_said()
    assert sweep(crew, 2, two) == [0, 0], crew.all_said()
    ours, theirs = runs(one), runs(two)
    assert len(ours) == 4
    assert ours.keys() == theirs.keys()
    for name, directory in ours.items():
        close_runs(directory, theirs[name])
    assert "done" in crew.said(0)
    # Nothing is left to do, and nobody waits for an order.
    assert sweep(crew, 2, two) == [0, 0], crew.all_said()


def test_trials_that_do_not_come_out_even_leave_no_process_out(crew, tmp_path):
    """Devices that no trial needs share rows: three trials on an axis of two."""
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    for count, folder in folders.items():
        codes = sweep(crew, count, folder, "delta.rank=4", "seed=0,1,2")
        assert codes == [0] * count, crew.all_said()
    ours, theirs = map(runs, folders.values())
    assert len(ours) == 3
    assert ours.keys() == theirs.keys()
    for name, directory in ours.items():
        close_runs(directory, theirs[name])


def test_a_trial_that_fails_ends_all_with_its_code(crew, tmp_path):
    codes = sweep(crew, 2, tmp_path / "sweep", "optim.lr=1e30", "optim.clip=null")
    assert codes == [77, 77], crew.all_said()


def test_the_first_one_plans(crew, tmp_path):
    codes = sweep(crew, 2, tmp_path / "sweep", "sweep.dry_run=true")
    assert codes == [0, 0], crew.all_said()
    assert "4" in crew.said(0)
    assert not runs(tmp_path / "sweep")


def test_packs_go_to_no_other_processes(crew, tmp_path):
    codes = sweep(crew, 2, tmp_path / "sweep", "sweep.engine=ray", "sweep.width=2")
    assert codes == [2, 2], crew.all_said()
    assert "processes=one" in crew.said(1)
