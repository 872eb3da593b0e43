"""Checkpoints keep their promises when nothing is damaged."""

import logging
import shutil
from pathlib import Path
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowrank.core.errors import BadInput, Corrupt, NonFinite
from lowrank.core.trees import fingerprint
from lowrank.io.checkpoints import Checkpoints
from lowrank.io.integrity import escape

IDENTITY = {"config": "c1", "base": "b1", "data": "d1", "code": "k1"}
GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint_v1"


def make_state(step: int = 1) -> dict:
    """A state with every kind of leaf and of key that runs have."""
    key = jax.random.key(step)
    return {
        "trained": {
            "layers.0/q_proj": {"a": jax.random.normal(key, (3, 8))},
            "layers.0": {"q_proj/b": jnp.full((2,), step, jnp.bfloat16)},
            "empty": jnp.zeros((0, 4), jnp.float32),
        },
        "dials": {"gate": jnp.arange(8.0) + step, "age": jnp.int32(step)},
        "keys": jax.random.split(key, 4),
        "done": jnp.array([True, False]),
        "bytes": jnp.arange(5, dtype=jnp.int8),
    }


def like(state):
    """Only what `restore` may look at."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def open_at(directory, **changes) -> Checkpoints:
    return Checkpoints(directory, identity=IDENTITY | changes)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    state, extra = make_state(), {"position": 7, "losses": [0.1, 1e-300], "by": None}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(3, state, extra)
    step, restored, found = open_at(tmp_path).restore(like(state))
    assert (step, found) == (3, extra)
    assert fingerprint(restored) == fingerprint(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    kinds = jax.tree.map(lambda x: (str(x.dtype), x.shape, x.sharding), state)
    assert (
        jax.tree.map(lambda x: (str(x.dtype), x.shape, x.sharding), restored) == kinds
    )


def test_typed_keys_draw_the_same_numbers_after_a_restore(tmp_path):
    state = {
        "a": jax.random.key(5),
        "b": jax.random.split(jax.random.key(1, impl="rbg")),
    }
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(0, state)
    _, restored, _ = open_at(tmp_path).restore(like(state))
    assert jax.random.normal(restored["a"]) == jax.random.normal(state["a"])
    assert str(jax.random.key_impl(restored["b"])) == "rbg"


def test_optimizer_states_come_back_in_their_own_containers(tmp_path):
    params = {"w": jnp.ones((2, 3))}
    state = optax.adamw(1e-3).init(params)
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, {"optim": state})
    _, restored, _ = open_at(tmp_path).restore({"optim": like(state)})
    assert jax.tree.structure(restored["optim"]) == jax.tree.structure(state)


def test_a_state_of_empty_arrays_and_none_comes_back(tmp_path):
    state = {"a": jnp.zeros((0, 3), jnp.bfloat16), "b": None}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    _, restored, _ = open_at(tmp_path).restore(like(state))
    assert restored["b"] is None
    assert (restored["a"].shape, restored["a"].dtype) == ((0, 3), jnp.bfloat16)


def test_what_is_done_to_the_arrays_after_save_is_not_stored(tmp_path):
    state = {"w": jnp.arange(100_000.0)}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    _, restored, _ = open_at(tmp_path).restore(
        {"w": jax.ShapeDtypeStruct((100_000,), jnp.float32)}
    )
    np.testing.assert_array_equal(restored["w"], np.arange(100_000, dtype=np.float32))


@pytest.mark.fault(
    "resume on another mesh",
    "the restored arrays are equal to the bit",
)
def test_a_state_moves_to_another_mesh_unchanged(tmp_path):
    line = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    grid = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data")
    state = {
        "w": jnp.arange(64.0).reshape(16, 4),
        "keys": jax.random.split(jax.random.key(0), 8),
    }
    state = jax.device_put(state, NamedSharding(line, spec))
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    wanted = {
        "w": NamedSharding(grid, PartitionSpec("data", "model")),
        "keys": NamedSharding(grid, PartitionSpec("model")),
    }
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        wanted,
    )
    _, restored, _ = open_at(tmp_path).restore(target)
    assert {name: x.sharding for name, x in restored.items()} == wanted
    assert fingerprint(restored) == fingerprint(state)


@pytest.mark.fault(
    "keys that collide when joined with dots",
    "kept apart",
)
def test_keys_that_orbax_would_mix_up_stay_apart(tmp_path):
    state = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}, "a%2Fb": jnp.full(2, 2.0)}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    _, restored, _ = open_at(tmp_path).restore(like(state))
    assert fingerprint(restored) == fingerprint(state)


@pytest.mark.parametrize("path", ["a.b/c", "../../evil", "%2F", "ü ~", ".", "a\nb"])
def test_escaped_paths_are_one_plain_segment_and_reversible(path):
    assert unquote(escape(path)) == path
    assert not set(escape(path)) & set("./ ~\n")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "a/b"),
        ({"": jnp.ones(1)}, "non-empty"),
        ({"a": {0: jnp.ones(1)}}, "integer keys"),
        (jnp.ones(1), "single leaf"),
        ({"a": np.ones(1)}, "jnp.asarray"),
        ({"a": 3}, "int"),
    ],
)
def test_a_state_that_could_not_come_back_is_refused(tmp_path, state, words):
    with open_at(tmp_path) as checkpoints, pytest.raises(BadInput, match=words):
        checkpoints.save(1, state)
    assert open_at(tmp_path).stored_steps() == ()


@pytest.mark.parametrize(
    "extra", [{"x": float("nan")}, {"x": (1, 2)}, {"x": np.ones(2)}, {"a": {1: "b"}}]
)
def test_extra_that_json_would_change_is_refused(tmp_path, extra):
    with open_at(tmp_path) as checkpoints, pytest.raises(BadInput, match="JSON"):
        checkpoints.save(1, {"w": jnp.ones(2)}, extra)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
@pytest.mark.fault(
    "NaN or infinity in a state to be saved",
    "never stored",
)
def test_a_non_finite_state_is_never_stored(tmp_path, dtype, value):
    state = {"good": jnp.ones(2), "trained": {"w": jnp.array([0, value], dtype)}}
    with open_at(tmp_path) as checkpoints:
        with pytest.raises(NonFinite, match=r"trained/w \(1 of 2\)"):
            checkpoints.save(1, state)
        checkpoints.save(1, {"good": jnp.ones(2)})
    assert open_at(tmp_path).good_steps() == (1,)


@pytest.mark.parametrize("step", [2, 1, -1])
def test_steps_that_do_not_increase_are_refused(tmp_path, step):
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(2, make_state())
    with open_at(tmp_path) as again, pytest.raises(BadInput, match="increasing"):
        again.save(step, make_state())


def test_the_newest_steps_are_kept_and_the_others_deleted(tmp_path):
    with Checkpoints(tmp_path, identity=IDENTITY, keep=2) as checkpoints:
        for step in (1, 5, 6, 20):
            checkpoints.save(step, make_state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "6"]
    assert open_at(tmp_path).good_steps() == (6, 20)
    step, restored, _ = open_at(tmp_path).restore(like(make_state()), step=6)
    assert (step, fingerprint(restored)) == (6, fingerprint(make_state(6)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s | {"bytes": jnp.arange(5, dtype=jnp.int16)},
            r"int8\[5\].*int16\[5\]",
        ),
        (lambda s: s | {"done": jnp.ones(3, bool)}, r"bool\[2\].*bool\[3\]"),
        (lambda s: s | {"keys": jax.random.split(jax.random.key(0), 3)}, "keys"),
        (lambda s: s | {"new": jnp.ones(1)}, "lacks new"),
        (lambda s: {k: v for k, v in s.items() if k != "done"}, "unasked, done"),
    ],
)
@pytest.mark.fault(
    "checkpoint with other leaves, shapes or dtypes",
    "refused by name; nothing is cast or left out",
)
def test_a_state_of_another_form_is_refused_not_cast(tmp_path, change, words):
    state = make_state()
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    with pytest.raises(Corrupt, match=words):
        open_at(tmp_path).restore(like(change(state)))


@pytest.mark.parametrize("field", sorted(IDENTITY))
@pytest.mark.fault(
    "checkpoint of another config, base, data or code",
    "refused by the field that differs",
)
def test_a_step_of_another_run_is_refused_by_the_field_that_differs(tmp_path, field):
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, make_state())
    other = open_at(tmp_path, **{field: "other"})
    with pytest.raises(
        Corrupt, match=f"{field} fingerprint.*{IDENTITY[field]}.*other.*force"
    ):
        other.restore(like(make_state()))


def test_asking_for_what_was_never_stored_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no checkpoint"):
        open_at(tmp_path / "nowhere").restore(like(make_state()))
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(4, make_state())
        with pytest.raises(BadInput, match=r"checkpoint 3 .*Stored: 4"):
            checkpoints.restore(like(make_state()), step=3)


def test_relative_directories_are_made_absolute_and_urls_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_at("run/checkpoints") as checkpoints:
        checkpoints.save(1, make_state())
    assert open_at(tmp_path / "run/checkpoints").good_steps() == (1,)
    with pytest.raises(BadInput, match="gs://"):
        open_at("gs://bucket/run")
    with pytest.raises(BadInput, match="at least 1"):
        Checkpoints(tmp_path, identity=IDENTITY, keep=0)


def test_saving_and_restoring_log_nothing(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    logging.getLogger("absl").setLevel(logging.INFO)
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, make_state())
    open_at(tmp_path).restore(like(make_state()))
    noise = [r for r in caplog.records if r.name in ("absl", "asyncio", "root")]
    assert noise == []
    assert capfd.readouterr().err == ""


def golden_state() -> dict:
    """What the golden checkpoint holds."""
    return {
        "trained": {"layers.0/query": {"a": jnp.arange(12.0).reshape(3, 4) / 8}},
        "half": jnp.arange(4, dtype=jnp.bfloat16),
        "empty": jnp.zeros((0, 2), jnp.float32),
        "key": jax.random.key(42),
        "step": jnp.int32(7),
    }


def test_the_golden_checkpoint_of_layout_1_can_still_be_read(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "copy")
    state = golden_state()
    step, restored, extra = open_at(tmp_path / "copy").restore(like(state))
    assert (step, extra) == (7, {"position": 3})
    assert fingerprint(restored) == fingerprint(state)
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 50_000
