"""Assembly: a config or a few calls, turned into a finished run."""

from lowrank.run.fit import Fit as Fit
from lowrank.run.fit import fit as fit
from lowrank.run.settings import Settings as Settings
from lowrank.run.settings import read as read
from lowrank.run.stored import Run as Run
from lowrank.run.stored import load_run as load_run
from lowrank.run.stored import predict as predict
from lowrank.run.trial import run_trial as run_trial
