"""The command that compares LoRA with the frozen probe says what went wrong."""

import pytest

from experiments import quality
from lowrank.core.errors import Corrupt


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)


def test_an_unknown_task_is_refused_before_any_is_run(monkeypatch, capsys):
    monkeypatch.setattr(quality, "study", lambda task: pytest.fail(task))
    with pytest.raises(SystemExit) as ended:
        quality.main(["intents", "digit"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "no task 'digit'; there are intents, trec6, digits" in told


def test_a_run_of_another_tree_is_a_message_and_its_code(monkeypatch, capsys, tmp_path):
    def study(task):
        raise Corrupt("runs/1 holds another run")

    monkeypatch.setattr(quality, "study", study)
    assert quality.main(["digits"]) == 78
    assert capsys.readouterr().err == "Corrupt: runs/1 holds another run\n"
    assert not [*tmp_path.iterdir()]
