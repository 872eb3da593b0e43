"""AdaLoRA as published, as a run: trained, saved, and opened again."""

import numpy as np
import pytest
from tiny_run import metric_rows

from lowrank.io.bert import family_of
from lowrank.io.peft import read_adapter
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_adalora_as_published_is_a_run_like_others(world):
    given = [
        "delta=triplet", "ranks=adalora", "penalty.orthogonality=0.1", "ranks.begin=1",
        "ranks.end=11", "ranks.every=3", "loop.log_every=1",
    ]  # fmt: skip
    result = run_trial(world.config(*given), given)
    directory = world.runs / result["trial"]
    run = load_run(directory)
    budget = 8 * sum(site.num_layers for site in run.adapted.sites.values())
    assert run.ranks.budget["used"].iloc[-1] == budget
    assert sum(run.ranks.final.values()) == budget
    told = metric_rows(directory)
    assert all(np.isfinite(row["train/loss"]) for row in told if "train/loss" in row)
    assert any(row.get("train/penalty/orthogonality", 0) > 0 for row in told)
    # What PEFT is given, b^T diag(lambda) a of open components, is what was trained.
    stored, saved = run.trained, read_adapter(directory / "adapter").corrections
    family, seen = family_of(run.base.hf_config, "base"), 0
    for path, dials in run.dials.items():
        f = {n: np.asarray(x, np.float64) for n, x in stored[path].items()}
        c = np.asarray(dials["gate"]) * np.asarray(dials["scale"]) * f["diagonal"]
        for layer, gate in enumerate(np.asarray(dials["gate"])):
            module = family.module(path, layer, prefix="bert.")
            assert (module in saved) == bool(gate.any())
            if module not in saved:
                continue
            seen += 1
            one = saved[module]
            a, b = (f[n][layer].reshape(len(gate), -1) for n in ("a", "b"))
            np.testing.assert_allclose(
                one.scale * np.asarray(one.a).T @ np.asarray(one.b),
                np.einsum("r,ri,ro->io", c[layer], a, b),
                atol=1e-6,
            )
    assert seen == len(saved) > 0
