"""PEFT and transformers as arms of `bench.decoder`; nothing here imports JAX."""

from collections.abc import Mapping
from typing import Any

from experiments.bench.factors import draw_factors, draw_tokens
from experiments.bench.peers import require
from experiments.bench.setting import Setting
from experiments.bench.shapes import config_of

PREFIX = "base_model.model."


def _adapted(setting: Setting) -> tuple[Any, Any]:
    """(torch, the model under `get_peft_model` with the common factors)."""
    require()
    import peft
    import torch

    torch.set_num_threads(setting.num_threads)
    model = _base(setting, torch)
    config = peft.LoraConfig(
        r=setting.rank,
        # PEFT divides it as any number, whatever its annotation says.
        lora_alpha=setting.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    if setting.remat == "full":
        adapted.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        adapted.enable_input_require_grads()
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            down, up = (getattr(module, n).default.weight for n in ("lora_A", "lora_B"))
            own = name.removeprefix(PREFIX)
            a, b = draw_factors(setting, own, down.shape[1], up.shape[0])
            down.copy_(torch.from_numpy(a))
            up.copy_(torch.from_numpy(b.T.copy()))
    return torch, adapted


def _base(setting: Setting, torch: Any) -> Any:
    """The stored model, or one of a shape with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if not setting.model:
        return AutoModelForCausalLM.from_pretrained(
            setting.folder, attn_implementation="sdpa", dtype=torch.float32
        )
    fields = config_of(setting.model)
    fields.pop("model_type")
    with torch.device(_device(setting)):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(**fields),
            attn_implementation="sdpa",
            dtype=getattr(torch, setting.dtype),
        )


def _device(setting: Setting) -> str:
    return "cuda" if setting.device == "gpu" else "cpu"


class PeftDecoder:
    """A training step: the model's own loss, clipping, AdamW."""

    def __init__(self, setting: Setting):
        self._torch, self._model = _adapted(setting)
        self._model.train()
        ids = draw_tokens(setting, self._model.config.vocab_size)
        self._ids = self._torch.from_numpy(ids.astype("int64")).to(_device(setting))
        self._clip = setting.clip
        # As trainers do with a base in half precision: PEFT keeps factors in float32.
        self._casts = lambda: self._torch.autocast(
            _device(setting),
            dtype=getattr(self._torch, setting.dtype),
            enabled=setting.dtype != "float32",
        )
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = self._torch.optim.AdamW(
            self._trained, lr=setting.lr, weight_decay=0.0, fused=True
        )
        self.facts: Mapping[str, Any] = {
            "flops": None,
            "compile_seconds": None,
            "num_trained": sum(p.numel() for p in self._trained),
        }
        if setting.device == "gpu":
            self.peak_bytes = self._torch.cuda.max_memory_allocated

    def step(self) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        with self._casts():
            loss = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        return loss.item()


class CompiledPeftDecoder(PeftDecoder):
    """The same through `torch.compile`."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self._model = self._torch.compile(self._model)


class PeftSpeaker:
    """`generate` with merged weights, the likeliest token each time."""

    def __init__(self, setting: Setting):
        self._torch, adapted = _adapted(setting)
        self._model = adapted.merge_and_unload().eval()
        # No token ends a row: every arm says as many.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        ids = draw_tokens(setting, self._model.config.vocab_size)
        self._ids = self._torch.from_numpy(ids.astype("int64"))
        self._new = setting.seq
        self.facts: Mapping[str, Any] = {
            "flops": None,
            "compile_seconds": None,
            "num_trained": 0,
        }

    def step(self) -> float:
        with self._torch.inference_mode():
            found = self._model.generate(
                input_ids=self._ids,
                attention_mask=self._torch.ones_like(self._ids),
                max_new_tokens=self._new,
                do_sample=False,
            )
        if found.shape[1] != 2 * self._new:
            raise RuntimeError(f"{found.shape[1]} tokens instead of {2 * self._new}")
        return float(found[:, self._new].sum())
