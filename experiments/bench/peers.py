"""PEFT on torch: the same weights, batch and start in the library most people use.

Nothing here imports JAX: two thread pools in one process disturb each other, and what
the process holds in memory shall be torch's alone.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from experiments.bench.setting import Setting, draw_batch, draw_start
from lowrank.core.errors import BadInput

NEEDED = ("torch", "transformers", "peft")
#: PEFT's name of each linear map, within a layer.
THEIRS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def require() -> None:
    """Checks that the peers are installed.

    Raises:
      BadInput: One is not.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"bench: the arm 'peft' needs {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'lowrank[parity]' (or `make bench`), or choose other arms "
            "with --arms"
        )


class Peft:
    """BertModel under `get_peft_model`, mean pooling, a linear head, AdamW."""

    def __init__(self, setting: Setting):
        require()
        import peft
        import torch
        from transformers import BertModel

        torch.set_num_threads(setting.num_threads)
        torch.manual_seed(setting.seed)
        self._torch = torch
        encoder = BertModel.from_pretrained(
            setting.folder, add_pooling_layer=False, attn_implementation="sdpa"
        )
        shape = encoder.config
        config = peft.LoraConfig(
            r=setting.rank,
            # PEFT divides it as any number, whatever its annotation says.
            lora_alpha=setting.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=0.0,
            target_modules=list(THEIRS.values()),
        )
        self._encoder = peft.get_peft_model(encoder, config).train()
        # The base's own dropout is off in all arms: it is no part of the method.
        for module in self._encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        layers: Any = encoder.encoder.layer
        for layer in layers:
            layer.attention.self.dropout_prob = 0.0
        self._head = torch.nn.Linear(shape.hidden_size, setting.num_classes)
        start = draw_start(
            setting,
            shape.num_hidden_layers,
            shape.hidden_size,
            shape.intermediate_size,
        )
        self._fill(start)
        batch = draw_batch(setting, shape.vocab_size)
        self._batch = {
            name: torch.from_numpy(batch[name][0].astype("int64"))
            for name in ("ids", "mask", "label")
        }
        self._clip = setting.clip
        self._trained = [
            p
            for module in (self._encoder, self._head)
            for p in module.parameters()
            if p.requires_grad
        ]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=setting.lr, weight_decay=0.0, fused=True
        )
        self.facts: Mapping[str, Any] = {
            "flops": None,
            "compile_seconds": None,
            "temp_bytes": None,
            "num_trained": sum(p.numel() for p in self._trained),
        }

    def _fill(self, start: Mapping[str, Any]) -> None:
        torch = self._torch
        filled = set()
        with torch.no_grad():
            for name, module in self._encoder.named_modules():
                if not hasattr(module, "lora_A"):
                    continue
                _, _, inside = name.partition(".layer.")
                layer, _, own = inside.partition(".")
                (ours,) = (k for k, theirs in THEIRS.items() if own == theirs)
                factors = start[ours]
                a, b = (factors[part][int(layer)] for part in ("a", "b"))
                module.lora_A.default.weight.copy_(torch.from_numpy(a))
                module.lora_B.default.weight.copy_(torch.from_numpy(b.T.copy()))
                filled.add(inside)
            kernel, bias = start["head"]["kernel"], start["head"]["bias"]
            self._head.weight.copy_(torch.from_numpy(kernel.T.copy()))
            self._head.bias.copy_(torch.from_numpy(bias))
        wanted = sum(len(start[name]["a"]) for name in THEIRS)
        if len(filled) != wanted:
            raise BadInput(f"bench: PEFT adapted {len(filled)} maps, not {wanted}")

    def loss(self) -> Any:
        """Mean cross-entropy, with its graph."""
        batch = self._batch
        hidden = self._encoder(
            input_ids=batch["ids"], attention_mask=batch["mask"]
        ).last_hidden_state
        real = batch["mask"][:, :, None].to(hidden.dtype)
        pooled = (hidden * real).sum(dim=1) / real.sum(dim=1)
        return self._torch.nn.functional.cross_entropy(
            self._head(pooled), batch["label"]
        )

    def step(self) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        return loss.item()
