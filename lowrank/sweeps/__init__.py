"""Campaigns: many trials, grouped into packs, launched and read."""

from lowrank.sweeps.launch import make_plan as make_plan
from lowrank.sweeps.load import Sweep as Sweep
from lowrank.sweeps.load import load_sweep as load_sweep
from lowrank.sweeps.plan import Packing as Packing
from lowrank.sweeps.report import write_report as write_report
from lowrank.sweeps.results import send_summary as send_summary
from lowrank.sweeps.results import show_results as show_results
from lowrank.sweeps.results import write_results as write_results
from lowrank.sweeps.runner import run_plan as run_plan
