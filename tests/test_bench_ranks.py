"""What moving ranks cost is timed on steps that do move them, and says where."""

import functools
import itertools
import json

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


@pytest.mark.parametrize("wrong", [["--recipes", "nrom"], ["--rounds", "0"]])
def test_what_it_cannot_measure_is_refused_at_once(wrong):
    with pytest.raises(SystemExit):
        ranks.main(wrong)


def test_a_base_that_is_not_there_is_a_clear_error(capsys):
    assert ranks.main(["--base", "/nowhere", "--rounds", "1"]) != 0
    assert "nowhere" in capsys.readouterr().err
