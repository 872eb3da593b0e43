"""Optuna asks, packs are trained, values are told; a killed study goes on."""

import optuna
import pytest
from fake_packs import FakePack, Killed, at_the_door
from tiny_run import SMALL

from lowrank.core.errors import BAD_INPUT
from lowrank.sweeps.ask import JOURNAL, NAME

pytestmark = pytest.mark.long

SEARCHED = ("optim.lr=tag(log, interval(0.001, 0.5))", "delta.rank=2,4")


@pytest.fixture
def search(world, tmp_path, monkeypatch, capfd):
    """Gives a study's line: (exit code, what was said)."""
    plugins = ("hydra/launcher=packed", "hydra/sweeper=lowrank_optuna")
    size = ("hydra.sweeper.num_trials=6", "hydra.sweeper.batch=3")
    own = [one for one in world.overrides() if not one.startswith("run.root")]
    with at_the_door(monkeypatch, capfd) as door:

        def given(pack, *arguments, where=tmp_path, searched=SEARCHED):
            monkeypatch.chdir(where)
            return door(pack, *plugins, *size, *SMALL, *own, *searched, *arguments)

        yield given


def told(folder):
    """(parameters, value) of every trial in a study's journal."""
    (path,) = folder.glob(f"multirun/*/{JOURNAL}")
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    storage = optuna.storages.JournalStorage(backend)
    trials = optuna.load_study(study_name=NAME, storage=storage).trials
    return [(one.params, one.value) for one in trials]


@pytest.mark.faults
def test_a_study_fills_packs_and_a_killed_one_asks_the_same(search, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = FakePack(), FakePack()
    code, said = search(whole, where=tmp_path / "whole")
    assert code == 0, said
    assert [len(one) for one in whole.packs] == [3, 3]
    found = told(tmp_path / "whole")
    assert [value for _, value in found] == [params["optim.lr"] for params, _ in found]
    assert "best of the study" in said
    killed.die_after = 1
    with pytest.raises(Killed):
        search(killed, where=tmp_path / "killed")
    killed.die_after = None
    code, said = search(killed, where=tmp_path / "killed")
    assert code == 0, said
    # The pack that was begun goes on with all of its trials.
    assert [len(one) for one in killed.packs] == [3, 3, 3]
    assert told(tmp_path / "killed") == found
    code, said = search(killed, where=tmp_path / "killed")
    assert code == 0, said
    assert len(killed.packs) == 3, "a finished study is run again"


def test_a_study_without_a_search_is_refused(search):
    code, said = search(FakePack(), searched=())
    assert code == BAD_INPUT
    assert "nothing to search" in said
