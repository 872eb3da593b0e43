"""Everything a trial needs before it may compile: base, data, rules, all checked."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.adapt.attach import Adapted, attach
from lowrank.adapt.variants import Variants, pack
from lowrank.allocate.slots import Slots
from lowrank.core.arrays import Dials
from lowrank.core.errors import BadInput
from lowrank.cost.count import Counts, count_parameters
from lowrank.io.environment import code_fingerprint
from lowrank.io.files import local_path
from lowrank.io.hub import Base
from lowrank.io.language import Language
from lowrank.run.forward import Batch
from lowrank.run.labeled import Labeled
from lowrank.run.language import read_known
from lowrank.run.problem import Problem
from lowrank.run.problems import load_problem
from lowrank.run.ranks import settled_rules, slots_of
from lowrank.run.settings import Settings
from lowrank.run.warm import Warm, fingerprint_of, warm_start
from lowrank.train.batches import TrainBatches

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A trial, ready to run.

    Attributes:
      settings: What was asked for.
      problem: Its data and base, checked.
      batches: Training data, of all trials of its pack.
      adapted: The model with this trial's corrections.
    """

    settings: Settings
    problem: Problem
    batches: TrainBatches
    adapted: Adapted

    @property
    def base(self) -> Base | Language:
        """The pretrained model."""
        return self.problem.base

    @property
    def labeled(self) -> Labeled:
        """The problem, where its rows have classes.

        Raises:
          BadInput: They have none.
        """
        if not isinstance(self.problem, Labeled):
            raise BadInput(
                f"{self.problem.name} has no classes, and this needs some: choose data "
                "with labels"
            )
        return self.problem

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints that a stored state must agree with to be continued."""
        return identity_of(self.settings, self.problem)

    @property
    def directory(self) -> Path:
        """Where the run lives."""
        return directory_of(self.settings)

    def evaluation(self, split: str) -> Sequence[Batch]:
        """A split in order, every row once."""
        return self.problem.evaluation(split)


@dataclasses.dataclass(frozen=True)
class PreparedPack:
    """Trials that share base, data and program, ready to run.

    Attributes:
      trials: Each trial by itself.
      variants: Their models in the common shape.
      starts: Of each trial, how it starts from an earlier adapter; None: as drawn.
    """

    trials: tuple[Prepared, ...]
    variants: Variants
    starts: tuple[Warm | None, ...]

    @property
    def batches(self) -> TrainBatches:
        """Training data, every trial in its own order."""
        return self.trials[0].batches

    def slots(self) -> list[Slots] | None:
        """What competes for ranks in each trial; None where no rank moves."""
        if not any(trial.settings.ranks.move for trial in self.trials):
            return None
        together = self.variants.together
        return [
            slots_of(
                together, dials, alone.max_rank, bounds=trial.settings.ranks.bounds
            )
            for trial, dials, alone in zip(
                self.trials, self.variants.dials(), self.variants.alone, strict=True
            )
        ]


def prepare(settings: Settings) -> Prepared:
    """Loads and checks base and data of one trial, and attaches the corrections.

    Raises:
      BadInput: Anything is missing, damaged or does not fit; nothing was written but
        the caches of bases and prepared data.
    """
    return prepare_pack([settings]).trials[0]


def prepare_pack(trials: Sequence[Settings]) -> PreparedPack:
    """As `prepare`, once for all trials of a pack.

    Args:
      trials: Alike in everything but what `sweep.PACKABLE` lists.
    """
    settings = trials[0]
    logger.info("loading data and base %s", settings.base.source)
    problem = load_problem(settings)
    batches = problem.batches([trial.seed for trial in trials])
    example = problem.inputs({k: v[0] for k, v in batches.examples()[0].items()})
    variants = adapt(problem.base, trials, example)
    adapted = variants.together
    logger.info(
        "%s: %s rows; %s: %d sites adapted",
        problem.name,
        ", ".join(f"{count} {name}" for name, count in problem.rows.items()),
        problem.base.name,
        len(adapted.sites),
    )
    prepared = tuple(
        Prepared(trial, problem, batches, alone)
        for trial, alone in zip(trials, variants.alone, strict=True)
    )
    starts = tuple(
        warm_start(trial, problem, adapted, dials)
        for trial, dials in zip(trials, variants.dials(), strict=True)
    )
    return PreparedPack(prepared, variants, starts)


def adapt(base: Base | Language, trials: Sequence[Settings], example: Any) -> Variants:
    """The base with the corrections of every trial.

    Args:
      base: The model.
      trials: Alike in everything but what `sweep.PACKABLE` lists.
      example: What the model takes, arrays or shapes.
    """
    rules = [trial.rules(base.head) for trial in trials]
    refs = [trial.ref_rank for trial in trials]
    adapted = attach(
        base.outputs, base.params, example, rules=rules[0], ref_rank=refs[0]
    )
    variants = pack(adapted, rules, refs)
    own = [
        settled_rules(trial.ranks.allocator, alone, mine)
        for trial, alone, mine in zip(trials, variants.alone, rules, strict=True)
    ]
    return variants if own == rules else pack(adapted, own, refs)


def identity_of(settings: Settings, problem: Problem) -> dict[str, str]:
    """Fingerprints of what decides a trial's course and what is told of it."""
    return {
        "config": settings.trial_id,
        "base": problem.base.fingerprint,
        "data": problem.fingerprint,
        "code": code_fingerprint(),
        **marks_of(settings),
    }


def marks_of(settings: Settings) -> dict[str, str]:
    """sha256 of files that the config names beside base and data.

    Another adapter under the same name is another start.

    Raises:
      BadInput: One cannot be read.
    """
    found = {}
    if settings.start is not None:
        found["start"] = fingerprint_of(settings.start)
    if settings.evaluate.known is not None:
        found["known"] = hashlib.sha256(read_known(settings)).hexdigest()
    return found


def directory_of(settings: Settings) -> Path:
    """The directory of a trial, whether it is there or not.

    Raises:
      BadInput: It is a URL.
    """
    run = settings.run
    # Checked before `Path` folds the "//" of a URL.
    if run.directory is not None:
        return local_path(run.directory)
    return local_path("runs" if run.root is None else run.root) / settings.trial_id


def sizes(adapted: Adapted, dials: Dials | None = None) -> Counts:
    """Parameters and bytes, from shapes alone; closed components do not count.

    Args:
      adapted: The model.
      dials: Whose gates count; those of the rules by default.
    """
    trained = adapted.trained_shapes()
    return count_parameters(adapted.frozen(), trained, adapted.padding(dials))


def site_rows(adapted: Adapted) -> Sequence[dict[str, Any]]:
    """One row per site: what the preview and the record show.

    "rank" is the largest of a site's layers and "ranks" has one number per layer;
    closed components have no parameters, but are computed, so they have FLOPs.
    """
    counts = sizes(adapted).parameters_per_site
    return [
        {
            "path": path,
            "layers": site.num_layers,
            "d_in": site.d_in,
            "d_out": site.d_out,
            "rank": max(adapted.layer_ranks(path)),
            "ranks": list(adapted.layer_ranks(path)),
            "parameters": counts[path],
            "flops": site.flops_per_rank * adapted.max_rank(path),
            "uses": ", ".join(sorted({use.kind for use in site.uses})),
        }
        for path, site in adapted.sites.items()
    ]


def ranks_array(adapted: Adapted) -> dict[str, np.ndarray]:
    """Active components per layer, by site."""
    return {
        path: np.asarray(np.asarray(dials["gate"]).sum(axis=-1))
        for path, dials in adapted.dials().items()
        if "gate" in dials
    }
