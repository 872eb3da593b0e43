"""Checkpoints keep their promises when files, processes and disks fail."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput, CannotWrite, Corrupt
from lowrank.core.trees import fingerprint
from lowrank.io import integrity
from lowrank.io.checkpoints import Checkpoints

IDENTITY = {"config": "c", "base": "b"}
EXTRA = {"position": 12, "seed": "x"}
STATE = {
    "trained": {"w": jax.random.normal(jax.random.key(0), (16, 8))},
    "age": jnp.int32(3),
    "key": jax.random.key(9),
    "empty": jnp.zeros((0, 2)),
}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)


def open_at(directory) -> Checkpoints:
    return Checkpoints(directory, identity=IDENTITY)


def store(directory, *steps: int) -> None:
    with open_at(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, STATE, EXTRA)


def step_files(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip_payload(step) -> None:
    """Flips one bit in every large data file, where the numbers are."""
    for path in step.glob("state/**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def rewrite_body(step, **changes) -> None:
    """Edits a list of hashes as a later version would write it, hash included."""
    path = step / "integrity/data.json"
    body = json.loads(path.read_text())["body"] | changes
    path.write_text(json.dumps({"sha256": integrity._digest(body), "body": body}))


def damages():
    """(name of the damage, function of the old bytes and a random source)."""
    yield "empty", lambda data, rng: b""
    yield "half", lambda data, rng: data[: len(data) // 2]
    yield "one byte short", lambda data, rng: data[:-1]
    for number in range(2):

        def flip(data, rng):
            place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]

        yield f"bit {number}", flip


@pytest.mark.faults
@pytest.mark.fault(
    "damage to any file of a checkpoint",
    "the stored values, or refused",
)
def test_no_damage_to_any_file_gives_a_wrong_value(tmp_path):
    store(tmp_path / "whole", 1)
    rng = random.Random(0)
    outcomes = {"same": 0, "refused": 0}
    for number in range(len(step_files(tmp_path / "whole"))):
        for name, damage in damages():
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "whole", copy)
            path = step_files(copy)[number]
            if data := path.read_bytes():
                path.write_bytes(damage(data, rng))
                try:
                    step, restored, extra = open_at(copy).restore(LIKE)
                except Corrupt:
                    outcomes["refused"] += 1
                else:
                    place = f"{path.relative_to(copy)}: {name}"
                    assert (step, extra) == (1, EXTRA), place
                    assert fingerprint(restored) == fingerprint(STATE), place
                    outcomes["same"] += 1
            shutil.rmtree(copy)
    assert outcomes["refused"] > 15
    assert sum(outcomes.values()) > 50


def test_a_flipped_bit_in_the_numbers_falls_back_loudly_to_the_step_before(
    tmp_path, caplog
):
    store(tmp_path, 1, 2)
    flip_payload(tmp_path / "2")
    with open_at(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore(LIKE)
        assert step == 1
        assert fingerprint(restored) == fingerprint(STATE)
        errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert len(errors) == 1
        assert "checkpoint 2" in errors[0]
        assert "DAMAGED" in errors[0]
        # The run goes on and stores step 2 again; the damaged one is kept aside.
        checkpoints.save(2, STATE)
    assert (tmp_path / "2.damaged-1").is_dir()
    assert open_at(tmp_path).restore(LIKE)[0] == 2


@pytest.mark.fault(
    "a flipped bit that Orbax restores as another number",
    "found by the hash of its leaf",
)
def test_a_flipped_bit_that_orbax_restores_as_a_number_is_found_by_its_hash(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    payload = max(tmp_path.glob("1/state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 4
    payload.write_bytes(data)
    like = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    for step in (None, 1):
        with pytest.raises(Corrupt, match="leaf w does not have the stored hash"):
            open_at(tmp_path).restore(like, step)


def test_when_all_steps_are_damaged_every_reason_is_named(tmp_path):
    store(tmp_path, 1, 2)
    for step in ("1", "2"):
        (tmp_path / step / "integrity/data.json").write_text("{}")
    checkpoints = open_at(tmp_path)
    assert checkpoints.good_steps() == ()
    assert checkpoints.stored_steps() == (1, 2)
    with pytest.raises(Corrupt, match=r"2: its list .*; 1: its list .*force=true"):
        checkpoints.restore(LIKE)


@pytest.mark.fault(
    "stray, half-copied, linked or unfinished steps among the checkpoints",
    "ignored with one warning each",
)
def test_whatever_else_lies_in_the_directory_is_ignored_with_one_warning(
    tmp_path, tmp_path_factory, caplog
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    store(elsewhere, 10, 14)
    store(tmp_path, 1, 2)
    (tmp_path / "9").mkdir()
    shutil.copytree(tmp_path / "2", tmp_path / "8", ignore=lambda *_: ["integrity"])
    shutil.copytree(tmp_path / "2", tmp_path / "7")
    (tmp_path / "10").symlink_to(elsewhere / "10")
    shutil.copytree(tmp_path / "2", tmp_path / "11.orbax-checkpoint-tmp")
    (tmp_path / "12").write_text("a file")
    shutil.copytree(tmp_path / "2", tmp_path / "013")
    shutil.copytree(elsewhere / "14", tmp_path / "14")
    (tmp_path / "14/commit_success.txt").unlink()
    checkpoints = open_at(tmp_path)
    for _ in range(3):
        assert checkpoints.good_steps() == (1, 2)
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(texts) == 8
    for name in ("9", "8", "7", "10", "11.orbax-checkpoint-tmp", "12", "013", "14"):
        assert sum(f"{tmp_path / name}:" in text for text in texts) == 1, name
    assert checkpoints.restore(LIKE)[0] == 2


def test_a_stray_step_blocks_no_save_and_is_kept_aside(tmp_path):
    store(tmp_path, 1)
    (tmp_path / "2").mkdir()
    (tmp_path / "2/precious").write_text("x")
    store(tmp_path, 2)
    assert open_at(tmp_path).good_steps() == (1, 2)
    assert (tmp_path / "2.damaged-1/precious").read_text() == "x"


def test_a_step_of_a_later_layout_is_refused_not_skipped(tmp_path):
    store(tmp_path, 1, 2)
    rewrite_body(tmp_path / "2", layout=7)
    assert open_at(tmp_path).good_steps() == (1,)
    with pytest.raises(Corrupt, match=r"layout 7.*reads layout 1.*Install"):
        open_at(tmp_path).restore(LIKE)


@pytest.mark.fault(
    "disk full in a save",
    "reported at once, tried once more, then exit 73; old steps stay",
)
def test_a_full_disk_is_reported_once_retried_and_then_raised(tmp_path, caplog):
    big = {"w": jax.random.normal(jax.random.key(0), (512, 1024))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, big)
    checkpoints.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, before[1]))
        checkpoints.save(2, big)
        with pytest.raises(
            CannotWrite, match=r"failure 2 in a row; good steps are \[1\]"
        ):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [r.levelno for r in caplog.records if "checkpoint 2" in r.getMessage()] == [
        logging.ERROR
    ]
    like = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    assert open_at(tmp_path).restore(like)[0] == 1
    checkpoints.save(3, big)
    checkpoints.close()
    assert open_at(tmp_path).good_steps() == (1, 3)


@pytest.mark.fault(
    "disk full for a moment",
    "the save is made again; nothing is lost",
)
def test_a_disk_that_was_full_for_a_moment_costs_nothing(tmp_path, caplog):
    big = {"w": jax.random.normal(jax.random.key(0), (512, 1024))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_at(tmp_path) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, before[1]))
            checkpoints.save(1, big)
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoints.wait()
    assert open_at(tmp_path).good_steps() == (1,)
    assert "One more attempt" in caplog.text


def test_a_parent_that_is_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    checkpoints = open_at(tmp_path / "file" / "checkpoints")
    with pytest.raises(CannotWrite, match="in a row"):
        checkpoints.save(1, STATE)
    assert checkpoints._pending is None


def test_the_error_that_ended_a_run_is_not_masked_by_a_failed_save(tmp_path, caplog):
    (tmp_path / "file").write_text("x")

    def fail():
        raise OSError("disk gone")

    def run():
        with open_at(tmp_path / "run") as checkpoints:
            checkpoints.save(1, STATE)
            checkpoints.wait()
            checkpoints.save(2, STATE)
            checkpoints._pending.result = fail
            checkpoints.directory = tmp_path / "file"
            raise BadInput("the real reason")

    with pytest.raises(BadInput, match="the real reason"):
        run()
    assert "failure 2 in a row" in caplog.text


CHILD = """
    import os
    os.environ["JAX_PLATFORMS"] = "cpu"
    import sys
    import jax.numpy as jnp
    from lowrank.io.checkpoints import Checkpoints

    checkpoints = Checkpoints(sys.argv[1], identity={"config": "c", "base": "b"})
    first = max(checkpoints.good_steps(), default=0) + 1
    for step in range(first, first + 10_000):
        w = jnp.arange(400_000, dtype=jnp.float32) * step
        checkpoints.save(step, {"w": w}, {"step": step})
        print(step, flush=True)
"""


@pytest.mark.faults
@pytest.mark.fault(
    "kill -9 in a save",
    "a step that is listed is whole and right; at most the save under way is lost",
)
def test_a_kill_in_a_save_never_leaves_a_step_that_is_not_whole(tmp_path):
    rng = random.Random(1)
    like = {"w": jax.ShapeDtypeStruct((400_000,), jnp.float32)}
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started = [int(child.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.2))
        os.kill(child.pid, signal.SIGKILL)
        started += [int(line) for line in child.stdout.read().split()]
        child.wait()
        step, restored, extra = open_at(tmp_path).restore(like)
        assert started[-1] - 1 <= step <= started[-1] + 1
        assert extra == {"step": step}
        expected = np.arange(400_000, dtype=np.float32) * np.float32(step)
        np.testing.assert_array_equal(restored["w"], expected)
