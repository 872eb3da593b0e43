"""The commands, as their users give them: arguments, exit codes, what is printed."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import SMALL, composed, write_table

from lowrank.core.errors import BAD_INPUT, CANNOT_WRITE, CORRUPT, PREEMPTED, BadInput
from lowrank.core.spec import spec
from lowrank.data.tasks import CATALOGUE as DATA
from lowrank.io.files import Lock
from lowrank.run.door import named_bases
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict

pytestmark = pytest.mark.long


@pytest.fixture
def own_model(world, tmp_path):
    (tmp_path / "code").mkdir()
    return world.write_own_model(tmp_path / "code")


def small(world, directory, *overrides):
    delta = [] if any(o.startswith("delta") for o in overrides) else ["delta.rank=4"]
    given = world.overrides(f"run.directory={directory}", *delta)
    return [*SMALL, *given, *overrides]


@pytest.fixture
def call(monkeypatch, capfd):
    """Calls a door in this process: (exit code, stdout, stderr)."""

    def called(door, *arguments):
        main = importlib.import_module(f"experiments.{door}").main
        monkeypatch.setattr(sys, "argv", [door, *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    # A stopped command keeps its own handlers until its process ends.
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield called
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_same_trial_by_command_and_by_call(world, finished, call):
    directory = world.runs / "commanded"
    arguments = small(world, directory, "seed=3")
    done = world.command("train", *arguments)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    for phase in ("loading data and base", "compiled the step", "finished at step 18"):
        assert phase in done.stderr, phase
    assert "Traceback" not in done.stderr
    assert "\r" not in done.stderr, "a progress bar without a terminal"
    called, commanded = (
        json.loads((d / "result.json").read_text()) for d in (finished[0], directory)
    )
    assert called["trial"] == commanded["trial"]
    assert called["steps"] == commanded["steps"]
    assert "seed=3" in (directory / ".hydra/overrides.yaml").read_text()
    code, _, said = call("train", *arguments)
    assert code == 0, said
    assert "finished earlier" in said
    assert "compiled" not in said
    code, shown, said = call("evaluate", f"run.directory={directory}", "merged=true")
    assert code == 0, said
    assert "accuracy" in shown


@pytest.mark.parametrize(
    "arguments", [["optim=adam"], ["optim.learning_rate=1"], ["seed"], ["base=bert"]]
)
def test_a_config_that_does_not_compose_is_bad_input(arguments, call):
    code, _, said = call("train", *arguments)
    assert code == BAD_INPUT, said
    assert arguments[0].split("=")[0].split(".")[-1] in said


def test_errors_of_ours_are_one_message_and_a_code(world, tmp_path, call):
    canary = tmp_path / "canary"
    attack = "+optim._target_=builtins.open", f"+optim._args_=['{canary}',w]"
    done = world.command("train", *small(world, tmp_path / "a", *attack))
    assert done.returncode == BAD_INPUT
    assert "BadInput" in done.stderr
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert not canary.exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    lock = Lock(tmp_path / "b")
    code, _, said = call("train", *small(world, tmp_path / "b"))
    lock.release()
    assert code == CANNOT_WRITE
    assert "being written by" in said


def test_secrets_reach_no_file_and_no_message(world, tmp_path, call, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "canary-0123456789")
    arguments = small(
        world, tmp_path / "run", "delta=head", "track.group=canary-0123456789"
    )
    code, _, said = call("train", *arguments)
    assert code == 0, said
    code, _, said = call("train", *arguments, "+canary-0123456789=1")
    assert code == BAD_INPUT
    assert "canary-0123456789" not in said.split("BadInput")[-1]
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert [p for p in files if p.name == "overrides.yaml"]
    for path in files:
        assert b"canary-0123456789" not in path.read_bytes(), path


def test_an_error_that_is_a_bug_shows_where(world, tmp_path):
    (tmp_path / "buggy.py").write_text("def load(num_classes):\n    return 1 / 0\n")
    arguments = small(world, tmp_path / "run", "base.source=python:buggy:load")
    done = world.command("train", *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "buggy.py" in done.stderr
    assert not (tmp_path / "run").exists()


def test_any_jax_model_reaches_the_command(
    world, own_model, tmp_path, call, monkeypatch
):
    directory = tmp_path / "run"
    monkeypatch.syspath_prepend(own_model)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    code, _, said = call(
        "train",
        *SMALL,
        "base=python:own_model:load",
        f"data.path={world.table}",
        f"run.cache={world.cache}",
        f"run.directory={directory}",
        "delta.rank=3",
        "delta.targets=mix/kernel",
        "optim.epochs=6",
        "data.batching.buckets=[16]",
    )
    assert code == 0, said
    result = json.loads((directory / "result.json").read_text())
    assert result["costs"]["trained_parameters"] == 3 * (16 + 12) + 12 * 3
    assert result["scores"]["test"]["metrics"]["accuracy"]["estimate"] > 0.5
    rows = predict(load_run(directory), ["word3 cat", "word1 snow"])
    assert {row["label"] for row in rows} <= {"animal", "color", "weather"}


def test_plugins_are_imported_before_anything_else(world, tmp_path, monkeypatch):
    (tmp_path / "my_plugin.py").write_text(
        "from lowrank.deltas.catalogue import CATALOGUE\n"
        "from lowrank.deltas.lora import LoRA\n"
        "CATALOGUE['mine'] = LoRA\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = world.config("plugins=[my_plugin]", "delta.name=mine")
    try:
        assert read(config).rules("head/**")
    finally:
        from lowrank.deltas.catalogue import CATALOGUE

        CATALOGUE.pop("mine", None)
        sys.modules.pop("my_plugin", None)


def test_data_that_do_not_say_their_kind_are_refused(world, monkeypatch):
    @spec
    class Mine:
        path: str = ""

    monkeypatch.setitem(DATA, "mine", Mine)
    with pytest.raises(BadInput, match=r"data=mine is of the kind None.*Mine.*classes"):
        read({**world.config(), "data": {"name": "mine"}})


@pytest.mark.slow
def test_the_demo_compares_with_the_probe(world, tmp_path, call):
    code, shown, said = call("demo", *small(world, tmp_path / "run", "seed=3"))
    assert code == 0, said
    assert "frozen probe" in shown
    assert (tmp_path / "run" / "result.json").exists()
    sealed = small(world, tmp_path / "other", "data.train_on_validation=true")
    code, _, said = call("demo", *sealed)
    assert code == BAD_INPUT
    assert "needs a validation split" in said
    assert not (tmp_path / "other").exists()


def test_a_preview_is_shown_and_leaves_nothing(world, tmp_path, call):
    given = small(world, tmp_path / "run", "run.preview=true")
    code, shown, said = call("train", *given)
    assert code == 0, said
    assert "encoder/layer/attention/query/kernel" in shown
    assert "3,915" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "source", "name"),
    [
        ("base=./folder", "./folder", "folder"),
        ("base=/some/where/bert", "/some/where/bert", "some-where-bert"),
        ("base=pypi:one==1.0", "pypi:one==1.0", "pypi-one--1.0"),
        ("base=python:my.model:load", "python:my.model:load", "python-my.model-load"),
        ("base=hf:org/name@v1", "hf:org/name@v1", "hf-org-name-v1"),
        ("base=org/name", "org/name", "org-name"),
    ],
)
def test_a_base_may_be_named_by_one_string(argument, source, name):
    config = composed("config", *named_bases([argument, "seed=4"]))
    assert config["base"]["source"] == source
    assert config["base"]["name"] == name
    assert config["seed"] == 4


def test_other_arguments_are_left_as_they_are():
    given = ["base=minilm", "base=minilm,other", "base.source=./x", "data=table", "-m"]
    assert named_bases(given) == given


def test_a_changed_file_under_the_same_command_is_refused(world, tmp_path, call):
    table = write_table(tmp_path / "table.csv")
    stop = "loop.stop_after=2"
    given = small(world, tmp_path / "run", f"data.path={table}", "delta=head")
    code, _, said = call("train", *given, stop)
    assert code == PREEMPTED, said
    assert "the same command continues" in said
    table.write_text(table.read_text() + "word5 word6 word7 fog,weather\n")
    code, _, said = call("train", *given)
    assert code == CORRUPT
    assert "data fingerprint" in said


SECOND = """
import os, signal, sys
from lowrank.core.errors import Preempted
from lowrank.run import door

def stopped(config, overrides):
    raise Preempted("stopped once")

def tell(message):
    os.kill(os.getpid(), getattr(signal, os.environ["SECOND"]))
    sys.exit(1)

door._tell = tell
door.command(stopped)()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_while_the_door_speaks_still_ends_with_75(name, tmp_path):
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-c", SECOND],
        env={**os.environ, "SECOND": name, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        timeout=120,
    )
    assert child.returncode == 75


def test_a_line_is_logged_once(tmp_path):
    """Though importing Orbax gives the root logger a handler of its own."""
    code = (
        "import logging, sys\nfrom lowrank.io import checkpoints\n"
        "from lowrank.run import door\n"
        "door.command(lambda *_: logging.getLogger('lowrank').info('one line'))()\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.stderr.count("one line") == 1, child.stderr
