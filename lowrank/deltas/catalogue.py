"""The deltas a config may name. A new one is one file, one line here, one table row."""

from lowrank.deltas.base import Delta
from lowrank.deltas.lora import LoRA
from lowrank.deltas.triplet import Triplet

CATALOGUE: dict[str, type[Delta]] = {
    "lora": LoRA,
    "triplet": Triplet,
}
