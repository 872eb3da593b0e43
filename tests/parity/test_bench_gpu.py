"""The bench of large shapes runs at toy size, and its arms train alike."""

import json
import math

import jax
import numpy as np
import pytest

from experiments.bench import decoders, gpu
from experiments.bench.setting import Setting
from experiments.bench.shapes import config_of, model_flops
from lowrank.core.errors import UnknownName

pytestmark = pytest.mark.parity
TOY = {"model": "toy", "batch": 2, "seq": 16, "rank": 4}


@pytest.mark.parametrize("more", [(), ("--dtype", "float32", "--remat", "full")])
def test_it_runs_at_toy_size(tmp_path, capsys, more):
    out = tmp_path / "gpu.json"
    line = ["--device", "cpu", "--model", "toy", "--batch", "2", "--seq", "16"]
    line += ["--rank", "4", "--rounds", "2", "--steps", "2", "--out", str(out), *more]
    # Compiling for a CPU needs a C++ compiler, which a GPU does without.
    line += ["--arms", "decoder,decoder_peft"]
    assert gpu.main(line) == 0
    found = json.loads(out.read_text())
    assert found["failed"] == {}
    for arm in ("decoder", "decoder_peft"):
        losses = found["losses"][arm]
        assert abs(losses[0] - math.log(256)) < 0.1, "a model that knows nothing"
        assert losses[-1] < losses[0]
        assert all(seconds > 0 for seconds in found["seconds"][arm])
        assert found["peak_bytes"][arm] > 0
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "| lowrank |" in text
    assert "| PEFT |" in text


def test_an_arm_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch):
    real = gpu.Child

    def child(arm, *rest):
        if arm == "decoder_peft":
            raise gpu.LowrankError("bench: the arm ended with exit code -9")
        return real(arm, *rest)

    monkeypatch.setattr(gpu, "Child", child)
    line = ["--device", "cpu", "--model", "toy", "--batch", "2", "--seq", "16"]
    line += ["--rounds", "1", "--steps", "1", "--arms", "decoder,decoder_peft"]
    report = gpu.compare(gpu.parse(line))
    assert "exit code -9" in report["failed"]["decoder_peft"]
    assert "exit code -9" in gpu.table(report)
    assert "decoder" in report["seconds"]


def test_model_flops_are_those_of_the_step():
    """Of a step that computes nothing twice; the head's chunks and attention too."""
    setting = Setting(**TOY, dtype="float32")
    arm = decoders.Decoder(setting, decoders.drawn(setting))
    counted = arm.facts["flops"]()
    wanted = model_flops(config_of("toy"), 2, 16, 4)
    assert counted == pytest.approx(wanted, rel=0.1)


def test_weights_are_drawn_in_their_own_type():
    setting = Setting(**TOY, dtype="bfloat16")
    base = decoders.drawn(setting)
    leaves = jax.tree.leaves(base.params)
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
    kernel = np.asarray(base.params["decoder"]["layer"]["mlp"]["up"]["kernel"], "f4")
    assert kernel.std() == pytest.approx(0.02, rel=0.1)


def test_large_shapes_have_their_size():
    sizes = {"1b": 1.24e9, "8b": 8.03e9}
    for name, size in sizes.items():
        config = config_of(name)
        # Four FLOPs per weight and token, but for attention and factors.
        flops = model_flops(config, 1, 1, 1)
        assert flops / 4 == pytest.approx(size, rel=0.15), name


def test_a_shape_that_does_not_exist():
    with pytest.raises(UnknownName, match="'8b'"):
        config_of("8B")
