"""PEFT folders survive the way out and back, and hostile ones are refused."""

import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.io.adapter import Adapter, Correction, collect, spread
from lowrank.io.files import remove_unfinished
from lowrank.io.peft import CONFIG, MODEL, NOTES, PREFIX, read_adapter, write_adapter

LAYERS, D_IN, D_OUT, RANK, WORDS = 3, 5, 7, 4, 11


def module_of(path, layer):
    if path.startswith("head"):
        return "classifier"
    if path.startswith("words"):
        return "words"
    return f"encoder.{layer}.dense" if layer is not None else "encoder.flat"


def kernel_of(module):
    if module == "classifier":
        return "head/kernel", None
    if module == "encoder.flat":
        return "flat/kernel", None
    if module == "words":
        return "words/embedding", None
    return "stack/kernel", int(module.split(".")[1])


@pytest.fixture
def run():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    trained = {
        "stack/kernel": {"a": draw(LAYERS, RANK, D_IN), "b": draw(LAYERS, RANK, D_OUT)},
        "flat/kernel": {"a": draw(RANK, D_IN), "b": draw(RANK, D_OUT)},
        "words/embedding": {"a": draw(RANK, WORDS), "b": draw(RANK, D_OUT)},
        "head/kernel": draw(D_OUT, 2),
        "head/bias": draw(2),
    }
    # Open ones stand anywhere: what is saved are these, and not the first so many.
    gate = np.ones((LAYERS, RANK), np.float32)
    gate[0] = [0, 0, 1, 0]
    gate[1] = 0
    gate[2, 0] = 0.5
    dials = {
        "stack/kernel": {"gate": gate, "scale": np.float32(2.0)},
        "flat/kernel": {"gate": np.ones(RANK, np.float32), "scale": np.float32(2.0)},
        "words/embedding": {"gate": np.ones(RANK, np.float32), "scale": np.float32(2)},
    }
    return trained, dials


def dense(trained, dials):
    """Every correction in full: what must survive."""
    found = {}
    for path, own in dials.items():
        a, b, gate = trained[path]["a"], trained[path]["b"], own["gate"]
        spec = "lri,lro,lr->lio" if a.ndim == 3 else "ri,ro,r->io"
        found[path] = np.einsum(spec, a, b, gate) * float(own["scale"])
    return found


@pytest.mark.parametrize("rsqrt", [False, True])
def test_a_run_comes_back_from_its_folder(run, tmp_path, rsqrt):
    trained, dials = run
    adapter = collect(trained, dials, module_of, rsqrt=rsqrt)
    write_adapter(tmp_path / "a", adapter, base="base", card="card")
    read = read_adapter(tmp_path / "a")
    back, gates = spread(read, trained, dials, kernel_of)
    before, after = dense(trained, dials), dense(back, gates)
    for path in dials:
        np.testing.assert_allclose(after[path], before[path], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(back["head/kernel"], trained["head/kernel"])
    np.testing.assert_array_equal(back["head/bias"], trained["head/bias"])


def test_closed_components_are_cut_away_and_ranks_written(run, tmp_path):
    trained, dials = run
    adapter = collect(trained, dials, module_of)
    write_adapter(tmp_path / "a", adapter, base="base", card="card")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    tensors = load_file(tmp_path / "a" / MODEL)
    assert config["target_modules"] == [
        "encoder.0.dense",
        "encoder.2.dense",
        "encoder.flat",
        "words",
    ]
    assert config["r"] == RANK
    assert config["rank_pattern"] == {r"^encoder\.0\.dense$": 1}
    # The scale is alpha / r, so a module of another rank needs another alpha.
    assert config["lora_alpha"] == 2.0 * RANK
    assert config["alpha_pattern"] == {r"^encoder\.0\.dense$": 2.0}
    assert config["modules_to_save"] == ["classifier"]
    assert tensors[f"{PREFIX}encoder.0.dense.lora_A.weight"].shape == (1, D_IN)
    assert tensors[f"{PREFIX}encoder.2.dense.lora_B.weight"].shape == (D_OUT, RANK)
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}encoder.0.dense.lora_A.weight"],
        trained["stack/kernel"]["a"][0, 2:3],
    )
    assert tensors[f"{PREFIX}classifier.weight"].shape == (2, D_OUT)
    # PEFT knows the factors of a table by other names, and no others.
    assert tensors[f"{PREFIX}words.lora_embedding_A"].shape == (RANK, WORDS)
    assert tensors[f"{PREFIX}words.lora_embedding_B"].shape == (D_OUT, RANK)
    assert not [name for name in tensors if name.startswith(f"{PREFIX}words.lora_A")]


@pytest.mark.parametrize("alpha", [16.0, 0.7, 1 / 3])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("rsqrt", [False, True])
def test_alphas_are_round_and_give_the_scale_to_the_last_bit(
    tmp_path, alpha, rank, rsqrt
):
    scale = float(np.float32(alpha / (math.sqrt(8) if rsqrt else 8)))
    one = Correction(np.ones((rank, 2), np.float32), np.ones((rank, 3), "f4"), scale)
    write_adapter(tmp_path / "a", Adapter({"m": one}, {}, rsqrt), base="b", card="c")
    read = read_adapter(tmp_path / "a").corrections["m"]
    assert np.float32(read.scale) == np.float32(scale)
    stored = json.loads((tmp_path / "a" / CONFIG).read_text())["lora_alpha"]
    if rank == 8 and alpha == 16.0:
        # Some readers take whole numbers only.
        assert type(stored) is int
        assert stored == 16
    # A scale beyond float32 is kept as it is.
    fine = Correction(one.a, one.b, scale + 1e-12)
    write_adapter(tmp_path / "f", Adapter({"m": fine}, {}, rsqrt), base="b", card="c")
    found = read_adapter(tmp_path / "f").corrections["m"].scale
    assert abs(found - fine.scale) <= 4e-16 * fine.scale


def test_an_adapter_is_replaced_whole(run, tmp_path):
    adapter = collect(*run, module_of)
    write_adapter(tmp_path / "a", adapter, base="one", card="first")
    write_adapter(tmp_path / "a", adapter, base="two", card="second")
    assert (tmp_path / "a" / "README.md").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_leaves_is_known_as_unfinished(run, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    adapter = collect(*run, module_of)
    monkeypatch.setattr("lowrank.io.peft.write_sealed", killed)
    with monkeypatch.context() as nothing_cleans_up:
        nothing_cleans_up.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_adapter(tmp_path / "a", adapter, base="base", card="card")
    assert list(tmp_path.iterdir())
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_leave_nothing_behind(run, tmp_path):
    trained, dials = run
    trained["flat/kernel"]["b"][0, 0] = np.nan
    with pytest.raises(BadInput, match="not finite"):
        write_adapter(
            tmp_path / "a", collect(trained, dials, module_of), base="b", card="c"
        )
    assert not list(tmp_path.iterdir())


def test_a_run_with_no_open_gate_is_no_adapter(run, tmp_path):
    trained, dials = run
    for own in dials.values():
        own["gate"] = np.zeros_like(own["gate"])
    with pytest.raises(BadInput, match="rank 1 or more"):
        write_adapter(
            tmp_path / "a", collect(trained, dials, module_of), base="b", card="c"
        )


def test_what_is_no_adapter_is_never_replaced(run, tmp_path):
    adapter = collect(*run, module_of)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(BadInput, match="is no adapter"):
            write_adapter(tmp_path / name, adapter, base="b", card="c")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / "empty", adapter, base="b", card="c")
    assert read_adapter(tmp_path / "empty").corrections


@pytest.mark.parametrize("number", range(1, 7))
def test_a_disk_that_fails_leaves_the_old_adapter(run, tmp_path, monkeypatch, number):
    adapter = collect(*run, module_of)
    write_adapter(tmp_path / "a", adapter, base="one", card="first")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    calls = []

    def failing(old):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            return old(*args, **kwargs)

        return call

    monkeypatch.setattr("os.replace", failing(__import__("os").replace))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    # Four files and two renames of folders: each of them may fail.
    with pytest.raises(CannotWrite, match="No space left"):
        write_adapter(tmp_path / "a", adapter, base="two", card="second")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def folder(run, tmp_path):
    adapter = collect(*run, module_of)
    notes = {"base_fingerprint": "a" * 64}
    write_adapter(tmp_path / "a", adapter, base="base", card="card", notes=notes)
    return tmp_path / "a"


def foreign(folder):
    """The folder as PEFT alone would have written it."""
    (folder / NOTES).unlink()
    return folder


def test_weights_changed_behind_our_back_are_noticed(folder):
    tensors = load_file(folder / MODEL)
    changed = {name: 2 * value for name, value in tensors.items()}
    save_file(changed, folder / MODEL)
    with pytest.raises(BadInput, match="is not the file"):
        read_adapter(folder)
    assert read_adapter(foreign(folder)).corrections


@pytest.mark.parametrize("name", [CONFIG, NOTES])
def test_a_flipped_digit_in_the_config_or_the_notes_is_noticed(folder, name):
    text = (folder / name).read_text()
    digit = re.search(r"[1-8]", text).start()
    (folder / name).write_text(text[:digit] + "9" + text[digit + 1 :])
    with pytest.raises(BadInput, match=name):
        read_adapter(folder)


def edit(folder, **changes):
    """Edits the config, as whoever wrote the folder without our notes might have."""
    (folder / NOTES).unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"r": 3}, "rank 3"),
        ({"r": True}, "rank True"),
        ({"r": "4"}, "rank '4'"),
        ({"r": 10**9}, "rank 1000000000"),
        ({"lora_alpha": float("nan")}, "alpha nan"),
        ({"lora_alpha": "8"}, "alpha '8'"),
        ({"use_rslora": "false"}, "wrong type"),
        ({"alpha_pattern": [1]}, "wrong type"),
        ({"rank_pattern": {"(a+)+$": 2}}, "no module name"),
        ({"modules_to_save": None}, "neither a LoRA factor"),
        ({"target_modules": ["words"]}, "do not name"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow"),
    ],
)
def test_configs_that_mean_something_else_are_refused(folder, changes, says):
    edit(folder, **changes)
    with pytest.raises(BadInput, match=says):
        read_adapter(folder)


def test_options_that_change_nothing_are_taken(folder):
    before = read_adapter(folder)
    edit(
        folder,
        **{"use_dora": False, "bias": "none", "eva_config": {"rho": 2}},
        **{"init_lora_weights": "eva", "an_option_of_tomorrow": None},
        **{"lora_dropout": 0.1, "inference_mode": False, "revision": "main"},
        **{"fan_in_fan_out": True},
    )
    after = read_adapter(folder)
    assert after.corrections.keys() == before.corrections.keys()
    assert after.config["revision"] == "main"


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"dense": 3}, 3),
        ({"encoder.2.dense": 3}, 3),
        ({r"^encoder\.2\.dense": 3}, 3),
        ({r"encoder\.2\.dense$": 3, "dense": 5}, 3),
        ({"dense": 5, "encoder.2.dense": 3}, 5),
        ({"ense": 3}, 8),
        ({"encoder": 3}, 8),
        ({"^dense": 3}, 8),
    ],
)
def test_the_first_pattern_that_ends_the_name_wins(folder, patterns, alpha):
    edit(folder, alpha_pattern=patterns)
    found = read_adapter(folder).corrections["encoder.2.dense"]
    assert found.scale == alpha / RANK


def test_another_base_is_refused(folder):
    assert read_adapter(folder, base_fingerprint="a" * 64).corrections
    with pytest.raises(BadInput, match="was made for the base"):
        read_adapter(folder, base_fingerprint="b" * 64)


def test_files_that_could_run_code_are_not_opened(folder):
    (folder / MODEL).rename(folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="only safetensors"):
        read_adapter(folder)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_truncated_files_are_refused(folder, cut):
    data = (folder / MODEL).read_bytes()
    foreign(folder)
    (folder / MODEL).write_bytes(data[:cut])
    with pytest.raises(BadInput, match="cannot be read"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "name", ["../../evil.lora_A.weight", "x", f"{PREFIX}a/b.weight"]
)
def test_odd_tensor_names_are_refused(folder, name):
    tensors = load_file(foreign(folder) / MODEL)
    save_file({**tensors, name: np.zeros((1, 1), np.float32)}, folder / MODEL)
    with pytest.raises(BadInput, match="odd name"):
        read_adapter(folder)


def test_half_a_correction_and_odd_types_are_refused(folder):
    tensors = load_file(foreign(folder) / MODEL)
    lone = f"{PREFIX}encoder.flat.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != lone}, folder / MODEL)
    with pytest.raises(BadInput, match="only factor B"):
        read_adapter(folder)
    save_file({**tensors, lone: tensors[lone].astype(np.int8)}, folder / MODEL)
    with pytest.raises(BadInput, match="a factor is one of"):
        read_adapter(folder)
    save_file({**tensors, lone: tensors[lone] * np.inf}, folder / MODEL)
    with pytest.raises(BadInput, match="not finite"):
        read_adapter(folder)


def test_a_run_of_another_shape_is_refused(run, folder):
    trained, dials = run
    adapter = read_adapter(folder)
    trained["flat/kernel"] = {"a": np.zeros((2, D_IN)), "b": np.zeros((2, D_OUT))}
    dials["flat/kernel"]["gate"] = np.ones(2)
    with pytest.raises(BadInput, match="holds rank 2"):
        spread(adapter, trained, dials, kernel_of)
    del trained["flat/kernel"], dials["flat/kernel"]
    with pytest.raises(BadInput, match="no rule adapts"):
        spread(adapter, trained, dials, kernel_of)


def test_factors_come_back_as_jax_arrays(run, folder):
    back, gates = spread(read_adapter(folder), *run, kernel_of)
    assert isinstance(back["flat/kernel"]["a"], jnp.ndarray)
    assert isinstance(gates["flat/kernel"]["gate"], jnp.ndarray)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_it_is(run, folder, dtype):
    tensors = load_file(foreign(folder) / MODEL)
    small = {name: value.astype(dtype) for name, value in tensors.items()}
    save_file(small, folder / MODEL)
    read = read_adapter(folder).corrections["encoder.flat"]
    assert read.a.dtype == np.float32
    want = run[0]["flat/kernel"]["a"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(read.a, want)


def test_a_head_that_is_missing_or_unwanted_is_told(run, folder):
    trained, dials = run
    read = read_adapter(folder)
    less = {k: v for k, v in read.whole.items() if not k.endswith("bias")}
    with pytest.raises(BadInput, match="lacks head/bias"):
        spread(Adapter(read.corrections, less), trained, dials, kernel_of)
    del trained["head/bias"]
    with pytest.raises(BadInput, match="has no place"):
        spread(read, trained, dials, kernel_of)


def test_whole_tables_and_norms_keep_their_layout():
    table, scale = np.arange(6.0).reshape(3, 2), np.arange(4.0)
    whole = collect(
        {"words/embedding": table, "norm/scale": scale, "head/kernel": table},
        {},
        lambda path, layer: path.split("/")[0],
    ).whole
    np.testing.assert_array_equal(whole["words.weight"], table)
    np.testing.assert_array_equal(whole["norm.weight"], scale)
    np.testing.assert_array_equal(whole["head.weight"], table.T)


def test_a_run_of_another_scale_and_max_rank_computes_the_same(run, folder):
    trained, dials = run
    wider = {
        path: {
            "a": np.zeros((*own["a"].shape[:-2], RANK + 2, own["a"].shape[-1]), "f4"),
            "b": np.zeros((*own["b"].shape[:-2], RANK + 2, own["b"].shape[-1]), "f4"),
        }
        for path, own in trained.items()
        if path in dials
    }
    open_gates = {
        path: {
            "gate": np.ones(wider[path]["a"].shape[:-1], "f4"),
            "scale": np.float32(0.3),
        }
        for path in dials
    }
    whole = {path: one for path, one in trained.items() if path not in dials}
    back, gates = spread(
        read_adapter(folder), {**wider, **whole}, open_gates, kernel_of
    )
    before, after = dense(trained, dials), dense(back, gates)
    for path in dials:
        np.testing.assert_allclose(after[path], before[path], rtol=2e-6, atol=1e-6)
        assert gates[path]["gate"].shape[-1] == RANK + 2


def test_a_layer_that_the_run_freezes_stays_frozen(run, folder):
    trained, dials = run
    read = read_adapter(folder)
    spread(read, trained, dials, kernel_of)
    dials["stack/kernel"]["gate"][2] = 0
    with pytest.raises(BadInput, match=r"encoder\.2\.dense, which the run freezes"):
        spread(read, trained, dials, kernel_of)


def test_a_layer_that_the_run_does_not_have_is_refused(run, folder):
    trained, dials = run
    short = {name: x[:2] for name, x in trained["stack/kernel"].items()}
    trained["stack/kernel"] = short
    dials["stack/kernel"]["gate"] = dials["stack/kernel"]["gate"][:2]
    with pytest.raises(BadInput, match=r"encoder\.2\.dense"):
        spread(read_adapter(folder), trained, dials, kernel_of)
