"""Shapes of decoders from config.json: both spellings, and nothing unread."""

import pytest

from lowrank.core.errors import BadInput
from lowrank.io.decoder_configs import KINDS, spec_from_config
from lowrank.io.decoders import GEMMA, GPT2, LLAMA, MIXTRAL
from lowrank.models.decoder_spec import RopeScaling

LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def spec(**more):
    return spec_from_config({**LLAMA_CONFIG, **more}, "place")[0]


def test_a_llama():
    found, family = spec_from_config(LLAMA_CONFIG, "place")
    assert family is LLAMA
    assert (found.d_model, found.d_head, found.num_kv_heads) == (32, 8, 2)
    assert not found.tied
    assert found.theta == 10000.0
    assert spec(num_key_value_heads=None).num_kv_heads == 4
    assert spec(head_dim=12).d_head == 12
    assert spec(tie_word_embeddings=True).tied
    biased = spec(attention_bias=True)
    assert biased.qkv_bias
    assert biased.output_bias


def test_both_spellings_of_rotations():
    scaling = RopeScaling(kind="llama3", factor=8.0, original=32)
    old = spec(rope_theta=5e5, rope_scaling=LLAMA3)
    new = spec(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert (old.theta, old.rope_scaling) == (5e5, scaling)
    linear = spec(rope_scaling={"type": "linear", "factor": 2})
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    plain = spec(rope_scaling={"rope_type": "default"})
    assert plain.rope_scaling is None


def test_windows_by_kind_of_layer():
    assert spec(model_type="mistral", sliding_window=5).local_layers == (True,) * 4
    assert spec(model_type="mistral", sliding_window=None).local_layers == (False,) * 4
    qwen = {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 3}
    assert spec(**qwen, use_sliding_window=False).window is None
    some = spec(**qwen, use_sliding_window=True)
    assert some.local_layers == (False, False, False, True)
    listed = ["full_attention", "sliding_attention"] * 2
    assert spec(**qwen, layer_types=listed).local_layers == (False, True, False, True)
    gemma2 = {"model_type": "gemma2", "sliding_window": 5, "head_dim": 8}
    found, family = spec_from_config({**LLAMA_CONFIG, **gemma2}, "place")
    assert family is GEMMA
    assert found.local_layers == (True, False, True, False)
    assert found.query_scale == 256**-0.5
    assert found.tied
    gemma3 = spec(model_type="gemma3_text", sliding_window=5, sliding_window_pattern=3,
                  rope_local_base_freq=100.0, rope_theta=1e6)  # fmt: skip
    assert gemma3.local_layers == (True, True, False, True)
    assert (gemma3.theta, gemma3.local_theta) == (1e6, 100.0)


def test_gpt2_and_mixtral():
    found, family = spec_from_config(
        {"model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 2,
         "n_head": 4, "n_positions": 64, "activation_function": "gelu_new"},
        "place",
    )  # fmt: skip
    assert family is GPT2
    assert (found.d_ff, found.activation, found.norm) == (128, "gelu_tanh", "layer")
    assert found.fused_qkv
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    found, family = spec_from_config(
        {**LLAMA_CONFIG, "model_type": "mixtral", **experts}, "place"
    )
    assert family is MIXTRAL
    assert (found.num_experts, found.experts_per_token) == (4, 2)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"surprise": 1}, "fields of unknown meaning: surprise"),
        ({"hidden_act": "swoosh"}, "activation must be one of"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type must be"),
        ({"num_key_value_heads": 3}, "place: DecoderSpec.num_kv_heads = 3"),
        ({"hidden_size": "32"}, "malformed"),
        ({"rope_parameters": {"rope_type": "linear"}}, "malformed.*factor"),
        (
            {"model_type": "mistral", "sliding_window": 4, "layer_types": ["odd"] * 4},
            "layer_types may name",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "must be None"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [1], "num_experts": 4},
            "mlp_only_layers",
        ),
    ],
)
def test_configs_that_are_not_understood(more, text):
    with pytest.raises(BadInput, match=text):
        spec_from_config({**LLAMA_CONFIG, **more}, "place")


def test_what_is_missing_is_named():
    with pytest.raises(BadInput, match="lacks hidden_size, vocab_size"):
        spec_from_config(
            {
                k: v
                for k, v in LLAMA_CONFIG.items()
                if k not in ("hidden_size", "vocab_size")
            },
            "place",
        )


def test_every_row_of_a_table_has_its_own_names():
    for kind in KINDS.values():
        paths = [row.path for row in kind.family.rows]
        assert len({*paths}) == len(paths)
        tensors = [row.tensor for row in kind.family.rows]
        assert len({*tensors}) == len(tensors)
