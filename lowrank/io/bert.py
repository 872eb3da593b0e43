"""BERT and its kin: names of weights, and what config.json says of their shape."""

from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import BadInput
from lowrank.core.spec import check_fields
from lowrank.io.keymaps import Family, Row, dense, listed, norm
from lowrank.models.encoder import EncoderSpec

_LAYER = "encoder.layer.{layer}."


def _embedding(name: str) -> Row:
    return Row(
        f"encoder/embeddings/{name}/embedding", f"embeddings.{name}_embeddings.weight"
    )


_ROWS = (
    _embedding("word"),
    _embedding("position"),
    _embedding("token_type"),
    *norm("encoder/embeddings/norm", "embeddings.LayerNorm"),
    *dense("encoder/layer/attention/query", f"{_LAYER}attention.self.query"),
    *dense("encoder/layer/attention/key", f"{_LAYER}attention.self.key"),
    *dense("encoder/layer/attention/value", f"{_LAYER}attention.self.value"),
    *dense("encoder/layer/attention/output", f"{_LAYER}attention.output.dense"),
    *norm("encoder/layer/attention/norm", f"{_LAYER}attention.output.LayerNorm"),
    *dense("encoder/layer/mlp/up", f"{_LAYER}intermediate.dense"),
    *dense("encoder/layer/mlp/down", f"{_LAYER}output.dense"),
    *norm("encoder/layer/mlp/norm", f"{_LAYER}output.LayerNorm"),
)
_UNUSED = {
    r"embeddings\.(position_ids|token_type_ids)": "a constant, not a weight",
    r"pooler\..*": "this pooling has no pooler",
    r"(classifier|qa_outputs)\..*": "another task's head; ours starts from zero",
}

#: BERT and MiniLM, as `BertForSequenceClassification` names them.
BERT = Family(
    name="BERT",
    prefix="bert.",
    new_head=True,
    rows=(
        *_ROWS,
        *dense("pooler", "pooler.dense"),
        *dense("head", "classifier", bare=True),
    ),
    unused={**_UNUSED, r"cls\..*": "the head of pretraining"},
    # TensorFlow's names, still found in the oldest conversions, google's own among
    # them.
    renamed=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
)

#: RoBERTa, XLM-R and CamemBERT, which were pretrained without a pooler.
ROBERTA = Family(
    name="RoBERTa",
    prefix="roberta.",
    new_head=True,
    rows=(*_ROWS, *dense("head", "classifier", bare=True)),
    unused={**_UNUSED, r"lm_head\..*": "the head of pretraining"},
)

#: model_type of a config.json -> whose names its weights have.
KINDS: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
}

#: config.json field -> field of `EncoderSpec`.
_HANDLED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "pad_token_id": "pad_id",
    "initializer_range": "init_stddev",
}
# The others have the same default there and in `EncoderSpec`.
_REQUIRED = {name for name, ours in _HANDLED.items() if not hasattr(EncoderSpec, ours)}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
#: Fields that this code is right for at one value only.
_FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
# Provenance, the dropout of the base's own training, heads that are not read, what a
# forward pass of transformers returns, and text generation. The `pooler_*` and
# `directionality` fields come from Google's multilingual release; nothing reads them.
_IRRELEVANT = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version"),
        *("torch_dtype", "dtype", "gradient_checkpointing"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
        *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"),
        *("tie_word_embeddings", "directionality", "pooler_type", "pooler_fc_size"),
        *("pooler_num_attention_heads", "pooler_num_fc_layers"),
        "pooler_size_per_head",
    )
)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Whose names the weights beside a config.json have.

    Raises:
      BadInput: Its model_type is missing, or none that is read here.
    """
    kind = str(config.get("model_type", ""))
    if kind not in KINDS:
        found = f"has model_type {kind!r}" if kind else "has no model_type"
        raise BadInput(
            f"{where} {found}; as an encoder this loader reads {', '.join(KINDS)}, and "
            "of images vit and dinov2. Use "
            "base=python:package.module:load for others"
        )
    return KINDS[kind]


def spec_from_config(config: Mapping[str, Any], where: str) -> EncoderSpec:
    """The encoder's shape from a config.json.

    Raises:
      BadInput: A field is missing, has an unknown value, or is one whose meaning this
        code does not know: it might change what the model computes.
    """
    known = {*_HANDLED, *_FIXED, *_IRRELEVANT, "model_type"}
    if unknown := sorted(set(config) - known):
        raise BadInput(
            f"{where} has fields of unknown meaning: {listed(unknown)}. They may "
            "change what the model computes, so they are refused; remove them if you "
            "know that they do not."
        )
    for name, only in _FIXED.items():
        if (value := config.get(name, only)) != only:
            raise BadInput(
                f"{where}: {name} must be {only!r}, not {value!r}; this loader reads "
                "BERT-family encoders only. Use base=python:package.module:load."
            )
    family = family_of(config, where)
    if missing := sorted(_REQUIRED - set(config)):
        raise BadInput(f"{where} lacks {', '.join(missing)}")
    fields = {ours: config[name] for name, ours in _HANDLED.items() if name in config}
    if (named := fields.get("activation", "gelu")) not in _ACTIVATIONS:
        raise BadInput(
            f"{where}: hidden_act must be one of {', '.join(_ACTIVATIONS)}, not "
            f"{named!r}"
        )
    fields["activation"] = _ACTIVATIONS[named]
    if family is ROBERTA:
        fields["positions"] = "tokens"
        pad = fields.setdefault("pad_id", 1)
        if type(pad) is int and type(fields["max_positions"]) is int:
            fields["max_positions"] -= pad + 1
    try:
        check_fields(EncoderSpec, fields)
        return EncoderSpec(**fields)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
