"""No damage to any file of a run gives another value: the same, or an error."""

import json
import random
import shutil
import types

import jax
import numpy as np
import pytest
from lives import live, long_config, same_run

from lowrank.core.errors import CORRUPT, PREEMPTED, LowrankError
from lowrank.core.trees import fingerprint
from lowrank.io import record as records
from lowrank.io.checkpoints import Checkpoints
from lowrank.io.integrity import Integrity
from lowrank.io.peft import read_adapter
from lowrank.io.record import Record
from lowrank.io.seals import read_sealed, write_sealed
from lowrank.io.steps import INTEGRITY_FILE
from lowrank.io.view import load_record
from lowrank.run import stored
from lowrank.track.jsonl import JsonlTracker

pytestmark = pytest.mark.faults

SEED = 22
FLIPS = 2
STOP = 13


def damages(data, chance):
    """(name, what is left of a file) for each way of damaging it; None: nothing."""
    yield "gone", None
    yield "emptied", b""
    yield "halved", data[: len(data) // 2]
    yield "a byte short", data[:-1]
    middle = len(data) // 2
    yield (
        "a block of zeros",
        data[:middle]
        + bytes(len(data[middle : middle + 512]))
        + (data[middle + 512 :]),
    )
    for number in range(FLIPS):
        place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        flipped = bytes([data[place] ^ bit])
        yield f"bit {number}", data[:place] + flipped + data[place + 1 :]


def each_damage(directory, copy, chance):
    """Damages a copy in every way, one at a time: (place, damaged?)."""
    files = sorted(
        p.relative_to(directory) for p in directory.rglob("*") if p.is_file()
    )
    for file in files:
        data = (directory / file).read_bytes()
        for name, left in damages(data, chance) if data else ():
            if left == data:
                continue
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(directory, copy)
            if left is None:
                (copy / file).unlink()
            else:
                (copy / file).write_bytes(left)
            yield f"{file}: {name}"


def plain(value):
    """As text, so that NaN is NaN."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else repr(value)


def everything(directory):
    """All that can be read from a finished run."""
    run = stored.load_run(directory)
    view = run.record
    adapter = read_adapter(directory / "adapter")
    return {
        "config": plain(view.config),
        "environment": plain(view.environment),
        "result": plain(view.result),
        "costs": plain(view.costs),
        "metrics": view.metrics.to_json(),
        "ranks": plain(view.arrays("ranks")),
        "predictions": [plain(view.predictions(n)) for n in ("validation", "test")],
        "status": plain(view.status),
        "weights": fingerprint({"trained": run.trained, "dials": run.dials}),
        "classes": run.classes,
        "adapter": {
            name: (plain(one.a), plain(one.b), one.scale)
            for name, one in adapter.corrections.items()
        },
        "whole": plain(dict(adapter.whole)),
    }


@pytest.mark.fault(
    "bit flips, truncation, zeros and loss of every file of a finished run",
    "whatever reads it (record, weights, adapter) gives the same or an error",
)
def test_damage_to_a_finished_run_is_never_silent(
    undisturbed, tmp_path, outcomes, monkeypatch
):
    print(f"seed {SEED}")
    run = stored.load_run(undisturbed)
    # Neither depends on the files damaged here, and both take seconds.
    monkeypatch.setattr(stored, "reopen_base", lambda *given: (run.base, None))
    own = types.SimpleNamespace(alone=[run.adapted])
    monkeypatch.setattr(stored, "adapt", lambda *a, **k: own)
    expected = everything(undisturbed)
    for place in each_damage(undisturbed, tmp_path / "copy", random.Random(SEED)):
        try:
            found = everything(tmp_path / "copy")
        except LowrankError:
            outcomes("refused")
        else:
            assert found == expected, f"SILENT: {place}"
            outcomes("same")
    assert outcomes["refused"] > 60


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    config = long_config(world, folder / "run", f"loop.stop_after={STOP}")
    assert live(world, config, folder / "log") == PREEMPTED
    return folder / "run"


def like_of(directory):
    """The shapes of the stored state, by path."""
    content = (directory / "checkpoints" / str(STOP) / INTEGRITY_FILE).read_bytes()
    key = jax.random.key(0).dtype
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, key if leaf.key_impl else leaf.dtype)
        for path, leaf in Integrity.parse(content).leaves.items()
    }


def continued(directory, config, identity, like):
    """What a continuing run would start from: (position, everything it has)."""
    with Record.open(directory, config=config, identity=identity) as record:
        jsonl = JsonlTracker(record.path("metrics.jsonl"))
        checkpoints = Checkpoints(record.path("checkpoints"), identity=identity)
        if not checkpoints.stored_steps():
            return 0, None
        _, state, extra = checkpoints.restore(like)
        (mark,) = extra["metrics"]
        jsonl.truncate(mark["offset"], mark["sha256"])
        metrics = (directory / "metrics.jsonl").read_text()
        costs = record.read_json("costs.json")
    found = (fingerprint(state), extra["memory"], metrics, costs)
    return extra["memory"]["position"], found


@pytest.mark.fault(
    "bit flips, truncation, zeros and loss of every file of an interrupted run",
    "it continues from the same state, from the step before, or is refused",
)
def test_damage_to_an_interrupted_run_is_never_silent(
    world, interrupted, undisturbed, config_of, tmp_path, outcomes, monkeypatch
):
    print(f"seed {SEED}")
    monkeypatch.setattr(records, "describe_environment", lambda: {"host": "here"})
    config = config_of(interrupted)
    identity = read_sealed(interrupted / "status.json")["identity"]
    like = like_of(interrupted)
    copy = tmp_path / "copy"
    steps = sorted(int(p.name) for p in (interrupted / "checkpoints").iterdir())
    expected = {0: None}
    for step in reversed(steps):
        shutil.copytree(interrupted, copy)
        for later in [s for s in steps if s > step]:
            shutil.rmtree(copy / "checkpoints" / str(later))
        position, found = continued(copy, config, identity, like)
        expected[position] = found
        shutil.rmtree(copy)
    assert sorted(expected) == [0, *steps]
    for place in each_damage(interrupted, copy, random.Random(SEED)):
        try:
            position, found = continued(copy, config, identity, like)
        except LowrankError:
            outcomes("refused")
        else:
            assert found == expected[position], f"SILENT: {place}"
            outcomes("same" if position == STOP else "step before")
    assert outcomes["refused"] > 10
    assert outcomes["step before"] > 10


@pytest.mark.fault(
    "a damaged run continued to its end",
    "the same bits as without damage, or exit 78",
)
def test_damaged_runs_end_equal_or_refused(
    world, interrupted, undisturbed, config_of, tmp_path, outcomes
):
    print(f"seed {SEED + 1}")
    chance = random.Random(SEED + 1)
    # The same place on the file system: it is part of what is recorded.
    newest = f"checkpoints/{STOP}"
    files = [p for p in (interrupted / newest).rglob("*") if p.is_file()]
    chosen = [*chance.sample(sorted(files), 3), interrupted / "metrics.jsonl"]
    for number, file in enumerate(chosen):
        directory, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        shutil.copytree(interrupted, directory)
        data = file.read_bytes()
        name, left = chance.choice(list(damages(data, chance))[1:])
        (directory / file.relative_to(interrupted)).write_bytes(left)
        code = live(world, config_of(directory), log)
        print(file.relative_to(interrupted), name, code)
        assert code in (0, CORRUPT), log.read_text()
        if code == 0:
            same_run(undisturbed, directory)
        outcomes("same" if code == 0 else "exit 78")


HOSTILE = {
    "no object": b"[]",
    "deeply nested": b"[" * 100_000,
    "not UTF-8": b'{"schema": "\xff\xfe"}',
    "a NUL": b'{"schema": 1\0}',
    "a huge number": b'{"schema": 1' + b"0" * 10_000 + b"}",
    "NaN": b'{"schema": NaN}',
    "a list as schema": b'{"schema": [1], "identity": {}, "status": "done"}',
    "the same key twice": b'{"schema": 1, "schema": 1, "identity": {}}',
}
METADATA = ("status.json", f"checkpoints/{STOP}/{INTEGRITY_FILE}",
            f"checkpoints/{STOP}/_CHECKPOINT_METADATA",
            f"checkpoints/{STOP}/state/_METADATA")  # fmt: skip


@pytest.mark.fault(
    "hostile metadata: no object, deep nesting, not UTF-8, NUL, huge numbers, NaN",
    "the same, the step before, or an error of ours; never a crash",
)
def test_hostile_metadata(interrupted, config_of, tmp_path, outcomes, monkeypatch):
    monkeypatch.setattr(records, "describe_environment", lambda: {"host": "here"})
    identity = read_sealed(interrupted / "status.json")["identity"]
    config, like = config_of(interrupted), like_of(interrupted)
    copy = tmp_path / "copy"
    shutil.copytree(interrupted, copy)
    pristine = continued(copy, config, identity, like)
    for file in METADATA:
        for content in HOSTILE.values():
            shutil.rmtree(copy)
            shutil.copytree(interrupted, copy)
            assert (copy / file).exists(), file
            (copy / file).write_bytes(content)
            try:
                position, found = continued(copy, config, identity, like)
            except LowrankError:
                outcomes("refused")
            else:
                assert (position, found) == pristine or position < STOP, file
                outcomes("same" if position == STOP else "step before")


def reschema(path, **changes):
    write_sealed(path, read_sealed(path) | changes)


@pytest.mark.fault(
    "schema of the future or of nobody, in record, checkpoint, weights and adapter",
    "refused by name of the schema; nothing is read in part",
)
def test_another_schema_is_refused(undisturbed, interrupted, tmp_path, outcomes):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from lowrank.io import integrity

    for number in (0, 2, 99, "one", None):
        copy = tmp_path / f"finished-{number}"
        shutil.copytree(undisturbed, copy)
        reschema(copy / "status.json", schema=number)
        with pytest.raises(LowrankError, match=f"schema {number!r}"):
            load_record(copy)
        reschema(copy / "adapter/lowrank.json", schema=number)
        with pytest.raises(LowrankError, match=f"schema {number!r}"):
            read_adapter(copy / "adapter")
        path = copy / "trained.safetensors"
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        save_file(arrays, path, metadata | {"schema": str(number)})
        with pytest.raises(LowrankError, match=f"schema '{number}'"):
            stored.read_trained(copy, arrays, metadata["base"])
        outcomes["refused"] += 3
        copy = tmp_path / f"interrupted-{number}"
        shutil.copytree(interrupted, copy)
        path = copy / "checkpoints" / str(STOP) / INTEGRITY_FILE
        body = json.loads(path.read_text())["body"] | {"layout": number}
        text = json.dumps({"sha256": integrity._digest(body), "body": body})
        path.write_text(text)
        identity = read_sealed(copy / "status.json")["identity"]
        checkpoints = Checkpoints(copy / "checkpoints", identity=identity)
        with pytest.raises(LowrankError, match=f"layout {number!r}"):
            checkpoints.restore(like_of(interrupted))
        outcomes("refused")
