"""What a run costs, from the compiled program and the clock, gathered in one ledger.

Three kinds of number are kept apart: *counted* from shapes, *estimated* by the
compiler before anything ran, and *measured* on this machine.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank.core.errors import BadInput, Corrupt
from lowrank.core.spec import spec
from lowrank.cost.count import Counts, Flops
from lowrank.cost.count import jaxpr_flops as jaxpr_flops

LEDGER_VERSION = 1
COUNTED, ESTIMATED, MEASURED = "counted", "estimated", "measured"


def compiled_cost(compiled: Any, flops: Flops | None = None) -> dict[str, Any]:
    """What the compiler says about a program, before it has run.

    Args:
      compiled: ``jax.jit(f).lower(*args).compile()``.
      flops: The count of `jaxpr_flops` for the same program.

    Returns:
      "flops": the count, of all devices together; None if not given.
      "compiler_flops": the compiler's number for one device; it includes element-wise
        work and counts the body of a loop once, whatever its length.
      "compiler_accessed_bytes": traffic of one device, loop bodies once, too.
      "peak_bytes": arguments + outputs + temporaries - aliases: an estimate of what
        one device must hold; "argument_bytes", "output_bytes", "temp_bytes",
        "alias_bytes", "code_bytes": its parts. None for what a backend does not tell.
    """
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    analysis = analysis or {}
    told = lambda name: float(analysis[name]) if analysis.get(name, -1) >= 0 else None
    costs: dict[str, Any] = {
        "flops": None if flops is None else flops.flops,
        "compiler_flops": told("flops"),
        "compiler_accessed_bytes": told("bytes accessed"),
    }
    names = {
        "argument_bytes": "argument_size_in_bytes",
        "output_bytes": "output_size_in_bytes",
        "temp_bytes": "temp_size_in_bytes",
        "alias_bytes": "alias_size_in_bytes",
        "code_bytes": "generated_code_size_in_bytes",
    }
    memory = compiled.memory_analysis()
    if memory is None:
        return {**costs, "peak_bytes": None, **dict.fromkeys(names)}
    parts = {name: int(getattr(memory, theirs)) for name, theirs in names.items()}
    peak = parts["argument_bytes"] + parts["output_bytes"] + parts["temp_bytes"]
    peak -= parts["alias_bytes"]
    return {**costs, "peak_bytes": peak, **parts}


class StepTimer:
    """Seconds per step, without those steps that had other things to do.

    The first `skip` steps of every batch shape are left out: they compile, load and
    warm up. The median and quartiles tell the cost of a typical step; the throughput
    is all examples over all seconds of the steps that count.
    """

    def __init__(self, skip: int = 1):
        if skip < 0:
            raise BadInput(f"a timer skips 0 or more steps per shape, not {skip}")
        self._skip = skip
        self._seen: dict[tuple[int, ...], int] = {}
        self._seconds: dict[tuple[int, ...], list[float]] = {}
        self._examples = 0
        self._tokens = 0

    def add(
        self,
        shape: tuple[int, ...],
        seconds: float,
        num_examples: int | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """Notes a finished step.

        Args:
          shape: (batch, seq) of the step's batch, or (trials, batch, seq).
          seconds: How long it took, device work included.
          num_examples: Real rows; every row of the shape if None.
          num_tokens: Real tokens; every place of the shape, padding too, if None.
        """
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] <= self._skip:
            return
        self._seconds.setdefault(shape, []).append(seconds)
        rows, places = int(np.prod(shape[:-1])), int(np.prod(shape))
        self._examples += rows if num_examples is None else num_examples
        self._tokens += places if num_tokens is None else num_tokens

    def summary(self) -> dict[str, Any]:
        """Medians, quartiles and throughput; None while no step has counted.

        "per_shape" gives number and median for each shape, as steps of different
        length have different costs.
        """
        every = [s for seconds in self._seconds.values() for s in seconds]
        q1, median, q3 = _quantiles(every, (0.25, 0.5, 0.75))
        rate = lambda amount: amount / sum(every) if every else None
        return {
            "num_steps": len(every),
            "num_skipped": sum(self._seen.values()) - len(every),
            "median_seconds": median,
            "q1_seconds": q1,
            "q3_seconds": q3,
            "examples_per_second": rate(self._examples),
            "tokens_per_second": rate(self._tokens),
            "per_shape": {
                "x".join(map(str, shape)): {
                    "num_steps": len(seconds),
                    "median_seconds": float(np.median(seconds)),
                }
                for shape, seconds in sorted(self._seconds.items())
            },
        }


def latency(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    repeats: int = 20,
    *,
    num_examples: int | None = None,
    warmup: int = 2,
) -> dict[str, float | int | None]:
    """Times calls of `fn` until their results are ready.

    Args:
      fn: A jitted or compiled function.
      args: Its arguments, on the device already if transfers shall not count.
      repeats: Calls that are timed.
      num_examples: Rows of a call, for the throughput.
      warmup: Calls before, of which the first compiles; at least 1.

    Returns:
      "median_seconds", "p10_seconds", "p90_seconds", "repeats", and
      "examples_per_second" = num_examples / median, None without `num_examples`.
    """
    if repeats < 1 or warmup < 1:
        raise BadInput(
            f"latency needs repeats >= 1 and warmup >= 1, not {repeats} and {warmup}: "
            "a first call would be timed with its compilation"
        )
    for _ in range(warmup):
        jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    p10, median, p90 = _quantiles(seconds, (0.1, 0.5, 0.9))
    assert median is not None
    return {
        "median_seconds": median,
        "p10_seconds": p10,
        "p90_seconds": p90,
        "repeats": repeats,
        "examples_per_second": None if num_examples is None else num_examples / median,
    }


def peak_resident_bytes() -> int:
    """The most memory this process has held so far, in bytes.

    It never falls, and includes what came before the run: to learn what a phase
    added, compare `resident_bytes` before and after.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Memory this process holds now; None where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_device_bytes() -> int | None:
    """The most memory any local accelerator has held; None where none tells (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def _field(source: str, default: Any = None) -> Any:
    """A field of the ledger, with where its number comes from."""
    return dataclasses.field(default=default, metadata={"source": source})


@spec
class CostLedger:
    """What a run cost: the content of `costs.json`. None means not known, not zero.

    Figures of a step are those of the whole pack; divide by `num_trials` for the share
    of one. Parameters and bytes of the adapter are those of one trial.

    Attributes:
      device: Kind and number of devices, as "cpu x 1".
      num_trials: Trials that shared the step.
      step_flops: Matrix FLOPs of a step, loops multiplied out.
      step_flops_exact: Whether no loop or kernel escaped that count.
      inference: "base", "unmerged", "merged" -> what `latency` returned.
      other fields: As their names say; `step_*_bytes` are of one device.
    """

    device: str | None = _field(MEASURED)
    num_trials: int = _field(COUNTED, 1)
    trained_parameters: int | None = _field(COUNTED)
    total_parameters: int | None = _field(COUNTED)
    adapter_bytes: int | None = _field(COUNTED)
    base_bytes: int | None = _field(COUNTED)
    parameters_per_site: Mapping[str, int] | None = _field(COUNTED)
    padding_parameters: int | None = _field(COUNTED)
    compile_seconds: float | None = _field(MEASURED)
    step_flops: float | None = _field(COUNTED)
    step_flops_exact: bool | None = _field(COUNTED)
    step_compiler_flops: float | None = _field(ESTIMATED)
    step_compiler_accessed_bytes: float | None = _field(ESTIMATED)
    step_peak_bytes: int | None = _field(ESTIMATED)
    step_temp_bytes: int | None = _field(ESTIMATED)
    step_code_bytes: int | None = _field(ESTIMATED)
    num_steps_measured: int | None = _field(MEASURED)
    step_median_seconds: float | None = _field(MEASURED)
    step_q1_seconds: float | None = _field(MEASURED)
    step_q3_seconds: float | None = _field(MEASURED)
    examples_per_second: float | None = _field(MEASURED)
    tokens_per_second: float | None = _field(MEASURED)
    peak_resident_bytes: int | None = _field(MEASURED)
    peak_device_bytes: int | None = _field(MEASURED)
    inference: Mapping[str, Mapping[str, float | int | None]] | None = _field(MEASURED)

    @classmethod
    def gather(
        cls,
        *,
        counts: Counts | None = None,
        flops: Flops | None = None,
        compiled: Any = None,
        timer: StepTimer | None = None,
        compile_seconds: float | None = None,
        inference: Mapping[str, Mapping[str, float | int | None]] | None = None,
        num_trials: int = 1,
    ) -> "CostLedger":
        """Puts together what is known; memory and devices are read here and now."""
        devices = jax.devices()
        values: dict[str, Any] = dataclasses.asdict(counts) if counts else {}
        if flops is not None:
            values |= {"step_flops": flops.flops, "step_flops_exact": flops.exact}
        if compiled is not None:
            costs = compiled_cost(compiled)
            for name in ("compiler_flops", "compiler_accessed_bytes", "peak_bytes"):
                values[f"step_{name}"] = costs[name]
            values["step_temp_bytes"] = costs["temp_bytes"]
            values["step_code_bytes"] = costs["code_bytes"]
        if timer is not None:
            summary = timer.summary()
            for name in ("median_seconds", "q1_seconds", "q3_seconds"):
                values[f"step_{name}"] = summary[name]
            values["num_steps_measured"] = summary["num_steps"]
            values["examples_per_second"] = summary["examples_per_second"]
            values["tokens_per_second"] = summary["tokens_per_second"]
        return cls(
            device=f"{devices[0].device_kind} x {len(devices)}",
            num_trials=num_trials,
            compile_seconds=compile_seconds,
            peak_resident_bytes=peak_resident_bytes(),
            peak_device_bytes=peak_device_bytes(),
            inference=inference,
            **values,
        )

    def json(self) -> dict[str, Any]:
        """Version, values, and for every value whether it was counted, estimated by
        the compiler or measured."""
        sources = {f.name: f.metadata["source"] for f in dataclasses.fields(self)}
        return {
            "version": LEDGER_VERSION,
            "sources": sources,
            **dataclasses.asdict(self),
        }

    def text(self) -> str:
        """`json` as text; refuses numbers that JSON does not know."""
        return json.dumps(self.json(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "CostLedger":
        """The ledger that `json` wrote.

        Raises:
          Corrupt: It is of another version, or not a ledger.
        """
        if stored.get("version") != LEDGER_VERSION:
            raise Corrupt(
                f"costs.json has version {stored.get('version')!r}, this program reads "
                f"{LEDGER_VERSION}; read it with the program that wrote it"
            )
        values = {n: v for n, v in stored.items() if n not in ("version", "sources")}
        try:
            return cls(**values)
        except (BadInput, TypeError) as error:
            raise Corrupt(f"costs.json is damaged: {error}") from error


def _quantiles(values: list[float], at: tuple[float, ...]) -> list[float | None]:
    if not values:
        return [None] * len(at)
    return [float(q) for q in np.quantile(values, at)]
