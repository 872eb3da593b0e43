"""A base arrives whole, under our names, from a source that can be checked."""

import json

import jax
import numpy as np
import pytest
from tiny_base import ONE, fresh, write
from tiny_hf import CONFIG, SPEC

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.trees import flatten
from lowrank.io import bert
from lowrank.io.bert import BERT
from lowrank.io.hub import load, read_tokenizer
from lowrank.models.encoder import Classifier


def pretrained(params):
    return {k: v for k, v in flatten(params)[0].items() if not k.startswith("head/")}


# Names and layouts.


@pytest.mark.parametrize("scan", [True, False])
def test_every_weight_has_a_tensor_and_every_tensor_its_weight(scan):
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f"), fresh(scan))
    tensors = dict(BERT.to_hf(params))
    paths = set(flatten(params)[0])
    back = {BERT.path(name, scan=scan) for name in tensors}
    assert {path for path, _ in back} == paths
    assert len(back) == len(tensors)
    for path, layer in back:
        name = BERT.tensor(path, layer)
        assert BERT.path(name, scan=scan) == (path, layer)
        assert name in tensors
    assert {row.path for row in BERT.rows} == set(flatten(fresh())[0])


def test_modules_are_called_as_peft_calls_them():
    path, module = (
        "encoder/layer/attention/query/kernel",
        "encoder.layer.3.attention.self.query",
    )
    assert BERT.module(path, layer=3) == f"bert.{module}"
    assert BERT.module(path, layer=3, prefix="") == module
    assert BERT.module("encoder/layer_3/attention/query/kernel", prefix="") == module
    assert BERT.module("head/kernel") == "classifier"
    assert BERT.kernel(f"bert.{module}") == (path, 3)
    assert (
        BERT.kernel(module, scan=False)[0] == "encoder/layer_3/attention/query/kernel"
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
        BERT.tensor(path, layer)


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(UnknownName, match="attention/query/kernel"):
        BERT.tensor("encoder/layer/attention/qeury/kernel")
    with pytest.raises(UnknownName, match=r"self\.query\.weight"):
        BERT.path("encoder.layer.0.attention.self.qeury.weight")


@pytest.mark.parametrize("scan", [True, False])
def test_saving_and_loading_is_the_identity(folder, original, scan):
    base = load(str(folder), num_classes=7, pooling="pooler", scan=scan)
    again = BERT.to_hf(base.params)
    wanted = dict(BERT.to_hf(original))
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
    tensors = dict(BERT.to_hf(original, prefix=""))
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
    other = write(tmp_path / "other", rename(BERT.to_hf(original)))
    one, two = (
        load(str(path), num_classes=2, pooling="pooler") for path in (folder, other)
    )
    assert one.fingerprint == two.fingerprint
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_half_precision_weights_become_float32(tmp_path, original):
    tensors = {k: v.astype(np.float16) for k, v in BERT.to_hf(original).items()}
    base = load(str(write(tmp_path / "half", tensors)), num_classes=2)
    for path, leaf in pretrained(base.params).items():
        want = flatten(original)[0][path].astype(np.float16).astype(np.float32)
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, want, err_msg=path)


def test_what_is_not_used_is_recorded_with_its_reason(tmp_path, original):
    tensors = dict(BERT.to_hf(original))
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
    tensors = dict(BERT.to_hf(original))
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
    tensors = {**BERT.to_hf(original), "adapter.weight": np.zeros(1, np.float32)}
    with pytest.raises(BadInput, match=r"no weight takes: adapter\.weight\. .*: none"):
        load(str(write(tmp_path / "more", tensors)), num_classes=2)


def test_a_pooler_that_is_wanted_and_absent_is_missed(tmp_path, original):
    tensors = {k: v for k, v in BERT.to_hf(original).items() if "pooler" not in k}
    folder = write(tmp_path / "bare", tensors)
    assert load(str(folder), num_classes=2).spec == SPEC
    with pytest.raises(BadInput, match=r"missing: pooler\.dense\.bias"):
        load(str(folder), num_classes=2, pooling="pooler")


def test_a_wrong_shape_names_tensor_and_both_shapes(tmp_path, original):
    tensors = dict(BERT.to_hf(original))
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(BadInput, match=r"layer\.1.*\(24, 40\).*\(40, 24\)"):
        load(str(write(tmp_path / "turned", tensors)), num_classes=2)


def test_one_tensor_under_two_names_is_refused(tmp_path, original):
    tensors = dict(BERT.to_hf(original))
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
    tensors = dict(BERT.to_hf(original))
    tensors["bert.encoder.layer.2.output.dense.bias"][3] += 1e-3
    changed = load(str(write(tmp_path / "changed", tensors)), num_classes=2)
    assert changed.fingerprint != first.fingerprint
    swapped = dict(BERT.to_hf(original))
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
        ({"model_type": "deberta"}, "model_type"),
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
        bert.spec_from_config(config, "place")


def test_irrelevant_config_fields_are_accepted_and_the_rest_is_used():
    config = {
        **CONFIG,
        "hidden_dropout_prob": 0.1,
        "id2label": {"0": "x"},
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "is_decoder": False,
    }
    spec = bert.spec_from_config(config, "place")
    assert (spec.activation, spec.norm_eps) == ("gelu_tanh", 1e-5)


def test_the_tokenizer_neither_pads_nor_truncates(folder):
    tokenizer = load(str(folder), num_classes=2).tokenizer
    assert tokenizer.encode("w3 w5 w7 w9 w11 w13").ids == [3, 5, 7, 9, 11, 13]


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(tmp_path, original):
    folder = write(tmp_path / "big", BERT.to_hf(original), size=SPEC.vocab_size + 1)
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
