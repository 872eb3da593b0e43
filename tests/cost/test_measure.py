"""Costs are told with their source, and what is not known is None."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput, Corrupt
from lowrank.cost.count import Flops, count_parameters, jaxpr_flops
from lowrank.cost.measure import (
    CostLedger,
    StepTimer,
    compiled_cost,
    latency,
    peak_device_bytes,
    peak_resident_bytes,
    resident_bytes,
)

SIZE = 64


def product(x, w):
    return jnp.tanh(x @ w)


ARGS = (jnp.ones((SIZE, SIZE)), jnp.ones((SIZE, SIZE)))


def test_a_compiled_program_tells_its_memory():
    compiled = jax.jit(product).lower(*ARGS).compile()
    got = compiled_cost(compiled, jaxpr_flops(product, *ARGS))
    array = SIZE * SIZE * 4
    assert got["argument_bytes"] == 2 * array
    assert got["output_bytes"] == array
    assert got["peak_bytes"] == 3 * array + got["temp_bytes"]
    assert got["flops"] == 2 * SIZE**3
    assert got["compiler_flops"] >= 2 * SIZE**3
    assert got["compiler_accessed_bytes"] >= 3 * array
    assert json.loads(json.dumps(got)) == got


def test_a_donated_argument_is_held_once():
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(ARGS[0]).compile()
    kept = jax.jit(lambda x: x + 1).lower(ARGS[0]).compile()
    array = SIZE * SIZE * 4
    assert compiled_cost(donated)["alias_bytes"] == array
    assert compiled_cost(kept)["peak_bytes"] - compiled_cost(donated)["peak_bytes"] == (
        array
    )


def test_what_a_backend_does_not_tell_is_none():
    class Silent:
        def cost_analysis(self):
            return [{"flops": -1.0}]

        def memory_analysis(self):
            return None

    got = compiled_cost(Silent())
    assert set(got) == set(compiled_cost(jax.jit(product).lower(*ARGS).compile()))
    assert set(got.values()) == {None}


def test_first_steps_of_every_shape_do_not_count():
    timer = StepTimer()
    timer.add((4, 16), 100.0)
    for seconds in (1.0, 2.0, 3.0, 6.0):
        timer.add((4, 16), seconds)
    timer.add((2, 4, 32), 50.0)
    timer.add((2, 4, 32), 8.0)
    got = timer.summary()
    assert (got["num_steps"], got["num_skipped"]) == (5, 2)
    assert got["median_seconds"] == 3.0
    assert (got["q1_seconds"], got["q3_seconds"]) == (2.0, 6.0)
    assert got["examples_per_second"] == pytest.approx((4 * 4 + 8) / 20)
    assert got["tokens_per_second"] == pytest.approx((4 * 64 + 256) / 20)
    assert got["per_shape"] == {
        "2x4x32": {"num_steps": 1, "median_seconds": 8.0},
        "4x16": {"num_steps": 4, "median_seconds": 2.5},
    }


def test_real_rows_and_tokens_replace_those_of_the_shape():
    timer = StepTimer(skip=0)
    timer.add((4, 16), 2.0, num_examples=3, num_tokens=20)
    got = timer.summary()
    assert (got["examples_per_second"], got["tokens_per_second"]) == (1.5, 10)


def test_a_timer_that_has_not_counted_knows_nothing():
    timer = StepTimer()
    timer.add((4, 16), 9.0)
    got = timer.summary()
    for name in ("median_seconds", "q1_seconds", "examples_per_second"):
        assert got[name] is None
    with pytest.raises(BadInput, match="skips"):
        StepTimer(skip=-1)


def test_latency_waits_for_results_and_leaves_out_the_first_call():
    calls = []

    class Result:
        def block_until_ready(self):
            time.sleep(0.1 if len(calls) == 1 else 0.01)
            return self

    def fn(x):
        calls.append(x)
        return Result()

    got = latency(fn, (3,), repeats=5, num_examples=8, warmup=1)
    assert calls == [3] * 6
    assert 0.01 <= got["p10_seconds"] <= got["median_seconds"] <= got["p90_seconds"]
    assert got["p90_seconds"] < 0.1
    assert got["examples_per_second"] == pytest.approx(8 / got["median_seconds"])
    assert latency(jax.jit(product), ARGS, 2)["examples_per_second"] is None
    with pytest.raises(BadInput, match="compilation"):
        latency(fn, (3,), warmup=0)


def test_memory_is_in_bytes():
    before, peak = resident_bytes(), peak_resident_bytes()
    size = max(peak - before, 0) + 2**26
    block = np.ones(size, np.uint8)
    assert resident_bytes() - before == pytest.approx(size, rel=0.2)
    # The kernel counts in KiB, and per thread in batches of pages.
    assert peak_resident_bytes() >= peak + 2**26 - 2**22
    assert peak_resident_bytes() < peak + 2**28
    del block
    assert peak_device_bytes() is None


def make_ledger():
    counts = count_parameters(
        {"w": ARGS[0]}, {"w": {"a": jnp.ones((2, SIZE)), "b": jnp.ones((2, SIZE))}}
    )
    timer = StepTimer()
    for seconds in (9.0, 1.0, 3.0):
        timer.add((4, 16), seconds)
    compiled = jax.jit(product).lower(*ARGS).compile()
    speed = latency(compiled, ARGS, 3, num_examples=SIZE)
    return CostLedger.gather(
        counts=counts,
        flops=jaxpr_flops(product, *ARGS),
        compiled=compiled,
        timer=timer,
        compile_seconds=0.5,
        inference={"base": speed, "unmerged": speed, "merged": speed},
        num_trials=2,
    )


def test_a_ledger_survives_its_file():
    ledger = make_ledger()
    stored = json.loads(ledger.text())
    assert CostLedger.from_json(stored) == ledger
    assert stored["version"] == 1
    assert stored["trained_parameters"] == 4 * SIZE
    assert stored["total_parameters"] == SIZE * SIZE + 4 * SIZE
    assert stored["adapter_bytes"] == 16 * SIZE
    assert stored["step_flops"] == 2 * SIZE**3
    assert stored["step_flops_exact"] is True
    assert stored["step_median_seconds"] == 2.0
    assert stored["examples_per_second"] == 2.0
    assert stored["tokens_per_second"] == 32.0
    assert stored["compile_seconds"] == 0.5
    assert stored["inference"]["merged"]["median_seconds"] > 0
    assert stored["peak_resident_bytes"] > stored["step_peak_bytes"] > 0
    assert stored["device"] == "cpu x 8"
    # The CPU does not tell what it has held; everything else is known here.
    assert [n for n, v in stored.items() if v is None] == ["peak_device_bytes"]


def test_every_number_tells_where_it_comes_from():
    stored = make_ledger().json()
    sources = stored["sources"]
    assert set(sources) == set(stored) - {"version", "sources"}
    assert sources["step_flops"] == "counted"
    assert sources["step_peak_bytes"] == "estimated"
    assert sources["step_median_seconds"] == "measured"
    told = {n for n, s in sources.items() if s == "estimated"}
    assert told == {n for n in sources if "compiler" in n} | {
        "step_peak_bytes", "step_temp_bytes", "step_code_bytes",
    }  # fmt: skip


def test_a_ledger_of_nothing_knows_nothing_but_the_machine():
    known = {n for n, v in CostLedger.gather().json().items() if v is not None}
    assert known == {
        "version",
        "sources",
        "device",
        "num_trials",
        "peak_resident_bytes",
    }


def test_loops_of_unknown_length_make_the_count_inexact():
    assert not CostLedger.gather(flops=Flops(1.0, {}, unbounded=1)).step_flops_exact


def test_what_is_not_a_ledger_is_refused():
    stored = make_ledger().json()
    with pytest.raises(Corrupt, match="version 7"):
        CostLedger.from_json({**stored, "version": 7})
    with pytest.raises(Corrupt, match="step_flops"):
        CostLedger.from_json({**stored, "step_flops": "many"})
    with pytest.raises(Corrupt, match="price"):
        CostLedger.from_json({**stored, "price": 3.0})
    with pytest.raises(ValueError, match="JSON"):
        CostLedger(compile_seconds=float("nan")).text()
