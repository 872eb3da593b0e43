"""What an adapter_config.json of PEFT says, and how ours is put.

A module's scale is alpha / r, or alpha / sqrt(r) with `use_rslora`, of *its own* alpha
and r, which two tables of patterns may give. The scale itself is not stored.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.io.adapter import Adapter

MOST_RANK = 65_536
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_NOTHING = (None, False, [], {}, "")
#: Options that are read below, or that decide nothing once the factors are there.
_KNOWN = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern"),
        *("alpha_pattern", "target_modules", "modules_to_save", "init_lora_weights"),
        *("base_model_name_or_path", "revision", "task_type", "auto_mapping"),
        *("peft_version", "inference_mode", "lora_dropout", "runtime_config"),
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
        *("megatron_core", "qalora_group_size", "eva_config", "corda_config"),
        *("loftq_config", "lora_ga_config", "ensure_weight_tying"),
        # How GPT-2's base is stored; the factors are the same.
        "fan_in_fan_out",
    )
)
#: Starts that leave the base as it is; the others need another base than the one named.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def config_of(
    adapter: Adapter, base: str, task_type: str | None, dropout: float
) -> dict[str, Any]:
    """The adapter_config.json from which PEFT computes every module's own scale.

    Names in patterns are escaped and anchored at both ends: each means one module.
    """
    ranks = {module: one.rank for module, one in adapter.corrections.items()}
    alphas = {
        module: _alpha(one.scale, one.rank, adapter.rsqrt)
        for module, one in adapter.corrections.items()
    }
    rank, alpha = (Counter(d.values()).most_common(1)[0][0] for d in (ranks, alphas))
    odd = lambda values, usual: {
        f"^{re.escape(module)}$": value
        for module, value in values.items()
        if value != usual
    }
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": odd(ranks, rank),
        "alpha_pattern": odd(alphas, alpha),
        "use_rslora": adapter.rsqrt,
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({t.rpartition(".")[0] for t in adapter.whole})
        or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _divisor(rank: int, rsqrt: bool) -> float:
    return math.sqrt(rank) if rsqrt else float(rank)


def _alpha(scale: float, rank: int, rsqrt: bool) -> float:
    """The alpha that gives `scale`: the round one, where that is the same float32."""
    alpha = scale * _divisor(rank, rsqrt)
    short = round(alpha, 4)
    same = float(np.float32(short / _divisor(rank, rsqrt))) == scale
    if not same:
        return alpha
    return int(short) if short.is_integer() else short


def check_options(config: Mapping[str, Any], where: Path) -> None:
    """Refuses what would make the adapter compute something else than we do.

    Raises:
      BadInput: Another method than LoRA, an option of another value than its plain
        one, an option of unknown meaning, a start that changes the base, or a field of
        a wrong type.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"{where} is of peft_type {kind!r}; only LORA is read")
    extra = {name: value for name, value in config.items() if name not in _KNOWN}
    if extra.get("bias") == "none":
        del extra["bias"]
    for name, value in extra.items():
        if value not in _NOTHING:
            raise BadInput(
                f"{where} sets {name} = {value!r}, which may change what the "
                "adapter computes and is not supported; merge it with PEFT instead"
            )
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise BadInput(
            f"{where} was started with init_lora_weights = {init!r}, which changes "
            "the base; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    kinds = {
        "use_rslora": (bool, type(None)),
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
        "modules_to_save": (list, type(None)),
        "target_modules": (list, str, type(None)),
    }
    for name, allowed in kinds.items():
        value = config.get(name)
        texts = value if isinstance(value, list | dict) else ()
        if not isinstance(value, allowed) or not all(isinstance(t, str) for t in texts):
            raise BadInput(f"{where}: {name} = {value!r} has a wrong type")


def rank_and_scale(
    config: Mapping[str, Any], module: str, where: Path
) -> tuple[int, float]:
    """A module's rank and scale.

    Raises:
      BadInput: One of them is no number in range, or a pattern is no name.
    """
    rank = _by_pattern(config, "rank_pattern", module, config.get("r", 8), where)
    alpha = _by_pattern(
        config, "alpha_pattern", module, config.get("lora_alpha", 8), where
    )
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise BadInput(f"{where}: rank {rank!r} of {module} is no whole number above 0")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise BadInput(f"{where}: alpha {alpha!r} of {module} is no finite number")
    return rank, alpha / _divisor(rank, bool(config.get("use_rslora")))


def _by_pattern(
    config: Mapping[str, Any], table: str, module: str, usual: Any, where: Path
) -> Any:
    """PEFT's rule: the first key that matches the end of the name, segments whole.

    There a key is a regular expression. A program in a file is not run here: names
    are understood, escaped and anchored or not, and anything else is refused.
    """
    for key, value in (config.get(table) or {}).items():
        plain = key.removeprefix("^")
        name = re.sub(r"\\([.\-])", r"\1", plain.removesuffix("$"))
        if not _NAME.fullmatch(name):
            raise BadInput(
                f"{where}: {table} has the key {key!r}, which is no module name; write "
                "one key per module"
            )
        if module == name or (plain == key and module.endswith("." + name)):
            return value
    return usual
