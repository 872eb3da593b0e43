"""A cut adapter is the nearest one: NumPy's dense SVD is the oracle."""

import json

import numpy as np
import pytest
from tiny_run import composed

from lowrank.core.errors import BadInput
from lowrank.io.adapter import Adapter, Correction
from lowrank.io.peft import read_adapter, write_adapter
from lowrank.run.stored import load_run, predict
from lowrank.run.trial import run_trial
from lowrank.run.truncation import truncate_run, truncated

RANKS = {"layer.0.query": 4, "layer.1.query": 3, "layer.1.down": 5}


def adapter(scale=-0.5):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return Adapter(
        {
            module: Correction(draw(rank, 12), draw(rank, 9), scale * (n + 1))
            for n, (module, rank) in enumerate(RANKS.items())
        },
        {"head.weight": draw(3, 9)},
    )


def dense(one):
    return one.scale * one.a.T.astype(np.float64) @ one.b


@pytest.mark.parametrize("scale", [-0.5, 2.0])
def test_a_rank_leaves_the_nearest_matrix_of_that_rank(scale):
    whole = adapter(scale)
    cut, kept = truncated(whole, rank=2)
    left = there = 0.0
    for module, one in cut.corrections.items():
        u, s, v = np.linalg.svd(dense(whole.corrections[module]))
        np.testing.assert_allclose(dense(one), u[:, :2] * s[:2] @ v[:2], atol=1e-5)
        assert one.rank == 2
        # Balanced: neither factor is larger than the other.
        np.testing.assert_allclose(
            np.square(one.a).sum(), np.square(one.b).sum(), rtol=1e-5
        )
        left, there = left + (s[:2] ** 2).sum(), there + (s**2).sum()
    assert kept == pytest.approx(left / there)
    assert cut.whole is whole.whole


def test_a_budget_goes_to_the_largest_of_all_modules():
    whole = adapter()
    cut, _ = truncated(whole, budget=5)
    values = {
        m: np.linalg.svd(dense(one), compute_uv=False)[: one.rank]
        for m, one in whole.corrections.items()
    }
    least = np.sort(np.concatenate([*values.values()]))[-5]
    wanted = {m: int((s >= least).sum()) for m, s in values.items()}
    found = {m: one.rank for m, one in cut.corrections.items()}
    assert found == {m: n for m, n in wanted.items() if n}
    assert sum(found.values()) == 5
    # No other choice of five components is nearer.
    squares = sum((s[: wanted[m]] ** 2).sum() for m, s in values.items())
    assert squares == pytest.approx(
        np.sort(np.concatenate([*values.values()]) ** 2)[-5:].sum()
    )


def given(**fields):
    return composed("truncate", *(f"truncate.{k}={v}" for k, v in fields.items()))


@pytest.mark.long
def test_a_finished_run_is_cut_and_trained_on(world, finished, tmp_path):
    directory, _ = finished
    out = tmp_path / "cut"
    told = truncate_run(given(adapter=directory, rank=2, directory=out))
    assert told["components"]["after"] == 2 * len(told["ranks"])
    assert {*told["ranks"].values()} == {2}
    assert 0 < told["kept"] < 1
    before, after = read_adapter(directory / "adapter"), read_adapter(out)
    assert after.notes["base_fingerprint"] == before.notes["base_fingerprint"]
    assert after.config["task_type"] == before.config["task_type"]
    for name, array in before.whole.items():
        np.testing.assert_array_equal(after.whole[name], array)
    assert "cut by singular values" in (out / "README.md").read_text()
    # It is where another run may start, and does at its first step.
    own = ("delta=lora", "delta.rank=2", f"delta.start={out}", "optim.lr=1e-9")
    where = world.runs / "trained_on"
    result = run_trial(world.config(*own, "optim.epochs=1", f"run.directory={where}"))
    assert result["scores"]["test"]["num_rows"]
    (said,) = predict(load_run(where), ["word1 cat word2"])
    assert said["label"] in ("animal", "color", "weather")
    again = read_adapter(where / "adapter")
    for module, one in after.corrections.items():
        found = again.corrections[module]
        np.testing.assert_allclose(dense(found), dense(one), atol=1e-5)


def test_what_cannot_be_cut_is_refused_and_nothing_is_written(tmp_path):
    folder = tmp_path / "adapter_there"
    write_adapter(folder, adapter(), base="b", card="c")
    out = tmp_path / "out"
    for fields, said in (
        ({}, "give one of them"),
        ({"rank": 2, "budget": 3}, "give one of them"),
        ({"rank": 0}, "must be at least 1"),
        ({"rank": 5}, "truncate.rank = 5 cuts nothing: there are 5"),
        ({"budget": 12}, "truncate.budget = 12 cuts nothing: there are 12"),
    ):
        with pytest.raises(BadInput, match=said):
            truncate_run(given(adapter=folder, directory=out, **fields))
    with pytest.raises(BadInput, match="has no adapter_model"):
        truncate_run(given(adapter=tmp_path, directory=out, rank=2))
    assert not out.exists()
    with pytest.raises(BadInput, match="is not empty"):
        truncate_run(given(adapter=folder, directory=folder, rank=2))
    assert json.loads((folder / "adapter_config.json").read_text())["r"]
