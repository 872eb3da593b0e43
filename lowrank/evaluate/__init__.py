"""Judging a finished system: scores and their intervals.

The modules `compare` (arms over seeds) and `probe` (the frozen probe) are not loaded
here: a training command would wait more than a second for libraries that it never asks.
`score.compare` (two systems on one split) has the name of a module, and stays there.
"""

from lowrank.evaluate.metrics import STANDARD as STANDARD
from lowrank.evaluate.metrics import Metric as Metric
from lowrank.evaluate.metrics import Rows as Rows
from lowrank.evaluate.metrics import Tally as Tally
from lowrank.evaluate.metrics import metric_values as metric_values
from lowrank.evaluate.score import Predictions as Predictions
from lowrank.evaluate.score import numbers as numbers
from lowrank.evaluate.score import report as report
from lowrank.evaluate.score import score as score
from lowrank.evaluate.score import score_trials as score_trials
from lowrank.evaluate.stats import Interval as Interval
from lowrank.evaluate.stats import bootstrap as bootstrap
from lowrank.evaluate.stats import over_seeds as over_seeds
from lowrank.evaluate.stats import paired_bootstrap as paired_bootstrap
