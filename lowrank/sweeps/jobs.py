"""Hydra's jobs as trials, and what became of the trials as Hydra's jobs again.

Sweepers and callbacks see ordinary jobs: each has its config, its directory, its
return value or its exception. One thing they cannot see: `on_job_start` comes after the
training, for the jobs of a pack are told one after another when the pack has ended.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    run_job,
    setup_globals,
)
from hydra.errors import CompactHydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lowrank.core.errors import BadInput, LowrankError, exit_code, gravest
from lowrank.core.secrets import redact
from lowrank.io.files import local_path, write_atomically
from lowrank.run.door import Course, end, log_to_stderr, resolve
from lowrank.run.meeting import meet
from lowrank.run.packs import Outcome
from lowrank.run.settings import read
from lowrank.sharding.processes import first
from lowrank.sweeps.crew import check_crew, dismiss, follow, leading
from lowrank.sweeps.dry import show_plan
from lowrank.sweeps.engine import COMPILED, compiled_once
from lowrank.sweeps.engines import check_engine, open_engine
from lowrank.sweeps.group import Trial, labelled
from lowrank.sweeps.launch import PACKS, Packing, make_plan
from lowrank.sweeps.load import load_sweep
from lowrank.sweeps.results import send_summary, show_results, write_results
from lowrank.sweeps.runner import run_plan
from lowrank.sweeps.width import remembered
from lowrank.train.guard import interruptible

logger = logging.getLogger(__name__)


class TrialFailed(CompactHydraException):
    """A trial's own failure, as the exception of its job; `__cause__` is the error.

    Hydra shows exceptions of this kind by their message, without a stack trace.
    """


def launch(
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    *,
    config: DictConfig,
    context: HydraContext,
    compose: Callable[[DictConfig, Sequence[str]], DictConfig],
    task_function: TaskFunction,
    packing: Packing,
) -> list[JobReturn]:
    """Runs a batch of jobs in packs, or shows what that would be.

    Errors that concern the whole sweep (bad input, a stop) end the process with their
    message and exit code, as they end a single run. Those of one trial are the
    exceptions of its job; the process then ends with the gravest code among them, also
    where the sweeper lets them pass.

    Args:
      job_overrides: One list of arguments per job.
      initial_job_idx: Number of the first one.
      config: Of the sweep, composed.
      context: Hydra's.
      compose: (config of the sweep, arguments of a job) -> config of the job, which
        belongs to the caller.
      task_function: The command's; `run.door.command` made it.
      packing: How the command runs jobs together.

    Returns:
      One per job; of a dry run, jobs that returned None.
    """
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    log_to_stderr()
    course = getattr(task_function, "course", None) or Course()
    course.started = True
    directory = local_path(str(config.hydra.sweep.dir))
    try:
        with interruptible(), compiled_once(directory / PACKS / COMPILED):
            logger.info("composing %d jobs", len(job_overrides))
            jobs = [
                _numbered(compose(config, overrides), config, initial_job_idx + at)
                for at, overrides in enumerate(job_overrides)
            ]
            trials = labelled([_trial(job, directory) for job in jobs])
            meet(trials[0].settings.config)
            check_crew(trials)
            if not first():
                course.code = follow(packing)
                return [_returned(job) for job in jobs]
            _redact_multirun(directory, config)
            spec = trials[0].settings.sweep
            if any(trial.settings.sweep != spec for trial in trials):
                raise BadInput(
                    "the fields of `sweep` hold for all jobs: sweep over others"
                )
            check_engine(spec)
            packing = leading(packing)
            packing = dataclasses.replace(packing, memory=remembered(packing.memory))
            plan = make_plan(trials, directory, packing, spec)
            if spec.dry_run:
                show_plan(plan, packing.memory, spec)
                dismiss(course.code)
                return [_returned(job) for job in jobs]
            with open_engine(spec, directory / PACKS) as engine:
                outcomes = run_plan(plan, directory, packing, spec, engine)
            sweep = load_sweep(directory)
            write_results(sweep)
            show_results(sweep)
            if plan.packs:
                send_summary(sweep, trials[0].settings.track, directory.name)
    except LowrankError as error:
        end(error)
    codes = [exit_code(o.error) for o in outcomes.values() if o.error is not None]
    course.code = gravest([course.code, *codes])
    dismiss(course.code)
    returns = []
    for job, trial in zip(jobs, trials, strict=True):
        if (outcome := outcomes.get(trial.id)) is not None:
            returns.append(_replay(job, trial, outcome, context, packing))
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    if len(returns) < len(jobs):
        failed = next(o.error for o in outcomes.values() if o.error is not None)
        raise TrialFailed(f"stopped after {type(failed).__name__}: {failed}")
    return returns


def _numbered(job: DictConfig, config: DictConfig, number: int) -> DictConfig:
    """A job's config with its number and the sweep's directory."""
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
        # Its own arguments would name another sweep.
        job.hydra.sweep.dir = str(config.hydra.sweep.dir)
    return job


def _trial(job: DictConfig, directory: Path) -> Trial:
    """The trial that a job's config describes, checked."""
    before = HydraConfig.instance().cfg
    # For `${hydra:...}` in the job's own fields.
    HydraConfig.instance().set_config(job)
    try:
        task = copy.deepcopy(job)
        with read_write(task), open_dict(task):
            del task["hydra"]
        given = dict(resolve(task))
    finally:
        HydraConfig.instance().cfg = before
    run = dict(given.get("run") or {})
    if run.get("preview"):
        raise BadInput("run.preview is for one run; of a sweep, sweep.dry_run=true")
    if run.get("root") is None:
        run["root"] = str(directory)
    track = dict(given.get("track") or {})
    if track.get("group") is None:
        track["group"] = directory.name
    settings = read({**given, "run": run, "track": track})
    overrides = OmegaConf.to_container(job.hydra.overrides.task)
    assert isinstance(overrides, list)
    return Trial(job.hydra.job.num, settings, tuple(map(str, overrides)))


def _replay(
    job: DictConfig,
    trial: Trial,
    outcome: Outcome,
    context: HydraContext,
    packing: Packing,
) -> JobReturn:
    """The job of a trial that has ended: runs nothing but Hydra's own part of it."""
    # What was once made Hydra's present config cannot be written.
    with read_write(job.hydra), open_dict(job.hydra):
        job.hydra.sweep.dir = str(trial.directory.parent)
        job.hydra.sweep.subdir = trial.directory.name
        # The trial's `.hydra` was written before, without secrets, and is sealed.
        job.hydra.output_subdir = None

    def told(_: DictConfig) -> Any:
        if outcome.cut:
            # It has no value that could stand beside those of trials that went on.
            return None
        if outcome.result is None:
            error = outcome.error
            raise TrialFailed(f"{type(error).__name__}: {error}") from error
        return packing.value(outcome.result)

    returned = run_job(
        task_function=told,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )
    # Hydra prints them for a job that failed.
    returned.overrides = redact(list(returned.overrides or ()))
    return returned


def _returned(job: DictConfig) -> JobReturn:
    """A job that was not run and is no failure."""
    returned = JobReturn(
        overrides=list(job.hydra.overrides.task), status=JobStatus.COMPLETED
    )
    returned.return_value = None
    return returned


def _redact_multirun(directory: Path, config: DictConfig) -> None:
    """Takes secrets out of the file that sweepers write of a sweep's arguments."""
    path = directory / "multirun.yaml"
    if not path.exists():
        return
    content = OmegaConf.to_container(config, resolve=False)
    text = OmegaConf.to_yaml(OmegaConf.create(redact(content))).encode()
    write_atomically(path, lambda file: file.write(text))
