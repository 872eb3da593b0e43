"""Campaigns: many trials, grouped into packs and launched."""

from lowrank.sweeps.launch import Packing as Packing
from lowrank.sweeps.launch import make_plan as make_plan
from lowrank.sweeps.launch import run_plan as run_plan
