"""Keys come from names; errors carry the exit code a scheduler reads."""

import jax
import numpy as np
import pytest

from lowrank.core import errors
from lowrank.core.errors import BadInput, exit_code, nearest
from lowrank.core.keys import key_for, name_hash, numbered_keys

ROOT = jax.random.key(0)


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_names_hash_alike_in_every_process():
    assert name_hash("encoder/layer/query/kernel") == 245792854


def test_keys_depend_on_every_name_and_on_their_order():
    found = {
        data(key_for(*names))
        for names in [
            (ROOT,), (ROOT, "a"), (ROOT, "b"), (ROOT, "a", "b"), (ROOT, "b", "a"),
            (ROOT, "ab"), (ROOT, "a", 0), (ROOT, "a", 1), (jax.random.key(1), "a"),
        ]
    }  # fmt: skip
    assert len(found) == 9
    assert data(key_for(ROOT, "a", "b")) == data(key_for(key_for(ROOT, "a"), "b"))


def test_raw_key_data_is_no_key():
    with pytest.raises(BadInput, match=r"jax\.random\.key"):
        key_for(jax.random.PRNGKey(0), "a")


def test_the_first_keys_do_not_depend_on_how_many_there_are():
    few, many = numbered_keys(ROOT, 2), numbered_keys(ROOT, 9)
    assert data(few) == data(many[:2])
    assert len({data(key) for key in many}) == 9
    # The promise must not hang on how `split` is implemented today.
    assert data(many[5]) == data(jax.random.fold_in(ROOT, 5))


def test_exit_codes_tell_errors_apart():
    codes = {
        errors.BadInput: 2, errors.UnknownName: 2, errors.CannotWrite: 73,
        errors.Preempted: 75, errors.NonFinite: 77, errors.Corrupt: 78,
        errors.LowrankError: 1, ValueError: 1, KeyboardInterrupt: 1,
    }  # fmt: skip
    assert {kind: exit_code(kind("x")) for kind in codes} == codes


def test_an_error_of_others_keeps_no_code_of_ours():
    class Odd(Exception):
        exit_code = 75

    assert exit_code(Odd()) == 1


def test_nearest_names_come_first():
    assert nearest("kernal", ["bias", "kernel", "scale"]).startswith("'kernel'")
    assert nearest("x", []) == "none"
