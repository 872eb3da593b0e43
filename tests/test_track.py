"""Trackers: the file keeps every line, and no service can end or delay a run."""

import json
import logging
import math
import os
import resource
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from lowrank.core.errors import BadInput, CannotWrite, Corrupt
from lowrank.core.spec import build
from lowrank.track import services
from lowrank.track.jsonl import JsonlTracker, decode_number, encode_number
from lowrank.track.services import TensorboardTracker, WandbTracker, wandb_id
from lowrank.track.trackers import Track, Trackers, build_trackers


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_every_call_is_one_line_on_disk_before_it_returns(tmp_path):
    tracker = JsonlTracker(tmp_path / "deep" / "metrics.jsonl")
    tracker.log(1, {"loss": 0.5, "n": 3, "f": np.float32(0.25)})
    tracker.log(2, {"loss": float("nan")})
    tracker.summary({"best": float("-inf")})
    first, second, third = lines_of(tracker.path)
    assert (first["step"], first["loss"], first["n"], first["f"]) == (1, 0.5, 3, 0.25)
    assert abs(first["time"] - time.time()) < 60
    assert second["loss"] == "NaN"
    assert third["summary"] == {"best": "-Infinity"}


@pytest.mark.parametrize("value", [0.1, -0.0, math.inf, -math.inf, math.nan])
def test_numbers_survive_strict_json(value):
    text = json.dumps(encode_number(value), allow_nan=False)
    assert repr(decode_number(json.loads(text))) == repr(value)


def test_a_resumed_file_is_that_of_an_unbroken_run(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"loss": 1.0})
    offset = tracker.offset()
    tracker.log(2, {"loss": 9.0})
    tracker.close("failed")
    with open(tracker.path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    again = JsonlTracker(tracker.path)
    again.truncate(offset)
    again.log(2, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in lines_of(again.path)] == [
        (1, 1.0),
        (2, 2.0),
    ]
    assert again.offset() == tracker.path.stat().st_size


def test_a_line_cut_by_a_kill_never_joins_the_next_one(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    JsonlTracker(path).log(2, {})
    assert [line["step"] for line in lines_of(path)] == [1, 2]
    assert "cut short" in caplog.text


def test_an_offset_that_fits_no_line_is_refused_and_changes_nothing(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"loss": 1.0})
    before = tracker.path.read_bytes()
    for offset in (3, tracker.offset() + 1, -1):
        with pytest.raises(Corrupt, match=f"byte {offset},"):
            tracker.truncate(offset)
    assert tracker.path.read_bytes() == before
    tracker.truncate(0)
    assert tracker.path.read_bytes() == b""


def test_a_metric_may_not_take_the_name_of_a_field(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    with pytest.raises(BadInput, match="time"):
        tracker.log(1, {"time": 1.0})
    assert lines_of(tracker.path) == []


def test_a_full_disk_ends_the_run_and_leaves_whole_lines(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(0, {"loss": 1.0})
    size = tracker.offset()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        with pytest.raises(CannotWrite, match=r"m\.jsonl"):
            Trackers([tracker]).log(1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tracker.offset() == size
    assert [line["step"] for line in lines_of(tracker.path)] == [0]
    with pytest.raises(CannotWrite):
        JsonlTracker(tracker.path / "below-a-file")


class Broken:
    """A tracker that fails in every way."""

    def __init__(self):
        self.calls = 0

    def log(self, step, values):
        self.calls += 1
        raise OSError("network is gone, token=abcdefgh")

    def summary(self, values):
        raise SystemError

    def close(self, status):
        raise ValueError


@pytest.mark.fault(
    "tracker that raises",
    "one warning; the run goes on",
)
def test_a_tracker_that_raises_costs_one_warning_and_nothing_else(tmp_path, caplog):
    broken, jsonl = Broken(), JsonlTracker(tmp_path / "m.jsonl")
    trackers = Trackers([broken, jsonl])
    for step in range(3):
        trackers.log(step, {"loss": 1.0})
    trackers.summary({"best": 1.0})
    trackers.close("done")
    assert broken.calls == 1
    assert len(lines_of(jsonl.path)) == 4
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "Broken is left out" in warned[0]
    assert "abcdefgh" not in warned[0]


def test_nothing_of_wandb_is_loaded_when_it_is_disabled(tmp_path):
    code = """
        import sys
        from lowrank.track.jsonl import JsonlTracker
        from lowrank.track.trackers import Track, build_trackers
        jsonl = JsonlTracker(sys.argv[1] + "/m.jsonl")
        trackers = build_trackers(
            Track(wandb="disabled"), jsonl, name="n", run_id="i", config={},
            directory=sys.argv[1])
        trackers.log(0, {"a": 1.0})
        trackers.close("done")
        assert not {"wandb", "tensorboardX"} & set(sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl"]


def start(tmp_path, jsonl, **changes):
    settings = {
        "name": "a run",
        "run_id": "sweep/1:abc",
        "config": {"optim": {"rate": 0.1}, "ranks": {"a.b": 2}},
        "directory": tmp_path,
    }
    return build_trackers(Track(wandb="offline"), jsonl, **(settings | changes))


def read_wandb(path):
    """History rows of a finished offline run; W&B writes the last of them late."""
    deadline = time.monotonic() + 30
    while not (rows := parse_wandb(path.read_bytes())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return rows


def parse_wandb(data):
    """History rows of W&B's log file."""
    rows = []
    for record in records_of(data):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            names = [item.key or "/".join(item.nested_key) for item in items]
            values = [json.loads(item.value_json) for item in items]
            rows.append(dict(zip(names, values, strict=True)))
    return rows


def records_of(data):
    """Reads W&B's log file. Its format is private, so only a test does so."""
    from wandb.proto import wandb_internal_pb2

    place, parts = 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        parts = parts * (kind in (3, 4)) + data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)


def test_an_offline_run_needs_no_network_and_tells_no_secret(
    tmp_path, monkeypatch, capfd
):
    secrets = [f"canary{i}{'z' * 24}" for i in range(4)]
    monkeypatch.setenv("SERVICE_TOKEN", secrets[0])
    monkeypatch.setattr(sys, "argv", ["run.py", f"api_key={secrets[1]}"])
    monkeypatch.setattr(
        socket.socket, "connect", _only_local(socket.socket.connect), raising=True
    )
    jsonl = JsonlTracker(tmp_path / "m.jsonl")
    config = {
        "hub": {"token": secrets[2], "url": f"x{secrets[0]}"},
        "marker": "visible",
    }
    trackers = start(tmp_path, jsonl, config=config, name=f"password={secrets[3]}")
    print(secrets[0])
    trackers.log(1, {"loss": 0.5})
    trackers.summary({"best": 0.5})
    trackers.close("done")
    files = [p for p in (tmp_path / "wandb").rglob("*") if p.is_file()]
    data = b"".join(p.read_bytes() for p in files)
    assert b"visible" in data
    assert b"canary" not in data
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert [(row["_step"], row["loss"]) for row in read_wandb(run)] == [(1, 0.5)]
    assert "wandb" not in capfd.readouterr().err


def _only_local(connect):
    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    return guarded


def test_an_offline_run_that_is_resumed_is_told_from_its_beginning(tmp_path):
    jsonl = JsonlTracker(tmp_path / "m.jsonl")
    trackers = start(tmp_path, jsonl)
    trackers.log(1, {"loss": 1.0})
    offset = jsonl.offset()
    trackers.log(2, {"loss": 9.0})
    trackers.close("preempted")
    again = JsonlTracker(jsonl.path)
    again.truncate(offset)
    trackers = start(tmp_path, again, first_step=2)
    trackers.log(2, {"loss": math.inf})
    trackers.close("done")
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    rows = [(row["_step"], row["loss"]) for row in read_wandb(run)]
    assert rows == [(1, 1.0), (2, math.inf)]
    assert len(list((tmp_path / "wandb").glob("superseded-offline-run-*"))) == 1


@pytest.mark.parametrize(
    ("status", "code", "marked"),
    [("done", 0, False), ("failed", 1, False), ("preempted", 1, True)],
)
def test_a_run_that_was_stopped_is_told_from_one_that_failed(
    tmp_path, status, code, marked
):
    trackers = start(tmp_path, JsonlTracker(tmp_path / "m.jsonl"))
    trackers.log(1, {"loss": 1.0})
    trackers.close(status)
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert read_wandb(run)
    records = [*records_of(run.read_bytes())]
    kinds = [record.WhichOneof("record_type") for record in records]
    assert ("preempting" in kinds) == marked
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [code]


def test_several_wandb_runs_live_side_by_side(tmp_path):
    runs = [
        WandbTracker(
            "offline",
            project="p",
            name=str(i),
            run_id=f"r{i}",
            config={},
            directory=tmp_path,
        )
        for i in range(3)
    ]
    for step in range(2):
        for number, run in enumerate(runs):
            run.log(step, {"x": 10.0 * number + step})
    for run in runs:
        assert run.alive
        run.close("done")
    for number in range(3):
        (file,) = (tmp_path / "wandb").glob(f"offline-run-*-r{number}/*.wandb")
        assert [row["x"] for row in read_wandb(file)] == [10 * number, 10 * number + 1]


@pytest.mark.faults
@pytest.mark.fault(
    "W&B server that never answers",
    "delays a run by seconds",
)
def test_a_server_that_never_answers_delays_a_run_by_seconds_only(tmp_path):
    code = """
        import sys, time
        from lowrank.track import services
        services._INIT_SECONDS = services._FINISH_SECONDS = 2.0
        begin = time.time()
        tracker = services.WandbTracker(
            "online", project="p", name="n", run_id="i", config={},
            directory=sys.argv[1])
        tracker.log(0, {"a": 1.0})
        tracker.close("done")
        assert not tracker.alive
        print(time.time() - begin)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = os.environ | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "0123456789" * 4,
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30
    assert done.stderr.count("W&B is left out") == 1
    assert "0123456789" not in done.stderr + done.stdout


def test_an_error_of_wandb_silences_it_with_one_warning(tmp_path, caplog, monkeypatch):
    import wandb

    def refuse(**settings):
        raise wandb.errors.CommError("no route, api_key=abcdefghij")

    monkeypatch.setattr(wandb, "init", refuse)
    jsonl = JsonlTracker(tmp_path / "m.jsonl")
    trackers = start(tmp_path, jsonl)
    trackers.log(1, {"loss": 1.0})
    trackers.close("done")
    assert caplog.text.count("W&B is left out") == 1
    assert "abcdefghij" not in caplog.text
    assert len(lines_of(jsonl.path)) == 1


@pytest.mark.parametrize(
    ("mode", "key", "netrc", "expected"),
    [
        ("", "", False, "offline"),
        ("", "k" * 40, False, "online"),
        ("", "", True, "online"),
        ("offline", "k" * 40, True, "offline"),
        ("disabled", "k" * 40, False, "disabled"),
    ],
)
def test_auto_is_online_only_with_a_key(
    tmp_path, monkeypatch, mode, key, netrc, expected
):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    if netrc:
        file = tmp_path / "netrc"
        file.write_text(f"machine wandb.example login user password {'k' * 40}")
        file.chmod(0o600)
        monkeypatch.setenv("NETRC", str(file))
    assert services._automatic_mode() == expected


def test_ids_are_clean_and_stay_distinct():
    assert wandb_id("sweep-ab12_3") == "sweep-ab12_3"
    names = ["a/b", "a-b", "a:b", "../../evil<script>", "x" * 300, "x" * 301, ""]
    ids = [wandb_id(name) for name in names]
    assert len(set(ids)) == len(ids)
    assert all(len(one) <= 64 and not set(one) & set("/\\#?%:<>. ") for one in ids)


def test_tensorboard_files_are_written_or_the_extra_is_named(tmp_path, monkeypatch):
    tracker = TensorboardTracker(tmp_path / "tb")
    tracker.log(1, {"loss": 0.5})
    tracker.summary({"best": 0.5})
    tracker.close("done")
    (file,) = (tmp_path / "tb").iterdir()
    assert b"summary/best" in file.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(BadInput, match=r"lowrank\[tensorboard\]"):
        TensorboardTracker(tmp_path / "tb")


def test_an_unknown_mode_is_refused_by_name():
    with pytest.raises(BadInput, match=r"track.*wandb.*sometimes"):
        build({"name": "track", "wandb": "sometimes"}, {"track": Track}, "track")
