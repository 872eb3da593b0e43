"""Ask and tell: a batch of trials from Optuna, trained in packs, told back.

Within a batch no trial knows the others' values. TPE (Bergstra et al. 2011) then takes
running trials for bad ones ("constant liar"), which spreads a batch out.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    RangeSweep,
)
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lowrank.core.errors import BadInput, LowrankError
from lowrank.io.files import local_path, probe
from lowrank.run.door import end

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

#: Optuna's record of a study, in the sweep's directory.
JOURNAL = "optuna.log"
NAME = "sweep"


def study(
    arguments: Sequence[str],
    launcher: Launcher,
    config: DictConfig,
    context: HydraContext,
    *,
    num_trials: int,
    batch: int,
    direction: str,
    sampler: str,
    seed: int,
) -> dict[str, Any] | None:
    """Runs a study to its end, or continues the one that this line began.

    The sampler of a batch is seeded by `seed` and the number of trials asked for
    before it, so a study that was killed and continued asks what it would have asked.
    Trials that were asked for and never told are launched again first.

    Args:
      arguments: The line's; `interval(a, b)`, `range(a, b, step)`, several values, and
        `tag(log, interval(a, b))` are searched, the others hold for all trials.
      launcher: Runs a batch of jobs.
      config: Of the sweep, composed.
      context: Hydra's.
      num_trials: In all, those of earlier calls included.
      batch: Trials asked for at a time.
      direction: "maximize" or "minimize" what jobs return.
      sampler: "tpe" or "random".
      seed: Of the sampler.

    Returns:
      "number", "value" and "overrides" of the best trial; None where none has a value.
    """
    try:
        fixed, searched = _space(arguments, context)
        _check(num_trials, batch, direction, sampler, searched)
    except LowrankError as error:
        end(error)
    directory = local_path(str(config.hydra.sweep.dir))
    probe(directory)
    OmegaConf.save(config, directory / "multirun.yaml")
    known = _open(directory, direction)
    dry = bool(OmegaConf.select(config, "sweep.dry_run"))
    halving = OmegaConf.select(config, "sweep.halving") is not None
    while todo := _ask(known, searched, num_trials, batch, sampler, seed, dry):
        lines = [[*fixed, *_overrides(params)] for _, params in todo]
        # Of equal lines, which a sampler may well propose, one is launched.
        unique = list(dict.fromkeys(map(tuple, lines)))
        first = min(number for number, _ in todo)
        returns = launcher.launch([list(one) for one in unique], initial_job_idx=first)
        if dry:
            return None
        by_line = dict(zip(unique, returns, strict=True))
        for (number, _), line in zip(todo, map(tuple, lines), strict=True):
            _tell(known, number, by_line[line], halving)
    return _best(known)


def _space(
    arguments: Sequence[str], context: HydraContext
) -> tuple[list[str], dict[str, "optuna.distributions.BaseDistribution"]]:
    """Arguments that hold for all trials, and distributions of the others."""
    if importlib.util.find_spec("optuna") is None:
        raise BadInput(
            "hydra/sweeper=lowrank_optuna needs: pip install lowrank[optuna]"
        )
    parser = OverridesParser.create(config_loader=context.config_loader)
    fixed, searched = [], {}
    for override in parser.parse_overrides(list(arguments)):
        if override.is_sweep_override():
            searched[override.get_key_element()] = _distribution(override)
        else:
            fixed.append(str(override.input_line))
    return fixed, searched


def _distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    from optuna import distributions

    value = override.value()
    log = "log" in (getattr(value, "tags", None) or ())
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if isinstance(low, int) and isinstance(high, int):
            return distributions.IntDistribution(low, high, log=log)
        return distributions.FloatDistribution(
            float(low or 0), float(high or 0), log=log
        )
    if isinstance(value, RangeSweep):
        step, low, high = value.step, value.start or 0, value.stop or 0
        if all(isinstance(one, int) for one in (step, low, high)):
            # Hydra's ranges leave their end out, Optuna's do not.
            last = int(low) + (int(high) - 1 - int(low)) // int(step) * int(step)
            return distributions.IntDistribution(int(low), last, step=int(step))
    return distributions.CategoricalDistribution([*override.sweep_string_iterator()])


def _check(
    num_trials: int,
    batch: int,
    direction: str,
    sampler: str,
    searched: Mapping[str, Any],
) -> None:
    if num_trials < 1 or batch < 1:
        raise BadInput(
            f"hydra.sweeper.num_trials = {num_trials} and batch = {batch} must be at "
            "least 1"
        )
    if direction not in ("maximize", "minimize") or sampler not in ("tpe", "random"):
        raise BadInput(
            f"hydra.sweeper.direction = {direction!r} must be maximize or minimize, "
            f"and sampler = {sampler!r} tpe or random"
        )
    if not searched:
        raise BadInput(
            "nothing to search: give a field several values or an interval, as "
            "'optim.lr=tag(log, interval(1e-4, 1e-2))'"
        )


def _open(directory: Path, direction: str) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    return optuna.create_study(
        storage=storage,
        study_name=NAME,
        direction=optuna.study.StudyDirection[direction.upper()],
        load_if_exists=True,
    )


def _ask(
    known: "optuna.Study",
    searched: Mapping[str, Any],
    num_trials: int,
    batch: int,
    sampler: str,
    seed: int,
    dry: bool,
) -> list[tuple[int, Mapping[str, Any]]]:
    """(number, parameters) of the next batch: asked and never told, else new ones."""
    import optuna

    states = optuna.trial.TrialState
    left = known.get_trials(deepcopy=False, states=(states.RUNNING,))
    begun = [one for one in left if one.params.keys() == searched.keys()]
    for torn in (one for one in left if one not in begun):
        # Killed while it was being asked for: it has no parameters to go by.
        known.tell(torn.number, state=states.FAIL)
    if begun:
        return [(one.number, one.params) for one in begun]
    asked = len(known.get_trials(deepcopy=False))
    own = seed + asked
    known.sampler = (
        optuna.samplers.TPESampler(seed=own, constant_liar=True)
        if sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=own)
    )
    if dry:
        # A copy in memory: nothing of a dry run is in the journal.
        copy = optuna.create_study(sampler=known.sampler)
        known = copy
    found = [known.ask(dict(searched)) for _ in range(min(batch, num_trials - asked))]
    return [(trial.number, trial.params) for trial in found]


def _overrides(params: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in params.items()]


def _tell(known: "optuna.Study", number: int, returned: Any, halving: bool) -> None:
    import optuna

    value, cut = None, False
    if returned.status is JobStatus.COMPLETED:
        value = returned.return_value
        # Halving is refused without a validation split: a job without a number was cut.
        cut = value is None and halving
        if value is None and not cut:
            end(
                BadInput(
                    "jobs return no number to search by; the data needs a validation "
                    "split"
                )
            )
    if cut:
        known.tell(number, state=optuna.trial.TrialState.PRUNED)
    elif value is None:
        known.tell(number, state=optuna.trial.TrialState.FAIL)
    else:
        known.tell(number, float(value))


def _best(known: "optuna.Study") -> dict[str, Any] | None:
    try:
        best = known.best_trial
    except ValueError:  # None of them has a value.
        return None
    overrides = _overrides(best.params)
    logger.info("best of the study: %s, %g", " ".join(overrides), best.value)
    return {"number": best.number, "value": best.value, "overrides": overrides}
