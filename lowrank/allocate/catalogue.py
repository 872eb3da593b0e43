"""The allocators a config may name. A new one is one class and one line here."""

from lowrank.allocate.adaptive import Adaptive, Allocator
from lowrank.allocate.fixed import Given, Ramp, Shuffled, Uniform
from lowrank.allocate.recipes import (
    EVA,
    AdaLoRA,
    EffectiveRank,
    Fisher,
    Growth,
    Norm,
    Random,
    Squeeze,
)

CATALOGUE: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "given": Given,
    "ramp": Ramp,
    "shuffled": Shuffled,
    "random": Random,
    "adaptive": Adaptive,
    "fisher": Fisher,
    "norm": Norm,
    "squeeze": Squeeze,
    "adalora": AdaLoRA,
    "eva": EVA,
    "growth": Growth,
    "effective_rank": EffectiveRank,
}
