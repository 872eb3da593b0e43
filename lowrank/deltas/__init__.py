"""Deltas: recipes for a trainable change to one frozen weight."""

from lowrank.deltas.base import Call as Call
from lowrank.deltas.base import Delta as Delta
from lowrank.deltas.base import Site as Site
from lowrank.deltas.base import View as View
from lowrank.deltas.catalogue import CATALOGUE as CATALOGUE
from lowrank.deltas.lora import LoRA as LoRA
