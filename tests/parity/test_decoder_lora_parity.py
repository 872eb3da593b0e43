"""LoRA on decoders equals PEFT's: outputs, gradients, and files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_pair import batch_of, made, tokenizer_beside
from lora_pair import distance
from peft import LoraConfig, PeftModel, get_peft_model

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA
from lowrank.io.adapter import collect, spread
from lowrank.io.keymaps import stacked_path
from lowrank.io.language import load
from lowrank.io.peft import read_adapter, write_adapter

pytestmark = pytest.mark.parity

RANK, ALPHA = 3, 12.0
#: float32 sums of a few hundred terms in another order, relative to the array's norm.
TOLERANCE = 1e-5
#: Family -> the modules that PEFT adapts, and our pattern of the same.
TARGETS = {
    "llama": ("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", "**/kernel"),
    "qwen3": ("q_proj v_proj down_proj", "**/{query,value,down}/kernel"),
    "gemma2": ("q_proj k_proj o_proj up_proj", "**/{query,key,output,up}/kernel"),
    "gpt2": ("c_attn c_fc", "**/{qkv,up}/kernel"),
}


@pytest.fixture(params=TARGETS)
def pair(request, tmp_path):
    """PEFT's model with random factors, its folder, and ours with the same."""
    modules, pattern = TARGETS[request.param]
    original = made(request.param, tmp_path)
    tokenizer_beside(tmp_path)
    torch.manual_seed(1)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=modules.split(), task_type="CAUSAL_LM",
        fan_in_fan_out=request.param == "gpt2", init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(original, config).eval()
    base = load(str(tmp_path), precision="highest")
    rules = [Rule(f"decoder/{pattern}", LoRA(alpha=ALPHA), rank=RANK)]
    batch = {name: jnp.asarray(x) for name, x in batch_of().items()}
    adapted = attach(base.apply, base.params, batch, rules=rules)
    theirs.save_pretrained(tmp_path / "adapter")
    frozen, like = adapted.init(jax.random.key(0))
    trained, dials = spread(
        read_adapter(tmp_path / "adapter"), like, adapted.dials(), base.family.kernel
    )
    return theirs, base, adapted, frozen, trained, dials, tmp_path


def test_outputs_and_gradients(pair):
    theirs, base, adapted, frozen, trained, dials, _ = pair
    batch = batch_of()
    inputs = {
        "input_ids": torch.from_numpy(batch["ids"]).long(),
        "attention_mask": torch.from_numpy(batch["mask"]).long(),
    }
    logits = theirs(**inputs).logits
    mask = torch.from_numpy(batch["mask"])
    torch.sum(torch.cos(logits[mask])).backward()

    def total(trained):
        found = adapted.apply(frozen, trained, batch, dials=dials)
        kept = jnp.where(jnp.asarray(batch["mask"])[..., None], jnp.cos(found), 0.0)
        return jnp.sum(kept), found

    grads, found = jax.jit(jax.grad(total, has_aux=True))(trained)
    real = batch["mask"]
    assert distance(np.asarray(found)[real], logits.detach().numpy()[real]) <= TOLERANCE
    units = {
        path: {"gate": np.ones(own["gate"].shape), "scale": 1.0}
        for path, own in dials.items()
    }
    ours = collect(grads, units, module_of(base)).corrections
    seen = 0
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        module, kind = name.removeprefix("base_model.model.").split(".lora_")
        one = ours[module]
        grad = one.a if kind.startswith("A") else one.b.T
        # Through a few nonlinear layers, errors grow a little.
        assert distance(grad, parameter.grad) <= 10 * TOLERANCE, name
        seen += 1
    assert seen == 2 * len(ours)


def module_of(base):
    def name(path, layer):
        stacked, own = stacked_path(path)
        return base.family.module(stacked, own if layer is None else layer)

    return name


def test_an_adapter_of_ours_is_opened_by_peft(pair):
    theirs, base, adapted, frozen, trained, dials, folder = pair
    moved = jax.tree.map(lambda x: 1.1 * x + 0.01, trained)
    write_adapter(
        folder / "ours",
        collect(moved, dials, module_of(base)),
        base=str(folder),
        card="",
        task_type="CAUSAL_LM",
    )
    plain = theirs.unload()
    opened = PeftModel.from_pretrained(plain, folder / "ours").eval()
    batch = batch_of()
    with torch.no_grad():
        want = opened(
            input_ids=torch.from_numpy(batch["ids"]).long(),
            attention_mask=torch.from_numpy(batch["mask"]).long(),
        ).logits.numpy()
    found = np.asarray(adapted.apply(frozen, moved, batch, dials=dials))
    assert distance(found[batch["mask"]], want[batch["mask"]]) <= TOLERANCE
