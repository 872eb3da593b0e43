"""The clock jumps, a secret stands everywhere: nothing is wrong, nothing is told."""

import json
import os

import pytest
from lives import LONG, Fault, command, live, same_run
from tiny_run import SMALL, metric_rows

from lowrank.core.errors import PREEMPTED
from lowrank.io.view import load_record

pytestmark = pytest.mark.faults

DECADE = 315_360_000.0


@pytest.mark.fault(
    "clock jumping back and forth by ten years, files dated 1970 and 2100",
    "the same bits; metrics in order; no false hang",
)
def test_a_clock_that_jumps(world, undisturbed, config_of, tmp_path, outcomes):
    directory, log = tmp_path / "run", tmp_path / "log"
    jumps = [
        ("step", -DECADE, 13),
        ("checkpoint", DECADE, 30),
        ("restore", -DECADE, None),
    ]
    for number, (place, jump, stop) in enumerate(jumps):
        fault = Fault("clock", place, 1, None, jump)
        stops = [] if stop is None else [f"loop.stop_after={stop}"]
        config = config_of(directory, "run.hang_seconds=30", *stops)
        code = live(world, config, log, fault)
        assert code == (PREEMPTED if stop else 0), log.read_text()
        for path in directory.rglob("*"):
            os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
        outcomes("undisturbed")
    same_run(undisturbed, directory)
    times = load_record(directory).metrics["time"]
    assert times.max() - times.min() > DECADE / 2, "the clock did not jump"
    steps = [row["step"] for row in metric_rows(directory) if "step" in row]
    assert steps == sorted(steps)


SECRETS = {
    "environment": "canary-environment-0123456789",
    "key": "hf_canaryKEYcanaryKEY0123456789",
    "argument": "canaryARGUMENT0123456789",
    "wandb": "0123456789abcdef0123456789abcdef01234567",
}


@pytest.mark.fault(
    "secrets in environment, config and arguments, tracked by W&B, in two attempts",
    "their bytes are in no file of the run directory, W&B's included, and not printed",
)
def test_secrets_are_nowhere(world, tmp_path, outcomes):
    directory = tmp_path / "run"
    arguments = [
        *(one for one in SMALL if one != "track=local"),
        *world.overrides(
            f"run.directory={directory}",
            "delta=head",
            f"track.group='{SECRETS['environment']} and {SECRETS['key']}'",
            f"track.project='password={SECRETS['argument']}'",
        ),
    ]
    secret = {
        "SERVICE_TOKEN": SECRETS["environment"],
        "WANDB_API_KEY": SECRETS["wandb"],
    }
    for number, (stop, code) in enumerate([(["loop.stop_after=4"], 75), ([], 0)]):
        log = tmp_path / f"log{number}"
        found = command(world, "train", [*arguments, *stop], log, tmp_path, **secret)
        assert found == code, log.read_text()
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert json.loads((directory / "status.json").read_text())["attempt"] == 2
    for path in [*files, tmp_path / "log0", tmp_path / "log1"]:
        content = path.read_bytes()
        for where, value in SECRETS.items():
            assert value.encode() not in content, (where, path)
        outcomes("files without a secret")


def test_the_canaries_are_seen_where_nothing_hides_them(world, undisturbed):
    """The search itself works: a word of the config is found in the record."""
    content = (undisturbed / "config.yaml").read_bytes()
    assert LONG[0].split("=")[1].encode() in content
