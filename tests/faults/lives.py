"""Children that run a trial and meet a fault at a chosen place, and what they leave.

A child is a fork of a process that has imported everything but started nothing, so a
life costs about two seconds. It finds its fault by itself: at the n-th call of a named
function it waits a moment and then does to itself what the plan says.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import tiny_run
from tiny_run import same_outcome

#: Long enough to be interrupted often: 8 epochs, 72 steps, 19 checkpoints.
LONG = (
    "optim.epochs=8",
    "loop.checkpoint_every=4",
    "loop.evaluate_every=10",
    "delta.dropout=0.2",
    "optim.lr=0.005",
)
#: Where in the course of a run a fault may strike: module and function.
PLACES = {
    "data preparation": "lowrank.data.tasks:prepare",
    "tokens": "lowrank.run.texts:tokenize",
    "record opened": "lowrank.io.record:Record._begin",
    "restore": "lowrank.io.checkpoints:Checkpoints.restore",
    "compilation": "lowrank.train.pack:Pack.__init__",
    "step": "lowrank.train.pack:Pack.__call__",
    "checkpoint": "lowrank.io.checkpoints:start",
    "old checkpoint deleted": "lowrank.io.checkpoints:Checkpoints._prune",
    "metrics": "lowrank.track.jsonl:JsonlTracker._append",
    "validation": "lowrank.run.judges:score_trials",
    "judging": "lowrank.run.labeled:score_trials",
    "costs": "lowrank.run.results:Ledgers",
    "adapter": "lowrank.run.packs:ship",
    "result": "lowrank.io.record:Record.result",
    "status": "lowrank.io.record:Record.set_status",
}
#: Where a delayed act strikes at the latest, so that no machine is too fast for it.
LATEST = ("adapter", "result")
#: A child that neither ends nor dies within this time has failed.
LIFETIME = 120


@dataclasses.dataclass(frozen=True)
class Fault:
    """What strikes, at which call of which place, how long after it began.

    Attributes:
      act: One of `ACTS`.
      place: One of `PLACES`.
      call: Which call of it, from 1.
      delay: Seconds from the beginning of that call, but before the next of `LATEST`
        begins; None: before the call, in its thread.
      value: For the act.
    """

    act: str
    place: str
    call: int = 1
    delay: float | None = None
    value: float = 0.0


def long_config(world, directory, *overrides):
    return world.config(f"run.directory={directory}", *LONG, *overrides)


def _signals(*numbers):
    def act(value):
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(value)

    return act


def _full(value):
    """No file may grow beyond `value` bytes: what a full disk does to a writer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # What is printed goes to a file as well: another process writes that.
    writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=os.dup(2))
    os.dup2(writer.stdin.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))


def _clock(value):
    """The wall clock jumps; what is measured by it is wrong from here on."""
    from lowrank.io import record

    there = time.time() + value
    # It stands still there, too: two things then happen at one time.
    time.time = lambda: there
    record.now = lambda: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(there))


ACTS = {
    "kill": _signals(signal.SIGKILL),
    "term": _signals(signal.SIGTERM),
    "interrupt": _signals(signal.SIGINT),
    "twice": _signals(signal.SIGTERM, signal.SIGINT),
    "sleep": time.sleep,
    "full": _full,
    "clock": _clock,
}


def find(place):
    """What holds the function of a place, and its name there."""
    module, _, name = PLACES[place].partition(":")
    *owners, last = name.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), last


def _before(place, act):
    """Calls `act` with the number of the call, before each call of a place."""
    owner, last = find(place)
    original, calls = getattr(owner, last), itertools.count(1)

    @functools.wraps(original)
    def struck(*args, **more):
        act(next(calls))
        return original(*args, **more)

    setattr(owner, last, struck)


def _plant(fault):
    act = functools.partial(ACTS[fault.act], fault.value)
    if fault.delay is None:
        _before(fault.place, lambda call: act() if call == fault.call else None)
        return
    # Whoever takes it strikes: the timer, or the last moment at which it makes sense.
    once = threading.Lock()
    strike = lambda: act() if once.acquire(blocking=False) else None
    timer = threading.Timer(fault.delay, strike)
    timer.daemon = True

    def hasten(call):
        if timer.ident is not None:
            strike()

    _before(fault.place, lambda call: timer.start() if call == fault.call else None)
    for place in LATEST:
        _before(place, hasten)


def _live(config, environment, output, faults):
    # By default a parent that ignores SIGINT would have its children do so too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fault in faults:
        _plant(fault)
    tiny_run._run(config, environment, output)


def start(world, config, output, *faults):
    """Starts a life with these faults ahead of it."""
    context = tiny_run.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lives", "lowrank.run.trial"])
    child = context.Process(
        target=_live, args=(config, world.environment, str(output), faults)
    )
    return _started(child)


def _command(door, arguments, environment, output, folder):
    os.environ.update(environment)
    # What such a child prints is all that its user would see.
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.path.insert(0, str(folder))
    sys.argv = [door, *arguments]
    for name in ("jax_compilation_cache_dir", "jax_num_cpu_devices"):
        jax.config.update(name, _typed(environment[name.upper()]))
    importlib.import_module(f"experiments.{door}").main()


def _typed(text):
    return int(text) if text.isdigit() else text


def command(world, door, arguments, output, folder, **more):
    """Runs a command in a child; `folder` is where its plugins are."""
    context = tiny_run.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lives", "lowrank.run.trial"])
    given = (door, arguments, world.environment | more, str(output), str(folder))
    return _joined(_started(context.Process(target=_command, args=given)), output)


def limit_memory(extra):
    """This process may take `extra` bytes more from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _call(function, arguments, environment, output):
    os.environ.update(environment)
    stream = open(output, "w")  # noqa: SIM115
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    result = function(*arguments)
    Path(f"{output}.json").write_text(json.dumps(result))
    os._exit(0)


def called(world, function, arguments, output):
    """What a function returns in a child."""
    context = tiny_run.multiprocessing.get_context("forkserver")
    given = (function, arguments, world.environment, str(output))
    child = _started(context.Process(target=_call, args=given))
    assert _joined(child, output) == 0, output.read_text()
    return json.loads(Path(f"{output}.json").read_text())


def _started(child):
    child.daemon = True
    child.start()
    return child


def live(world, config, output, *faults, seconds=LIFETIME):
    """One life; returns its exit code, as `subprocess` has it."""
    return _joined(start(world, config, output, *faults), output, seconds)


def _joined(child, output, seconds=LIFETIME):
    try:
        child.join(seconds)
        assert child.exitcode is not None, f"it hangs: {output.read_text()}"
    finally:
        # JAX swallows SIGTERM; what still runs here has no right to.
        child.kill()
        child.join()
    return child.exitcode


def same_run(first, second):
    """Asserts that two directories hold the same run, shipped weights included."""
    same_outcome(first, second)
    for name in ("trained.safetensors", "adapter/adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def litter(directory):
    """Files and folders that a killed process left half-made."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if ".tmp" in path.name or "-tmp" in path.name or path.name.endswith(".removed")
        or path.name.startswith((".preparing-", ".partial-"))
    )  # fmt: skip
