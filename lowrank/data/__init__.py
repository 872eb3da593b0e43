"""Rows, tokens and batches: what a model is trained and judged on."""

from lowrank.data.buckets import Batching as Batching
from lowrank.data.checks import check_task as check_task
from lowrank.data.pipeline import TrainPipeline as TrainPipeline
from lowrank.data.pipeline import eval_batches as eval_batches
from lowrank.data.rows import RowPipeline as RowPipeline
from lowrank.data.rows import Rows as Rows
from lowrank.data.splits import Split as Split
from lowrank.data.splits import Task as Task
from lowrank.data.splits import make_task as make_task
from lowrank.data.tasks import CATALOGUE as CATALOGUE
from lowrank.data.tasks import IntentsData as IntentsData
from lowrank.data.tasks import TableData as TableData
from lowrank.data.tasks import TfdsData as TfdsData
from lowrank.data.tokens import Tokens as Tokens
from lowrank.data.tokens import tokenize as tokenize
