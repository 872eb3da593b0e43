"""Processes that are no crew: told at once, with all of them, before anything runs."""

import pytest
from tiny_run import write_table

pytestmark = pytest.mark.long


def test_commands_that_differ(crew, tmp_path):
    directory = tmp_path / "run"
    each = (["delta.rank=4"], ["delta.rank=2"])
    assert crew.run(2, directory, each=each) == [2, 2], crew.all_said()
    for index in range(2):
        said = crew.said(index)
        assert "disagree on delta.rank in the config: '4' and '2'" in said
    assert not directory.exists()


def test_files_that_differ(crew, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_table(folder / "table.csv", seed=seed)
    codes = crew.run(2, tmp_path / "run", "data.path=table.csv", folders=folders)
    assert codes == [2, 2], crew.all_said()
    for index in range(2):
        assert "disagree on the data fingerprint" in crew.said(index)
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_leaves_a_process_out(crew, tmp_path):
    codes = crew.run(2, tmp_path / "run", "mesh.data=1", "mesh.fsdp=1")
    assert codes == [2, 2], crew.all_said()
    assert "all must take part" in crew.said(1)
    assert "mesh.data=-1" in crew.said(1)


def test_a_directory_that_belongs_to_another_run(crew, tmp_path):
    directory = tmp_path / "run"
    assert crew.run(2, directory) == [0, 0], crew.all_said()
    codes = crew.run(2, directory, "optim.lr=0.01")
    assert codes == [78, 78], crew.all_said()
    for index in range(2):
        assert "holds another run" in crew.said(index)


def test_nobody_is_there(crew, tmp_path):
    waits = ["processes.wait_seconds=3"]
    crew.start(2, tmp_path / "run", each=(waits, waits))
    # Before it has begun to listen.
    crew.children[0].kill()
    assert crew.codes()[1] == 2, crew.said(1)
    assert "does not reach processes.coordinator" in crew.said(1)
    assert "processes.wait_seconds = 3" in crew.said(1)


def test_one_does_not_come(crew, tmp_path):
    waits = ["processes.wait_seconds=5"]
    crew.start(2, tmp_path / "run", each=(waits, waits))
    crew.children[1].kill()
    assert crew.codes()[0] == 2, crew.said(0)
    assert "has waited processes.wait_seconds = 5 for the other 1" in crew.said(0)
    assert not (tmp_path / "run").exists()
