"""What a device has room for: its own word, or the machine's."""

import jax

from lowrank.core import memory
from lowrank.cost.room import SHARE_OF_DEVICE, SHARE_OF_HOST, room


class Device:
    device_kind = "TPU v5 lite"

    def __init__(self, told):
        self.told = told

    def memory_stats(self):
        return self.told


def test_a_device_with_memory_of_its_own_says_how_much(monkeypatch):
    device = Device({"bytes_limit": 1000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 4)
    for count in (1, 4):
        assert room(count) == (1000 * SHARE_OF_DEVICE, "TPU v5 lite")


def test_others_share_the_machine_s(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)] * 4)
    monkeypatch.setattr(memory, "limit", lambda: 1000)
    assert room()[0] == 1000 * SHARE_OF_HOST
    assert room(4)[0] == 250 * SHARE_OF_HOST
    monkeypatch.setattr(memory, "limit", lambda: None)
    assert room() == (None, "nothing")
