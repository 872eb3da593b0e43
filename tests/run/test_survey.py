"""`experiments.sites`: what could be adapted in a base, for people and for programs."""

import importlib
import json
import sys

import numpy as np
import pytest
from tiny_hf import SPEC
from tiny_run import composed

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.core.errors import BAD_INPUT, BadInput, UnknownName
from lowrank.deltas.lora import LoRA
from lowrank.io import hub
from lowrank.run.survey import survey

QUERY, UP = (f"encoder/layer/{n}/kernel" for n in ("attention/query", "mlp/up"))
#: A user's own model, on images: plain JAX, and a loop without a known end.
OWN = """
import jax, jax.numpy as jnp
from lowrank.io.hub import Base

def apply(params, image):
    x = image.reshape(len(image), -1) @ params["up"]
    x = x @ jnp.sin(params["again"])
    return x * params["gain"][None]

def load(num_classes):
    params = {"up": jnp.ones((12, 5)), "again": jnp.ones((5, 5)),
              "gain": jnp.ones(5), "steps": jnp.arange(3)}
    shape = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    return Base("own", apply, apply, params, None, "own-1", 1, example=shape)

def silent(num_classes):
    base = load(num_classes)
    return Base("own", apply, apply, base.params, None, "own-1", 64)
"""


def config(world, *overrides):
    given = [f"base.source={world.base}", "rows=2", "tokens=8", *overrides]
    return composed("sites", *given)


@pytest.fixture(scope="module")
def found(world):
    return survey(config(world))


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "survey_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("survey_own", None)


def rows(found):
    return {row["path"]: row for row in found["weights"]}


def test_a_stacked_weight_is_told_with_its_axes_and_price(found):
    row = rows(found)[UP]
    layers, d_in, d_out = SPEC.num_layers, SPEC.d_model, SPEC.d_ff
    assert row["shape"] == [layers, d_in, d_out]
    assert row["axes"] == {"stack": [0], "in": [1], "out": [2]}
    assert row["dtype"] == "float32"
    assert (row["d_in"], row["d_out"], row["layers"]) == (d_in, d_out, layers)
    assert row["first_layer"] == "encoder/layer[0]/mlp/up/kernel"
    assert row["parameters"] == layers * d_in * d_out
    assert row["parameters_per_rank"] == layers * (d_in + d_out)
    assert row["flops_per_rank"] == 2 * 2 * 8 * layers * (d_in + d_out)
    assert row["largest_rank"] == d_in
    assert (row["adaptable"], row["obstacle"]) == (True, None)
    assert row["uses"] == [
        {
            "kind": "dot", "primitive": "dot_general", "trips": layers,
            "contracted": [1], "produced": [2], "batched": [],
            "flops_per_rank": row["flops_per_rank"],
        }
    ]  # fmt: skip


def test_what_is_said_to_fit_can_be_attached_and_nothing_else(world, found):
    base = hub.load(str(world.base), num_classes=2)
    example = {"ids": [[1, 2]], "mask": [[True, True]]}
    example = {name: np.asarray(x) for name, x in example.items()}
    for row in found["weights"]:
        rules = [Rule(row["path"], LoRA(), rank=1)]
        if row["adaptable"]:
            adapted = attach(base.apply, base.params, example, rules=rules)
            assert sum(adapted.ranks.values()) == row["layers"]
        else:
            with pytest.raises(BadInput):
                attach(base.apply, base.params, example, rules=rules)


def test_what_does_not_fit_says_why(found):
    told = rows(found)
    assert "feeds add" in told["encoder/layer/mlp/up/bias"]["obstacle"]
    assert "two or more axes" in told["head/bias"]["obstacle"]
    for path in ("encoder/layer/mlp/up/bias", "head/bias"):
        assert told[path]["adaptable"] is False
        assert told[path]["flops_per_rank"] is None
    word = told["encoder/embeddings/word/embedding"]
    assert [use["kind"] for use in word["uses"]] == ["gather"]
    assert word["first_layer"] is None


def test_an_unrolled_base_has_a_weight_per_layer(world):
    found = survey(config(world, "base.scan=false", "pattern='**/up/kernel'"))
    assert list(rows(found)) == [
        f"encoder/layer_{n}/mlp/up/kernel" for n in range(SPEC.num_layers)
    ]
    assert {row["layers"] for row in found["weights"]} == {1}


def test_the_schema_is_stable(found):
    """A key may be added; one that goes or changes raises SCHEMA."""
    assert found["schema"] == 1
    assert set(found) == {"schema", "base", "inputs", "pattern", "weights"}
    assert set(found["base"]) == {"name", "source", "fingerprint"}
    assert found["inputs"]["ids"] == {"shape": [2, 8], "dtype": "int32"}
    keys = {
        "path", "shape", "dtype", "parameters", "adaptable", "obstacle", "axes",
        "d_in", "d_out", "layers", "first_layer", "largest_rank",
        "parameters_per_rank", "flops_per_rank", "uses",
    }  # fmt: skip
    assert all(set(row) == keys for row in found["weights"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.usefixtures("own")
def test_a_base_of_the_users_own_is_traced_with_its_example():
    overrides = ["base.source='python:survey_own:load'"]
    found = survey(composed("sites", *overrides))
    told = rows(found)
    assert told["up"]["flops_per_rank"] == 2 * 2 * (12 + 5)
    assert told["again"]["obstacle"] == "feeds sin, which would need the dense weight"
    assert "real numbers" in told["steps"]["obstacle"]
    assert [x["shape"] for x in found["inputs"].values()] == [[2, 3, 4]]
    with pytest.raises(BadInput, match=r"cannot be traced.*example=\.\.\."):
        survey(composed("sites", "base.source='python:survey_own:silent'"))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["pattern='**/nothing'"], UnknownName, "matches none of"),
        (["pattern='**/layer[0]/**'"], BadInput, "leave the bracket out"),
        (["tokens=33"], BadInput, "33 tokens are more than 32"),
        (["rows=0"], BadInput, "rows must be at least 1"),
        (["format=xml"], BadInput, "format"),
        # Hydra takes the name of a group that exists; refusing it here is ours.
        (["+optim=adamw"], UnknownName, "no group 'optim'"),
        (["base.pooling=max"], BadInput, "pooling"),
    ],
)
def test_a_wrong_setting_is_refused(world, overrides, error, words):
    with pytest.raises(error, match=words):
        survey(config(world, *overrides))


@pytest.fixture
def call(world, monkeypatch, capfd):
    """Calls the door in this process: (exit code, stdout, stderr)."""

    def called(*arguments):
        main = importlib.import_module("experiments.sites").main
        monkeypatch.setattr(sys, "argv", ["sites", f"base={world.base}", *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return called


def test_json_on_stdout_is_nothing_but_json(call, found):
    code, out, said = call("format=json", "rows=2", "tokens=8")
    assert code == 0, said
    assert json.loads(out)["weights"] == found["weights"]


def test_a_message_about_tokens_is_not_taken_for_a_secret(call):
    code, _, said = call("tokens=33")
    assert code == BAD_INPUT
    assert "33 tokens are more than 32" in " ".join(said.split())


def test_the_table_shows_names_axes_uses_and_reasons(call):
    code, out, said = call("rows=2", "tokens=8")
    assert code == 0, said
    line = next(x for x in out.splitlines() if "encoder/layer[0]/mlp/up/kernel" in x)
    for part in ("3x24x40", "L in out", "dot_general x3", "24", "192"):
        assert part in line, part
    line = next(x for x in out.splitlines() if "layer/mlp/up/bias" in x)
    assert "feeds add" in line
    # 5 leaves of embeddings, 10 of attention, 6 of the MLP, 2 of the head; what fits is
    # 3 tables, 6 maps and the head's kernel.
    assert "10 of 23 weights fit" in out
    code, _, said = call("pattern=nothing", "tokens=8")
    assert code == BAD_INPUT
    assert "matches none" in said
