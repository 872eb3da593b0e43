"""Reports: a record, told. Imports no training."""

from lowrank.report.tables import show_comparison as show_comparison
from lowrank.report.tables import show_preview as show_preview
from lowrank.report.tables import show_result as show_result
