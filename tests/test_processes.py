"""The group `processes`, and what one process makes of what several do together."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.core.errors import BadInput
from lowrank.io.onlooker import Onlooker
from lowrank.io.record import Record
from lowrank.sharding import processes
from lowrank.sharding.mesh import MeshSpec, for_host, put, replicate
from lowrank.sharding.processes import Processes, agree, gather, told, trouble

WRONG = {
    "count = 2 needs processes.index": {"count": 2},
    "needs processes.coordinator": {"count": 2, "index": 0},
    "index = 2 is none of 0 to 1": {"count": 2, "index": 2, "coordinator": "a:1"},
    "coordinator is host:port": {"count": 2, "index": 0, "coordinator": "a"},
    "count is at least 1": {"count": 0, "index": 0, "coordinator": "a:1"},
    "index = 1, and processes.count is left": {"count": None, "index": 1},
    "wait_seconds is a time": {"wait_seconds": 0},
    "heartbeat_seconds is a time": {"heartbeat_seconds": 0},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_refused(said):
    with pytest.raises(BadInput) as refused:
        Processes(**WRONG[said])
    assert said in str(refused.value)


@pytest.mark.parametrize("address", ["10.0.0.1:1234", "host-0.pod:80", "[::1]:1234"])
def test_addresses(address):
    assert Processes(count=2, index=1, coordinator=address).coordinator == address


def test_where_no_cluster_says_anything(monkeypatch):
    def initialize(**given):
        assert given["num_processes"] is None
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(BadInput, match="processes=manual"):
        processes.begin(Processes(count=None))


def test_one_process_begins_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    processes.begin(Processes())
    assert not processes.together()
    assert processes.first()


def test_one_process_agrees_with_itself():
    assert gather("ü") == ["ü"]
    assert told({"a": [1, None]}) == {"a": [1, None]}
    agree({"a": "1"}, "")
    assert trouble(None) is None
    assert trouble("x") == "x"


def every_text(monkeypatch, *texts):
    monkeypatch.setattr(processes, "gather", lambda own: list(texts))
    monkeypatch.setattr(jax, "process_count", lambda: len(texts))


def test_what_differs_is_named_with_both_values(monkeypatch):
    every_text(monkeypatch, '{"x": "1", "y": "2"}', '{"x": "1", "y": "3"}')
    with pytest.raises(BadInput) as refused:
        agree({"x": "1", "y": "2"}, "Do better.")
    assert "processes 0 and 1 disagree on y: '2' and '3'. Do better." in str(
        refused.value
    )


def test_what_one_process_lacks_differs(monkeypatch):
    every_text(monkeypatch, '{"x": "1"}', "{}")
    with pytest.raises(BadInput, match="disagree on x: '1' and None"):
        agree({"x": "1"}, "")


def test_the_first_trouble_is_everyones(monkeypatch):
    every_text(monkeypatch, "", "disk", "net")
    assert trouble(None) == "process 1: disk"


def test_an_onlooker_forgets_whatever_a_record_writes(tmp_path):
    reads = {"path", "open", "directory", "writes"}
    public = {
        name
        for name, _ in inspect.getmembers(Record)
        if not name.startswith("_") and name not in reads
    }
    assert public <= vars(Onlooker).keys()
    with Onlooker(tmp_path, None) as record:
        record.write_json("a.json", {})
        record.save_arrays("a", x=np.zeros(1))
        record.save_predictions("test", x=np.zeros(1))
        record.set_status("failed", "so")
        assert record.finished is None
        record.result({"steps": 1})
    assert record.finished == {"steps": 1}
    assert not list(tmp_path.iterdir())


def test_arrays_are_put_whole_keys_among_them():
    mesh = MeshSpec(data=2, fsdp=2).build()
    where = NamedSharding(mesh, PartitionSpec("data"))
    keys = jax.random.split(jax.random.key(0), 4)
    found = put({"x": jnp.arange(4), "keys": keys}, {"x": where, "keys": where})
    np.testing.assert_array_equal(found["x"], np.arange(4))
    assert found["x"].sharding == where
    np.testing.assert_array_equal(
        jax.random.key_data(found["keys"]), jax.random.key_data(keys)
    )
    assert replicate(np.ones(3), mesh).sharding.is_fully_replicated


def test_one_process_reads_trials_where_they_are():
    mesh = MeshSpec(trial=2, data=2).build()
    assert for_host(mesh).spec == PartitionSpec("trial")
