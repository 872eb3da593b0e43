"""Campaigns: many trials, grouped into packs, launched and read.

All but `Packing` is imported by its module: a run on its own does not wait for what
launches, reads and compares sweeps.
"""

from lowrank.sweeps.plan import Packing as Packing
