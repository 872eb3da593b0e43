"""A run whose ranks move in other ways goes on where it was stopped."""

import pytest
import toy
from test_gather import BATCHING, rows

from lowrank.allocate.recipes import AdaLoRA, Growth, Squeeze
from lowrank.core.errors import Preempted
from lowrank.core.trees import fingerprint
from lowrank.data.pipeline import TrainPipeline
from lowrank.deltas.triplet import Triplet
from lowrank.run.fit import fit
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import AdamW

pytestmark = pytest.mark.long

WINDOW = {"begin": 2, "end": 10, "every": 2, "measure_every": 1}


@pytest.mark.parametrize(
    ("allocator", "delta"),
    [
        (AdaLoRA(**WINDOW), Triplet()),
        (Growth(**{**WINDOW, "measure_every": 2}), None),
        (Squeeze(**WINDOW), None),
    ],
    ids=["adalora", "growth", "squeeze"],
)
def test_stopped_between_events_and_at_one_it_goes_on_bit_for_bit(
    tmp_path, compiled, allocator, delta
):
    """With ages and moments of components that were born or rewritten meanwhile."""
    adapted = toy.make(rank=3, max_rank=6, delta=delta)
    tokens, labels = rows(0, 48)

    def fitted(directory=None, stop_after=None):
        batches = TrainPipeline(
            tokens, labels, batching=BATCHING, trial_seeds=[0], num_steps=14
        )
        loop = LoopSpec(log_every=1, checkpoint_every=3, stop_after=stop_after)
        return fit(
            adapted, batches, optim=AdamW(lr=0.05, warmup=0.0), ranks=allocator,
            loop=loop, directory=directory, progress=False,
        )  # fmt: skip

    whole = fitted()
    for stop in (4, 7):
        with pytest.raises(Preempted):
            fitted(tmp_path, stop)
    again = fitted(tmp_path)
    assert fingerprint(again.state) == fingerprint(whole.state)
    assert sum(float(own["gate"].sum()) for own in again.dials().values()) == 3
