"""A start from an earlier adapter: the function goes on where it was."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import write_base

from lowrank.core.errors import BadInput
from lowrank.run.labeled import Labeled
from lowrank.run.packs import run_pack
from lowrank.run.prepare import marks_of, prepare_pack
from lowrank.run.settings import read
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def earlier(world):
    directory = world.runs / "earlier"
    run_trial(world.config(f"run.directory={directory}", "seed=7"))
    return directory


def at_start(config):
    """The outputs before the first step, and the prepared pack."""
    prepared = prepare_pack([read(config)])
    own = prepared.trials[0].adapted
    drawn = own.init_trained(jax.random.key(3))
    start = prepared.starts[0]
    trained = drawn if start is None else start(drawn)
    batch = prepared.trials[0].evaluation("test")[0]
    inputs = prepared.trials[0].problem.inputs(batch)
    logits = own.apply(own.frozen(), trained, inputs, dials=own.dials())
    return np.asarray(logits), batch


@pytest.mark.parametrize(
    "more", [[], ["delta.rank=6", "delta.alpha=3"], ["base.scan=false"]], ids=str
)
def test_it_computes_what_the_earlier_run_did(world, earlier, more):
    """Whatever rank, scale and layout the new one has."""
    found, batch = at_start(world.config(f"delta.start={earlier}", *more))
    wanted = load_run(earlier).logits(batch)
    # The adapter folder holds float32, and scales are folded into one factor.
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    cold, _ = at_start(world.config(*more))
    assert not np.allclose(cold, wanted, atol=1e-2)


def test_a_run_and_its_folder_are_the_same_start(world, earlier):
    one, _ = at_start(world.config(f"delta.start={earlier}"))
    other, _ = at_start(world.config(f"delta.start={earlier / 'adapter'}"))
    np.testing.assert_array_equal(one, other)


def test_further_components_can_learn(world, earlier):
    given = world.config(f"delta.start={earlier}", "delta.rank=6")
    prepared = prepare_pack([read(given)])
    own = prepared.trials[0].adapted
    drawn = own.init_trained(jax.random.key(0))
    warm = prepared.starts[0](drawn)
    for path in own.sites:
        a, b = np.asarray(warm[path]["a"]), np.asarray(warm[path]["b"])
        fresh = np.asarray(drawn[path]["a"])
        np.testing.assert_array_equal(a[..., 4:, :], fresh[..., 4:, :])
        assert np.abs(a[..., 4:, :]).max() > 0
        assert not b[..., 4:, :].any()
        assert b[..., :4, :].any()


def test_a_run_goes_on_from_it(world, earlier):
    """At no learning rate to speak of it scores as the earlier one."""
    directory = world.runs / "warmed"
    still = ["optim.lr=1e-9", "optim.epochs=1", f"delta.start={earlier}"]
    result = run_trial(world.config(f"run.directory={directory}", *still))
    before = load_run(earlier).record.result["scores"]["test"]["metrics"]
    after = result["scores"]["test"]["metrics"]
    for name in ("accuracy", "log_loss"):
        np.testing.assert_allclose(
            after[name]["estimate"], before[name]["estimate"], rtol=1e-3
        )
    again = run_trial(world.config(f"run.directory={directory}", *still))
    assert again == json.loads(json.dumps(result))


def test_a_pack_starts_each_trial_where_it_should(world, earlier):
    own = [
        read(world.config("optim.lr=1e-9", "optim.epochs=1", *more,
                          f"run.root={world.runs / 'warm_pack'}"))
        for more in ([f"delta.start={earlier}"], ["delta.rank=6"])
    ]  # fmt: skip
    warm, cold = run_pack(own, folder=world.runs / "warm_packs")
    loss = lambda result: result["scores"]["test"]["metrics"]["log_loss"]["estimate"]
    before = loss(load_run(earlier).record.result)
    np.testing.assert_allclose(loss(warm.result), before, rtol=1e-3)
    assert loss(cold.result) > before + 0.1


def test_it_is_part_of_the_trial_and_none_is_not(world, earlier):
    plain = world.config()
    without = json.loads(json.dumps(plain))
    del without["delta"]["start"]
    assert read(plain).trial_id == read(without).trial_id
    assert read(world.config(f"delta.start={earlier}")).trial_id != read(plain).trial_id


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["delta.rank=2"], "rank 4"),
        (["delta.targets='**/query/kernel'"], "which no rule adapts"),
        (["ranks=norm"], "ranks that stay"),
        (["delta.start=nowhere"], "adapter_model.safetensors"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_compiling(world, earlier, more, said):
    with pytest.raises(BadInput, match=said):
        prepare_pack([read(world.config(f"delta.start={earlier}", *more))])


def test_another_base_is_refused(world, earlier, tmp_path):
    other = write_base(tmp_path / "other", seed=5)
    given = world.config(f"delta.start={earlier}")
    given["base"]["source"] = str(other)
    with pytest.raises(BadInput, match=r"(?i)base"):
        prepare_pack([read(given)])


def test_another_adapter_of_the_same_name_is_another_start(world, earlier, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(earlier / "adapter", folder)
    settings = read(world.config(f"delta.start={folder}"))
    before = marks_of(settings)
    assert before == marks_of(read(world.config(f"delta.start={earlier}")))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert marks_of(settings) != before
    assert read(world.config()).trial_id != settings.trial_id


@pytest.mark.parametrize("name", ["classes", "pooling"])
def test_a_head_that_means_something_else_is_refused(world, earlier, monkeypatch, name):
    right = Labeled.shipping

    def other(self, settings):
        found = right(self, settings)
        changed = found.notes["classes"][::-1] if name == "classes" else "cls"
        return dataclasses.replace(found, notes={**found.notes, name: changed})

    monkeypatch.setattr(Labeled, "shipping", other)
    with pytest.raises(BadInput, match="its head would be read wrongly"):
        prepare_pack([read(world.config(f"delta.start={earlier}"))])
