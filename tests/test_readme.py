"""The README stays true: its code runs, its commands compose, its targets exist."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lowrank.run.door import CONF, named_bases, resolve, unquoted_keys
from lowrank.run.settings import read
from lowrank.run.trial import run_trial

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [
    shlex.split(line, comments=True)
    for line in SHELL.splitlines()
    if line.startswith("python -m experiments.")
]


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose(name, overrides=list(overrides)))


@pytest.mark.slow
def test_python_blocks_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["data.rows_per_class=1", "optim.epochs=1", "track=local"]
    # One bucket: one step to compile instead of four.
    small += ["data.batching.buckets=[24]"]
    small += ["evaluate.latency=false", "evaluate.resamples=100"]
    run_trial(composed("config", *small, "run.directory=runs/first"))
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "output_error" in printed
    assert "'layer[0]/kernel': 0, 'layer[1]/kernel': 2" in printed
    assert "|" in printed.splitlines()[-1], "a label of intents has the form a|b|c"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_compose(command):
    door, overrides = command[2].split(".")[1], named_bases(command[3:])
    overrides = [unquoted_keys(one) for one in overrides if one != "-m"]
    if "-m" in command[3:]:
        # The first trial of the sweep.
        overrides = [one.split(",")[0] for one in overrides]
    name = door if (CONF / f"{door}.yaml").exists() else "config"
    config = composed(name, *overrides)
    if door == "train":
        assert read(config).trial_id


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    wanted = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "parity", "bench"} <= wanted
    for target in wanted:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_readme_names_are_there():
    linked = re.findall(r"\]\(([\w./-]+)\)", README)
    quoted = re.findall(r"`((?:tests|adapt|io|train|deltas)/[\w./-]+)`", README)
    assert linked
    assert quoted
    for name in linked:
        assert (ROOT / name).exists(), name
    for name in quoted:
        assert (ROOT / name).exists() or (ROOT / "lowrank" / name).exists(), name
