"""A pack that trains nothing, but leaves real records; and a multirun's line."""

import contextlib
import logging
import signal
import sys
from pathlib import Path

from hydra.experimental.callback import Callback
from rich.logging import RichHandler

from experiments.train import objective
from lowrank.core.errors import BadInput, NonFinite, OutOfMemory, Preempted
from lowrank.io.files import Lock
from lowrank.io.record import Record
from lowrank.io.view import load_record
from lowrank.run.door import command
from lowrank.run.packs import Outcome
from lowrank.run.prepare import directory_of, identity_of
from lowrank.run.problems import load_problem
from lowrank.sweeps.plan import Packing

GRID = ("optim.lr=0.1,0.2", "seed=1,2")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def facts(settings, known={}):  # noqa: B006
    """Fingerprints of base, data and code, taken once for all tests."""
    if not known:
        known |= identity_of(settings, load_problem(settings))
    return known


class FakePack:
    """Finishes trials at once; their accuracy is their learning rate.

    Attributes:
      packs: (lr, seed) of the trials of every pack that was run.
      shares: Devices that shared the trials of each.
      restored: Whether those that came so far found a checkpoint.
      widest: With more trials than this, the device is out of memory.
      fails, refuses, bugs: Seeds of trials that are not finite, or whose whole pack is
        refused or ends by a bug.
      die_after: Trials to finish, after a checkpoint, before the kill.
    """

    def __init__(self):
        self.packs, self.shares, self.restored = [], [], []
        self.widest, self.die_after = 99, None
        self.fails, self.refuses, self.bugs, self.stops = set(), set(), set(), set()

    def __call__(self, settings, overrides, *, folder, until=None, origins=()):
        self.packs.append([(one.optim.lr, one.seed) for one in settings])
        self.shares.append(settings[0].mesh.sizes()["trial"])
        seeds = {one.seed for one in settings}
        for one in settings:
            assert (directory_of(one) / ".hydra" / "config.yaml").exists()
            assert not one.run.progress
        if len(settings) > self.widest:
            raise OutOfMemory("RESOURCE_EXHAUSTED")
        if seeds & self.refuses:
            raise BadInput("one of these trials cannot be")
        if seeds & self.bugs:
            raise ZeroDivisionError("a bug")
        self.restored.append((folder / "3").exists())
        (folder / "3").mkdir(parents=True, exist_ok=True)
        if seeds & self.stops:
            raise Preempted("stopped by SIGTERM")
        # As of a real pack, all directories are free or nothing is written.
        with contextlib.ExitStack() as held:
            for one in settings:
                held.callback(Lock(directory_of(one)).release)
        return [self.finish(at, one) for at, one in enumerate(settings)]

    def finish(self, at, settings):
        if not settings.run.force and (directory_of(settings) / "result.json").exists():
            return Outcome(load_record(directory_of(settings)).result, None)
        if at == self.die_after:
            raise Killed
        if settings.seed in self.fails:
            return Outcome(None, NonFinite("loss is not finite"))
        identity = {**facts(settings), "config": settings.trial_id}
        found = {"accuracy": {"estimate": settings.optim.lr}}
        result = {"scores": {"validation": {"metrics": found}}}
        with Record.open(
            directory_of(settings),
            config=settings.config,
            identity=identity,
            force=settings.run.force,
        ) as record:
            record.result(result)
        return Outcome(result, None)


class Seen(Callback):
    """What Hydra's callbacks see."""

    jobs = []

    def on_job_end(self, config, job_return, **kwargs):
        hydra = job_return.hydra_cfg.hydra
        self.jobs.append((hydra.job.num, job_return, Path(hydra.runtime.output_dir)))


def never(config, overrides):
    raise AssertionError("a job was run outside its pack")


def few_bytes(settings, widths):
    return dict.fromkeys(widths, 1000)


@contextlib.contextmanager
def at_the_door(monkeypatch, capfd):
    """Gives a line to the command: (exit code, what was said)."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def given(pack, *line, memory=few_bytes):
        monkeypatch.setattr(sys, "argv", ["train", "-m", *line])
        capfd.readouterr()
        try:
            command(never, packing=Packing(pack, memory, objective))()
            code = 0
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        return code, said.out + said.err

    yield given
    for number, handler in before.items():
        signal.signal(number, handler)
    # A console keeps the width that its screen had: the next test may want another.
    root = logging.getLogger()
    for console in [one for one in root.handlers if isinstance(one, RichHandler)]:
        root.removeHandler(console)


def only_sweep(tmp_path):
    (found,) = (tmp_path / "multirun").iterdir()
    return found
