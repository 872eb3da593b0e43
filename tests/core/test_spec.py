"""Specs check their fields, configs name things from catalogues, digests are stable."""

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np
import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.spec import build, digest, fields_of, refuse_targets, spec


@spec
class Cook:
    name: str = "anna"
    salt: float = 1.0
    pinches: int = 2
    style: Literal["slow", "fast"] = "slow"
    spice: float | None = None
    tasted: bool = False

    def __post_init__(self):
        if self.pinches < 0:
            raise BadInput("pinches")


@spec
class Pot:
    litres: float


@spec
class Lid:
    width: float
    holes: float = 1.0

    later: ClassVar = {"holes": 1.0}


CATALOGUE = {"pot": Pot}


def test_what_a_parent_checks_is_checked_of_its_children():
    @spec
    class Pastry(Cook):
        sugar: int = 1

    assert Pastry(sugar=2).pinches == 2
    with pytest.raises(BadInput, match="pinches"):
        Pastry(pinches=-1)
    with pytest.raises(BadInput, match=r"Pastry\.sugar must be int"):
        Pastry(sugar="much")


def test_a_spec_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pot(litres=1.0).litres = 2.0
    with pytest.raises(TypeError):
        Pot(1.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"salt": "1"}, r"Cook\.salt must be float, not '1' \(str\)"),
        ({"pinches": 1.5}, r"Cook\.pinches must be int"),
        ({"pinches": True}, r"Cook\.pinches must be int, not True"),
        ({"salt": False}, r"Cook\.salt must be float, not False"),
        ({"spice": True}, r"Cook\.spice"),
        ({"tasted": 1}, r"Cook\.tasted must be bool"),
        ({"style": "raw"}, r"Cook\.style.*slow.*fast"),
        ({"name": 3}, r"Cook\.name must be str"),
        ({"pinches": -1}, "pinches"),
    ],
)
def test_a_wrong_field_is_refused(fields, words):
    with pytest.raises(BadInput, match=words):
        Cook(**fields)


def test_right_fields_are_taken():
    cook = Cook(salt=2, spice=None, tasted=True, style="fast")
    assert (cook.salt, cook.tasted) == (2, True)


def test_fields_named_name_are_fields():
    assert "name" in fields_of(Cook)
    assert digest(Cook(name="anna")) != digest(Cook(name="bert"))


def test_build_takes_a_name_and_fields():
    assert build({"name": "pot", "litres": 3}, CATALOGUE, "kitchen") == Pot(litres=3)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"name": "pott", "litres": 3}, UnknownName, "kitchen.name is 'pott'.*'pot'"),
        ({"litres": 3}, UnknownName, "None"),
        ({"name": ["pot"]}, UnknownName, "'pot'"),
        ({"name": "pot", "liters": 3}, UnknownName, "kitchen: .*'liters'.*'litres'"),
        ({"name": "pot", "litres": "3"}, BadInput, r"kitchen: Pot\.litres"),
        ({"name": "pot"}, BadInput, "kitchen: Pot needs litres"),
        ({"name": "pot", "_target_": "os.system"}, BadInput, "_target_ is refused"),
        ({"name": "pot", "litres": [{"_partial_": 1}]}, BadInput, r"litres\[0\]"),
    ],
)
def test_build_says_what_is_wrong(config, error, words):
    with pytest.raises(error, match=words):
        build(config, CATALOGUE, "kitchen")


def test_targets_are_refused_at_any_depth():
    refuse_targets({"a": [{"b": 1}], "_private": 2})
    with pytest.raises(BadInput, match=r"config\.a\[0\]\._target_"):
        refuse_targets({"a": [{"_target_": "x"}]})


def test_digests_are_stable_and_sensitive():
    assert digest({"b": 1, "a": [2, None]}) == digest({"a": (2, None), "b": 1})
    assert digest({"b": 1, "a": [2, None]}, 12) == "2b837dfef2b4"
    assert digest(Pot(litres=2)) == digest(Pot(litres=2.0))
    assert digest(Cook(spice=2)) == digest(Cook(spice=2.0))
    assert digest(Cook(pinches=2)) != digest(Cook(pinches=3))
    assert digest(Pot(litres=2.0)) != digest({"litres": 2.0})


def test_a_field_that_came_later_is_told_only_where_it_changes_something():
    assert "later" not in fields_of(Lid)
    assert digest(Lid(width=2)) == digest({"name": "Lid", "width": 2.0})
    assert digest(Lid(width=2, holes=1)) == digest(Lid(width=2))
    assert digest(Lid(width=2, holes=0)) != digest(Lid(width=2))


def test_what_has_no_stable_name_stands_in_no_record():
    assert digest(math.sqrt) == digest(math.sqrt)
    for value in (lambda: None, np.zeros(2), {1, 2}):
        with pytest.raises(BadInput, match="cannot stand in a record"):
            digest(value)
