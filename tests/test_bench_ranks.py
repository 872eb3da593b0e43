"""What moving ranks cost is timed on steps that do move them, and says where."""

import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_bench import SETTING, TINY, tiny_base

from experiments.bench import ours, ranks
from experiments.bench.setting import Setting
from lowrank.allocate.catalogue import CATALOGUE
from lowrank.io import hub

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def test_a_turn_holds_its_event_and_measurements(base):
    recipe = CATALOGUE["norm"]
    # From the end of the turn on, one component per layer: what the event has to do.
    ended = recipe(every=ranks.STEPS, begin=0, end=ranks.STEPS)
    arm = ours.choosing(SETTING, base, 1, ended)
    seen = [jax.tree.map(np.asarray, arm._state.ranks)]
    gates = []
    for _ in range(ranks.STEPS + 1):
        arm.step()
        seen.append(jax.tree.map(np.asarray, arm._state.ranks))
        dials = arm._state.dials.values()
        gates.append(sum(int(own["gate"].sum()) for own in dials))
    moved = [
        any((a != b).any() for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in itertools.pairwise(seen)
    ]
    assert sum(moved) >= ranks.STEPS // recipe().measure_every
    assert gates[0] == SETTING.rank * 6 * TINY.num_layers
    assert gates[-1] == 6 * TINY.num_layers


def test_it_is_written_with_its_machine(base, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "load", lambda *_, **__: base)
    monkeypatch.setattr(ranks, "SHAPES", [(4, 8)])
    small = functools.partial(Setting, num_classes=SETTING.num_classes)
    monkeypatch.setattr(ranks, "Setting", small)
    out = tmp_path / "times.json"
    assert ranks.main(["--rounds", "2", "--recipes", "norm", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {*found["times"]} == {ranks.FULL, "norm", ranks.FINAL}
    assert all(len(own) == 2 and min(own) > 0 for own in found["times"].values())
    assert found["machine"]["num_cpus"]
    assert found["machine"]["versions"]["jax"]


@pytest.mark.parametrize(("seconds", "code"), [(1.04, 0), (1.06, 1)])
def test_a_limit_decides_the_exit_code(seconds, code, monkeypatch, capsys):
    times = {ranks.FULL: [1.0] * 9, "norm": [seconds] * 9, ranks.FINAL: [1.0] * 9}
    found = {"shape": "4x8", "held": 4, "end": 2, "times": times}
    monkeypatch.setattr(hub, "load", lambda *_, **__: None)
    monkeypatch.setattr(ranks, "measure", lambda *_: found)
    assert ranks.main(["--recipes", "norm", "--most", "1.05"]) == code
    assert ("not shown" in capsys.readouterr().err) == bool(code)


def test_of_several_processes_each_is_one_value(tmp_path, monkeypatch, capfd):
    """Turns of one process that are slow alike say little about the next one."""
    numbers = iter([1.00, 1.10, 1.02])

    def run(command, check):
        slow = next(numbers)
        times = {ranks.FULL: [1.0] * 50, "norm": [slow] * 50, ranks.FINAL: [1.0] * 50}
        found = {"machine": {}, "shape": "4x8", "held": 4, "end": 2, "times": times}
        out = command[command.index("--out") + 1]
        assert check
        assert command[command.index("--rounds") + 1] == "50"
        Path(out).write_text(json.dumps(found))

    monkeypatch.setattr(ranks.subprocess, "run", run)
    out = tmp_path / "times.json"
    given = ["--processes", "3", "--rounds", "50", "--recipes", "norm"]
    assert ranks.main([*given, "--out", str(out), "--most", "1.05"]) == 1
    found = json.loads(out.read_text())
    assert len(found["times"]["norm"]) == 150
    assert found["machine"]["num_cpus"]
    told = ranks.beside(found, "norm")
    assert (told["median"], told["low"], told["high"]) == (1.02, 1.00, 1.10)


def test_processes_that_fail_say_so(capfd):
    given = ["--processes", "2", "--base", "/nowhere", "--rounds", "1"]
    assert ranks.main(given) == 2
    assert "nowhere" in capfd.readouterr().err


def test_arms_meet_the_same_machine(monkeypatch):
    """One that becomes slower and slower slows no arm beside another."""
    now = [0.0]

    class Arm:
        def __init__(self, seconds):
            self.seconds = seconds

        def step(self):
            now[0] += self.seconds * (1 + now[0] / 20)

    arms = {"lora": Arm(0.1), "choosing": Arm(0.105)}
    for name, arm in arms.items():
        monkeypatch.setattr(ours, name, lambda *_, arm=arm: arm)
    monkeypatch.setattr(ranks.time, "perf_counter", lambda: now[0])
    found = ranks.measure(SETTING, None, ["norm"], 3)
    assert ranks.beside(found, "norm")["high"] == pytest.approx(1.05, rel=0.02)
    assert ranks.beside(found, ranks.FINAL)["high"] == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    "wrong", [["--recipes", "nrom"], ["--rounds", "0"], ["--processes", "0"]]
)
def test_what_it_cannot_measure_is_refused_at_once(wrong):
    with pytest.raises(SystemExit):
        ranks.main(wrong)


def test_a_base_that_is_not_there_is_a_clear_error(capsys):
    assert ranks.main(["--base", "/nowhere", "--rounds", "1"]) != 0
    assert "nowhere" in capsys.readouterr().err


def test_no_arm_comes_behind_itself(monkeypatch):
    """It would find in the caches what it has just written."""
    order = []

    class Arm:
        def __init__(self, name):
            self.step = lambda: order.append(name)

    made = map(Arm, ("full", "final"))
    monkeypatch.setattr(ours, "lora", lambda *_: next(made))
    monkeypatch.setattr(ours, "choosing", lambda *_: Arm("choosing"))
    found = ranks.measure(SETTING, None, ["norm"], 3)
    assert len(found["times"]["norm"]) == 3
    # Before them each warms up alone.
    timed = order[3 * ranks.STEPS :]
    assert all(timed.count(name) == 3 * ranks.STEPS for name in {*timed})
    assert all(one != other for one, other in itertools.pairwise(timed))
