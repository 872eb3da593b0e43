"""Our Vision Transformers equal those of transformers, adapted ones those of PEFT."""

import json
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
import torch
from lora_pair import distance
from onnx import reference
from peft import PeftModel
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule, Train
from lowrank.deltas.lora import LoRA
from lowrank.io import sources, vit
from lowrank.io.adapter import collect, spread
from lowrank.io.hub import load
from lowrank.io.keymaps import stacked_path
from lowrank.io.peft import read_adapter, write_adapter
from lowrank.models.vision import Classifier

pytestmark = pytest.mark.parity

CLASSES = 5
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 40,
    "patch_size": 8,
    # Far from the 0.02 of a fresh model, so that attention is far from uniform.
    "initializer_range": 0.3,
}
PREPARED = {"size": 40, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIDES = [(40, 40), (24, 24), (64, 64), (40, 24), (16, 88)]


def vit_config(**more):
    return ViTConfig(**TINY, intermediate_size=48, num_labels=CLASSES, **more)


def dinov2_config(**more):
    return Dinov2Config(**TINY, mlp_ratio=2, num_labels=CLASSES, **more)


MODELS = {
    "vit": lambda **more: ViTModel(vit_config(**more)),
    "dinov2": lambda **more: Dinov2Model(dinov2_config(**more)),
}
TASKS = {
    "vit": (lambda: ViTForImageClassification(vit_config()), "cls"),
    "dinov2": (lambda: Dinov2ForImageClassification(dinov2_config()), "both"),
}


def saved(model, folder, seed=0):
    """A model with vectors that are no zeros and ones, written by transformers."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    (folder / vit.PREPARATION).write_text(json.dumps(PREPARED))
    return model


def pixels(height, width, rows=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, height, width, 3)).astype(np.float32)


def theirs(model, x, kind):
    """Of an opened PEFT model or a plain one, whatever it returns."""
    flags = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        return model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), **flags)


def hidden(base, x, **options):
    model = Classifier(base.spec, 2, precision="highest", **options)
    return model.apply({"params": base.params}, {"pixels": x}, method="hidden")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_hidden_states_of_a_random_vision_transformer(tmp_path, kind, bias, scan):
    torch.manual_seed(0)
    model = saved(MODELS[kind](qkv_bias=bias), tmp_path)
    base = load(str(tmp_path), num_classes=2, scan=scan)
    for height, width in SIDES:
        x = pixels(height, width)
        want = theirs(model, x, kind).last_hidden_state.numpy()
        assert np.std(want) > 0.3
        np.testing.assert_allclose(hidden(base, x, scan=scan), want, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_logits_of_a_random_image_classifier(tmp_path, kind):
    torch.manual_seed(1)
    made, pooling = TASKS[kind]
    model = saved(made(), tmp_path)
    base = load(str(tmp_path), num_classes=CLASSES, pooling=pooling)
    head = {
        "kernel": model.classifier.weight.detach().numpy().T,
        "bias": model.classifier.bias.detach().numpy(),
    }
    x = pixels(40, 40)
    got = base.apply({**base.params, "head": head}, {"pixels": x})
    want = theirs(model, x, kind).logits.numpy()
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_our_tensors_are_a_checkpoint_for_transformers(tmp_path, kind):
    torch.manual_seed(2)
    model = saved(MODELS[kind](), tmp_path)
    base = load(str(tmp_path), num_classes=2)
    tensors = vit.tensors_of(vit.KINDS[kind], base.params, base.spec, prefix="")
    ours = {n: torch.tensor(x) for n, x in tensors.items() if "classifier" not in n}
    found = {n: p for n, p in model.state_dict().items() if n in ours}
    assert set(ours) == set(found)
    left = {n.split(".")[0] for n in set(model.state_dict()) - set(found)}
    assert left <= {"pooler", "embeddings"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", sorted(TASKS))
def test_peft_opens_our_folder_and_gives_our_logits(tmp_path, kind, scan):
    torch.manual_seed(3)
    made, pooling = TASKS[kind]
    folder = tmp_path / "base"
    saved(made(), folder)
    base = load(str(folder), num_classes=CLASSES, pooling=pooling, scan=scan)
    inputs = {"pixels": pixels(24, 24)}
    layer = "layer[0]" if scan else "layer_0"
    rules = [
        Train("head/**", init="dense"),
        Rule(f"**/{layer}/**/query/kernel", LoRA(alpha=6.0), rank=2),
        Rule("**/{query,key,value,output,up,down}/kernel", LoRA(alpha=6.0), rank=3),
    ]
    adapted = attach(base.apply, base.params, inputs, rules=rules)
    frozen, start = adapted.init(jax.random.key(0))
    trained = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), start
    )
    ours = adapted.apply(frozen, trained, inputs)
    assert distance(ours, adapted.apply(frozen, start, inputs)) > 0.1
    family = vit.KINDS[kind]

    def module_of(path, layer):
        stacked, own = stacked_path(path)
        return family.module(stacked, own if layer is None else layer)

    adapter = collect(trained, adapted.dials(), module_of)
    write_adapter(tmp_path / "a", adapter, base=str(folder), card="test")
    model = AutoModelForImageClassification.from_pretrained(folder)
    opened = PeftModel.from_pretrained(model, tmp_path / "a").eval()
    want = theirs(opened, inputs["pixels"], kind).logits
    assert distance(ours, want) <= 1e-5
    opened.save_pretrained(tmp_path / "b")
    kernel = lambda module: family.kernel(module, scan=scan)
    back, dials = spread(read_adapter(tmp_path / "b"), trained, adapted.dials(), kernel)
    again = adapted.apply(frozen, back, inputs, dials=dials)
    assert distance(again, ours) <= 1e-5


def test_the_converted_base_gives_what_its_graph_gives():
    """Against the reference evaluator of ONNX, at the size that the graph is for."""
    base = load("vit", num_classes=2)
    _, provenance = sources.locate("vit")
    cache = Path(sources.cache_folder())
    file = cache / provenance["package"].replace("==", "-") / "model.onnx"
    model = onnx.load(str(file))
    name = "/backbone/layernorm/Add_1_output_0"
    last = next(n for n, node in enumerate(model.graph.node) if name in node.output)
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
    x = pixels(224, 224, rows=1)
    run = reference.ReferenceEvaluator(model)
    (want,) = run.run(None, {"input_image": x.transpose(0, 3, 1, 2)})
    assert np.std(want) > 0.3
    np.testing.assert_allclose(hidden(base, x), want, atol=1e-3)
