"""A run as one model: what is written is what the run computes, or it is refused."""

import json

import numpy as np
import pytest

from experiments.merge import main
from lowrank.core.errors import BadInput
from lowrank.io.hub import load
from lowrank.io.safetensors import Tensors
from lowrank.run.merging import in_its_unit, merge_run, write_merged
from lowrank.run.stored import load_run
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pooled(world):
    """A run whose head pools as BERT's own does."""
    directory = world.runs / "pooler"
    result = run_trial(
        world.config(
            "base.pooling=pooler", "optim.epochs=1", f"run.directory={directory}"
        )
    )
    return directory, result


def test_corrections_are_in_the_weights_and_the_head_beside_them(pooled, tmp_path):
    directory, result = pooled
    out = merge_run(
        {
            "run": {"directory": str(directory)},
            "merged": {"directory": str(tmp_path / "m")},
        }
    )
    run = load_run(directory)
    with Tensors(out) as stored:
        found = {name: stored.read(name) for name in stored.shapes}
    for path, site in run.adapted.sites.items():
        before = np.asarray(run.base.params)[()] if False else run.base.params
        for part in path.split("/"):
            before = before[part]
        own, dials = run.trained[path], run.dials[path]
        family = "bert.encoder.layer.{}.attention.self."
        if not path.endswith(("query/kernel", "value/kernel")):
            continue
        for layer in range(site.num_layers):
            a, b = np.asarray(own["a"][layer]), np.asarray(own["b"][layer])
            gate = np.asarray(dials["gate"][layer]) * float(dials["scale"])
            wanted = np.asarray(before[layer]) + (a.T * gate) @ b
            name = family.format(layer) + path.split("/")[-2] + ".weight"
            np.testing.assert_allclose(found[name].T, wanted, rtol=1e-5, atol=1e-6)
    head = run.trained["head/kernel"]
    np.testing.assert_array_equal(found["classifier.weight"].T, head)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert [*config["label2id"]] == list(run.classes) == result["data"]["classes"]
    assert config["id2label"]["1"] == run.classes[1]
    assert (out / "tokenizer.json").is_file()
    assert result["trial"] in (out / "README.md").read_text()


def test_it_is_a_base_for_the_next_run(pooled, tmp_path):
    """Its features are those of the run it came from."""
    run = load_run(pooled[0])
    out = write_merged(run, tmp_path / "m")
    again = load(str(out), num_classes=3, pooling="pooler")
    merged = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    batch = {"ids": np.array([[2, 7, 30, 3]]), "mask": np.ones((1, 4), bool)}
    np.testing.assert_allclose(
        again.features(again.params, batch),
        run.base.features(merged, batch),
        rtol=1e-6,
        atol=1e-6,
    )
    assert again.fingerprint != run.base.fingerprint


def test_what_transformers_has_no_class_for_is_refused(finished, tmp_path):
    out = tmp_path / "m"
    with pytest.raises(
        BadInput, match=r"pooling=pooler, and the run has 'mean'.*README"
    ):
        write_merged(load_run(finished[0]), out)
    assert not out.exists()


def test_what_is_there_is_not_written_over(pooled, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("mine")
    line = [f"run.directory={pooled[0]}", f"merged.directory={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["merge", *line])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


def test_a_field_that_does_not_exist_is_named(pooled):
    with pytest.raises(BadInput, match="'directory'"):
        merge_run({"run": {"directory": "x"}, "merged": {"directry": "y"}})


def test_a_head_says_numbers_in_their_own_unit():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=n) for n in ((5, 4), (4, 1), 1))
    facts = {"scale": 160.0, "mean": 1200.0}
    own = in_its_unit({"kernel": kernel, "bias": bias}, facts)
    wanted = (x @ kernel + bias) * 160 + 1200
    np.testing.assert_allclose(x @ own["kernel"] + own["bias"], wanted, rtol=1e-12)
