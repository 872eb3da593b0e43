"""Our decoders equal transformers', family by family, token for token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lowrank.core.trees import flatten
from lowrank.io.decoder_configs import spec_from_config
from lowrank.io.safetensors import Tensors
from lowrank.models.decoder import LanguageModel, empty_cache

pytestmark = pytest.mark.parity

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the 0.02 of a fresh model, so that attention is far from uniform.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
#: Name -> (config class, model class, fields of the config).
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama_linear": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama_biased": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2_windows": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 8,
        },
    ),
}
LENGTHS = np.array([14, 9, 1])
#: Logits are about 3 in size, and differ by the order of float32 sums.
TOLERANCE = 1e-4


def made(name, folder):
    config, model, fields = FAMILIES[name]
    torch.manual_seed(0)
    fields = {**COMMON, **fields}
    if name == "gpt2":
        fields = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4,
                  "n_positions": 64, "initializer_range": 0.3, "bos_token_id": 1,
                  "eos_token_id": 2}  # fmt: skip
    own = getattr(transformers, model)(getattr(transformers, config)(**fields))
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    own.eval().save_pretrained(folder)
    return own


def loaded(folder, **options):
    """Our model and its weights."""
    config = json.loads((folder / "config.json").read_text())
    shape, family = spec_from_config(config, str(folder))
    model = LanguageModel(shape, precision="highest", **options)
    one = {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    with Tensors(folder) as tensors:
        filled, _, _ = family.from_hf(
            tensors.shapes, tensors.read, shapes, where=str(folder)
        )
    return model, {"params": flatten(shapes)[1].unflatten(filled)}


def batch_of(seq=14):
    ids = np.random.default_rng(0).integers(3, 99, (len(LENGTHS), seq))
    mask = np.arange(seq)[None] < LENGTHS[:, None]
    return {"ids": np.where(mask, ids, 0).astype(np.int32), "mask": mask}


def theirs(model, batch, **more):
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(batch["ids"]).long(),
            attention_mask=torch.from_numpy(batch["mask"]).long(),
            **more,
        ).logits.numpy()


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    return made(request.param, tmp_path), tmp_path


def test_logits_equal(pair):
    original, folder = pair
    batch = batch_of()
    want = theirs(original, batch)
    assert np.std(want) > 0.3
    for scan in (True, False):
        model, params = loaded(folder, scan=scan)
        got = np.asarray(model.apply(params, batch))
        np.testing.assert_allclose(
            got[batch["mask"]], want[batch["mask"]], atol=TOLERANCE
        )


def test_padding_on_the_left_is_silent(pair):
    _, folder = pair
    model, params = loaded(folder)
    batch = batch_of()
    turned = {key: value[:, ::-1] for key, value in batch.items()}
    ids = np.zeros_like(batch["ids"])
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = batch["ids"][row, :length]
    left = {"ids": ids, "mask": turned["mask"]}
    right, moved = (np.asarray(model.apply(params, one)) for one in (batch, left))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            moved[row, -length:], right[row, :length], atol=TOLERANCE
        )


def test_packed_sequences_are_as_by_themselves(pair):
    original, folder = pair
    model, params = loaded(folder)
    batch = batch_of()
    own = [batch["ids"][row, :length] for row, length in enumerate(LENGTHS)]
    packed = {
        "ids": np.concatenate(own)[None],
        "segments": np.repeat(np.arange(len(own)), LENGTHS)[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in LENGTHS])[None].astype(
            np.int32
        ),
    }
    packed["mask"] = np.ones_like(packed["ids"], bool)
    got = np.asarray(model.apply(params, packed))[0]
    want = theirs(original, batch)
    want = np.concatenate([want[row, :n] for row, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("scan", [True, False])
def test_token_by_token_from_a_cache(pair, scan):
    original, folder = pair
    model, params = loaded(folder, scan=scan)
    batch = batch_of()
    want = theirs(original, batch)
    cache = empty_cache(model.spec, len(LENGTHS), 20)
    read = jax.jit(lambda one, cache: model.apply(params, one, cache, method="read"))
    found = []
    for first, last in ((0, 4), *((n, n + 1) for n in range(4, 14))):
        part = {key: value[:, first:last] for key, value in batch.items()}
        logits, cache = read(part, cache)
        found.append(logits)
    got = np.asarray(jnp.concatenate(found, axis=1))
    np.testing.assert_allclose(got[batch["mask"]], want[batch["mask"]], atol=TOLERANCE)


def test_weights_go_back_as_they_came(pair):
    _, folder = pair
    _, params = loaded(folder)
    _, family = spec_from_config(
        json.loads((folder / "config.json").read_text()), str(folder)
    )
    back = family.to_hf(params["params"])
    with Tensors(folder) as tensors:
        assert {n: v.shape for n, v in back.items()} == dict(tensors.shapes)
        for name, value in back.items():
            np.testing.assert_array_equal(value, tensors.read(name))
