"""Arm E: the grid in one process of PEFT and torch, trial after trial."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import peers
from experiments.bench.grid import Grid
from lowrank.train.optim import AdamW

ARRAYS = "batches.npz"


def run(grid: Grid, base: str, num_threads: int, num_classes: int) -> dict[str, Any]:
    """Trains the grid on the batches that the other arms see."""
    peers.require()
    import peft
    import torch
    from transformers import BertModel

    torch.set_num_threads(num_threads)
    with np.load(Path(grid.folder) / ARRAYS) as archive:
        arrays = {
            name: torch.from_numpy(
                archive[name].astype("float32" if "weight" in name else "int64")
            )
            for name in archive.files
        }
    encoder: Any = BertModel.from_pretrained(
        base, add_pooling_layer=False, attn_implementation="sdpa"
    )
    width = encoder.config.hidden_size
    found, losses = [], []
    for cell in grid.cells:
        rank, seed = int(cell["rank"]), int(cell["seed"])
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=rank, lora_alpha=16, target_modules=list(peers.THEIRS.values())
        )
        model = peft.get_peft_model(encoder, config).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        layers: Any = encoder.encoder.layer
        for layer in layers:
            layer.attention.self.dropout_prob = 0.0
        head = torch.nn.Linear(width, num_classes)
        trained = [p for m in (model, head) for p in m.parameters() if p.requires_grad]
        # As `optim: adamw`: its betas, no decay, a warm-up and a line down to zero.
        optimizer = torch.optim.AdamW(
            trained, lr=cell["lr"], weight_decay=0.0, fused=True
        )
        steps = len(arrays[f"{seed}/ids"])
        warm = int(AdamW().warmup * steps)
        rate = lambda t, w=warm, n=steps: (
            (t + 1) / w if t < w else 1 - (t - w) / max(n - w, 1)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        loss: Any = None
        for step in range(steps):
            ids, mask, label = (
                arrays[f"{seed}/{name}"][step] for name in ("ids", "mask", "label")
            )
            optimizer.zero_grad(set_to_none=True)
            logits = head(_pooled(model, ids, mask))
            loss = torch.nn.functional.cross_entropy(logits, label)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            # As the other arms, which watch the loss of every step.
            loss.item()
        losses.append(float(loss))
        found.append(_validate(torch, model, head, arrays))
        encoder = model.unload()
    return {"results": found, "losses": losses}


def _pooled(model: Any, ids: Any, mask: Any) -> Any:
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask[:, :, None].to(hidden.dtype)
    return (hidden * real).sum(dim=1) / real.sum(dim=1)


def _validate(torch: Any, model: Any, head: Any, arrays: dict) -> dict[str, float]:
    model.eval()
    correct = total = lost = 0.0
    number = 0
    with torch.no_grad():
        while f"validation/{number}/ids" in arrays:
            ids, mask, label, weight = (
                arrays[f"validation/{number}/{name}"]
                for name in ("ids", "mask", "label", "weight")
            )
            log_p = head(_pooled(model, ids, mask)).log_softmax(dim=-1)
            picked = log_p.gather(1, label[:, None])[:, 0]
            lost -= float((picked * weight).sum())
            correct += float(((log_p.argmax(dim=-1) == label) * weight).sum())
            total += float(weight.sum())
            number += 1
    found = {"accuracy": correct / total, "log_loss": lost / total}
    assert all(math.isfinite(value) for value in found.values())
    return found


def main() -> None:
    """Reads a grid from the command line and prints the outcome as one line of JSON."""
    grid, base, threads, classes = sys.argv[1:5]
    found = run(Grid(**json.loads(grid)), base, int(threads), int(classes))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
