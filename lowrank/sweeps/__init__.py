"""Campaigns: many trials, grouped into packs, launched and read.

Reports are written by `lowrank.sweeps.report`, which loads what draws and tests; a
sweep itself does not wait for that.
"""

from lowrank.sweeps.launch import make_plan as make_plan
from lowrank.sweeps.load import Sweep as Sweep
from lowrank.sweeps.load import load_sweep as load_sweep
from lowrank.sweeps.plan import Packing as Packing
from lowrank.sweeps.results import send_summary as send_summary
from lowrank.sweeps.results import show_results as show_results
from lowrank.sweeps.results import write_results as write_results
from lowrank.sweeps.runner import run_plan as run_plan
