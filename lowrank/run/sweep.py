"""What one line of many trials may say: how they run, and what packs can vary."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from lowrank.allocate.adaptive import Adaptive
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec

#: What may differ between the trials of one pack: arrays to the compiled step, or the
#: start of a trial. `*` stands for every field of a group. Whether `optim.clip` is
#: null changes the program; its number does not.
PACKABLE = (
    "delta.rank",
    "delta.alpha",
    "delta.scaling",
    "delta.dropout",
    "delta.rank_dropout",
    "optim.lr",
    "optim.head_lr",
    "optim.weight_decay",
    "optim.b1",
    "optim.b2",
    "optim.eps",
    "optim.clip",
    "optim.label_smoothing",
    "optim.b_ratio",
    "penalty.*",
    "ranks.max_rank",
    *(f"ranks.{name}" for name in sorted(Adaptive.dialled)),
    "seed",
)


@spec
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016; Li et al. 2017, Algorithm 1).

    At each rung 1/eta of the trials go on. Unlike there, a trial that goes on keeps
    its state, and its schedule is that of the whole training from the start.

    Attributes:
      eta: One trial in so many goes on; each rung is that many times later, too.
      first: The first rung: below 1 a part of the training, else in steps.
      metric: Validation number that decides, by its best value so far; `loop.select`
        if None.
      min_steps: No trial is cut before it has trained for so many steps.
    """

    eta: int = 3
    first: float = 0.1
    metric: str | None = None
    min_steps: int = 0

    def __post_init__(self) -> None:
        if self.eta < 2:
            raise BadInput(
                f"sweep.halving.eta must be at least 2, not {self.eta}: of so many "
                "trials one goes on"
            )
        if not self.first > 0 or (self.first > 1 and self.first % 1):
            raise BadInput(
                f"sweep.halving.first = {self.first} is the step of the first rung: a "
                "part of the training between 0 and 1, or a whole number of steps"
            )
        if self.min_steps < 0:
            raise BadInput(
                f"sweep.halving.min_steps must be at least 0, not {self.min_steps}"
            )


@spec
class SweepSpec:
    """How the trials of one command line are run together.

    Attributes:
      name: Names the sweep's directory; a digest of its arguments if None.
      dry_run: Show trials, packs, memory and time, and stop.
      width: Trials in a pack, at most; as many as fit into memory if None.
      memory_gib: Memory that a pack may need; what the machine gives if None.
      on_failure: Whether the other packs still run after a trial has failed.
      engine: Where packs run: "local", in this process; "ray" or "submitit", in
        processes of those engines, on this machine or others that see its files.
      workers: Packs that such an engine is given at a time; all if None.
      retries: Times a pack is started again after its worker died or was taken away.
      grace_seconds: How long a worker may take to save when the sweep is stopped.
      ray: `address` of a cluster (one is started here if it is missing), and what a
        pack needs of it: options of `ray.remote`, as `num_gpus`.
      submitit: `cluster` (slurm if it is missing, or local), and parameters of
        `submitit.AutoExecutor`, as `timeout_min`, `slurm_partition`.
      halving: Cut trials on the way; None: all train to the end.
    """

    name: str | None = None
    dry_run: bool = False
    width: int | None = None
    memory_gib: float | None = None
    on_failure: Literal["continue", "stop"] = "continue"
    engine: Literal["local", "ray", "submitit"] = "local"
    workers: int | None = None
    retries: int = 3
    grace_seconds: float = 60.0
    ray: Mapping[str, Any] | None = None
    submitit: Mapping[str, Any] | None = None
    halving: Halving | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise BadInput(f"sweep.width must be at least 1, or null, not {self.width}")
        if self.workers is not None and self.workers < 1:
            raise BadInput(
                f"sweep.workers must be at least 1, or null, not {self.workers}"
            )
        if self.retries < 0:
            raise BadInput(f"sweep.retries must be at least 0, not {self.retries}")
        if not self.grace_seconds >= 0:
            raise BadInput(
                f"sweep.grace_seconds must be at least 0, not {self.grace_seconds}"
            )
        for name in ("ray", "submitit"):
            if getattr(self, name) and self.engine != name:
                raise BadInput(
                    f"sweep.{name} is for sweep.engine={name}, and it is {self.engine}"
                )
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise BadInput(
                f"sweep.memory_gib must be positive, or null, not {self.memory_gib}"
            )
        if self.name is not None and not re.fullmatch(r"\w[\w.\-]{0,99}", self.name):
            raise BadInput(
                f"sweep.name = {self.name!r} names a directory: give it letters, "
                "digits, '-', '_' and '.', the first no sign"
            )
