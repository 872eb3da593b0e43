"""Trials taken out of their packs end as in one pack from the start."""

import dataclasses
import json
import shutil

import pytest
import test_packs
from test_packs import same_trial

from lowrank.core.errors import BadInput, Corrupt
from lowrank.run.packs import Origin, run_pack

#: What sets them apart; then one shape of batches, and a validation in the middle.
DIFFERENT = (
    ["delta.rank=2", "seed=3"],
    ["delta.rank=5", "seed=4", "delta.dropout=0.2", "optim.lr=0.01"],
    ["delta.rank=3", "seed=3", "optim.weight_decay=0.1", "penalty.frobenius=0.01"],
)
SHORT = ("data.batching.buckets=[16]", "optim.epochs=1", "loop.evaluate_every=4")
STEP = 4


def trials(world, where):
    return test_packs.trials(world, where, *SHORT, differ=DIFFERENT)


@pytest.fixture(scope="module")
def whole(world):
    """Three trials of ranks 2, 5 and 3 in one pack to the end."""
    where = world.runs / "whole"
    return where, run_pack(trials(world, where), folder=where / "pack")


@pytest.fixture(scope="module")
def paused(world):
    """The first two in a pack that has room for 5, the third in one that has for 3."""
    where = world.runs / "paused"
    packs = {
        "a": trials(world, where)[:2],
        "b": trials(world, where)[2:],
    }
    for name, pack in packs.items():
        found = run_pack(pack, folder=where / "packs" / name, until=STEP)
        assert [one.paused for one in found] == [STEP] * len(pack)
    return where, packs


def origin(paused, name, row):
    where, packs = paused
    ids = tuple(one.trial_id for one in packs[name])
    return Origin(where / "packs" / name, ids, STEP, row)


@pytest.mark.parametrize("kept", [(2, 0), (1, 2)], ids=["narrower", "wider"])
def test_trials_meet_in_another_pack_and_end_as_without(
    world, whole, paused, kept, tmp_path
):
    """Into a pack with room for 3, and for 5; tolerances as where packs are compared.

    One of them had a penalty and one a dropout that not all its neighbors have.
    """
    here, outcomes = whole
    for trial in kept:
        shutil.copytree(paused[0] / str(trial), tmp_path / str(trial))
    chosen = [trials(world, tmp_path)[trial] for trial in kept]
    places = {0: ("a", 0), 1: ("a", 1), 2: ("b", 0)}
    origins = [origin(paused, *places[trial]) for trial in kept]
    found = run_pack(chosen, folder=tmp_path / "pack", origins=origins)
    for trial, outcome in zip(kept, found, strict=True):
        there = tmp_path / str(trial)
        same_trial(here / str(trial), there, outcomes[trial].result, outcome)
        assert json.loads((there / "status.json").read_text())["attempt"] == 2


def test_what_does_not_belong_together_is_not_joined(world, paused, tmp_path):
    where, _ = paused
    shutil.copytree(where / "0", tmp_path / "0")
    chosen = trials(world, tmp_path)[:1]
    one = origin(paused, "a", 0)
    odd = dataclasses.replace(one, trials=one.trials[::-1])
    with pytest.raises(Corrupt, match="belongs to another run"):
        run_pack(chosen, folder=tmp_path / "pack", origins=[odd])
    shutil.copyfile(where / "1" / "metrics.jsonl", tmp_path / "0" / "metrics.jsonl")
    odd = dataclasses.replace(one, row=1)
    with pytest.raises(Corrupt, match="trial_seeds"):
        run_pack(chosen, folder=tmp_path / "pack", origins=[odd])


def test_a_pack_pauses_at_validations_only(world, tmp_path):
    chosen = trials(world, tmp_path)[:1]
    with pytest.raises(BadInput, match="step 3 of 9 has none"):
        run_pack(chosen, folder=tmp_path / "pack", until=3)
