"""Our decoders equal transformers', family by family, token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_pair import FAMILIES, LENGTHS, batch_of, made, tokenizer_beside
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank.io.folders import write_model
from lowrank.io.language import load
from lowrank.io.safetensors import Tensors
from lowrank.io.sources import locate
from lowrank.models.generation import generate

pytestmark = pytest.mark.parity

#: Logits are about 3 in size, and differ by the order of float32 sums.
TOLERANCE = 1e-4


def loaded(folder, **options):
    """Our model: logits, and what is read with a cache."""
    return load(str(folder), precision="highest", **options)


def apply(base, batch):
    return np.asarray(jax.jit(base.apply)(base.params, batch))


def theirs(model, batch, **more):
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(batch["ids"]).long(),
            attention_mask=torch.from_numpy(batch["mask"]).long(),
            **more,
        ).logits.numpy()


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    original = made(request.param, tmp_path)
    tokenizer_beside(tmp_path)
    return original, tmp_path


def test_logits_equal(pair):
    original, folder = pair
    batch = batch_of()
    want = theirs(original, batch)
    assert np.std(want) > 0.3
    for scan in (True, False):
        base = loaded(folder, scan=scan)
        got = apply(base, batch)
        np.testing.assert_allclose(
            got[batch["mask"]], want[batch["mask"]], atol=TOLERANCE
        )


def test_transformers_opens_a_folder_that_we_write(pair):
    """Weights that were changed, so that nothing of the original is opened instead."""
    _, folder = pair
    base = loaded(folder)
    params = jax.tree.map(lambda x: 1.01 * x, base.params)
    out = write_model(
        folder / "merged", base.family.to_hf(params), base.hf_config, folder, card="",
        max_shard=20_000,
    )  # fmt: skip
    opened, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    batch = batch_of()
    got = theirs(opened.eval(), batch)
    want = np.asarray(jax.jit(base.apply)(params, batch))
    np.testing.assert_allclose(got[batch["mask"]], want[batch["mask"]], atol=TOLERANCE)
    assert (out / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_padding_on_the_left_is_silent(pair):
    _, folder = pair
    base = loaded(folder)
    batch = batch_of()
    turned = {key: value[:, ::-1] for key, value in batch.items()}
    ids = np.zeros_like(batch["ids"])
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = batch["ids"][row, :length]
    left = {"ids": ids, "mask": turned["mask"]}
    right, moved = (apply(base, one) for one in (batch, left))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            moved[row, -length:], right[row, :length], atol=TOLERANCE
        )


def test_packed_sequences_are_as_by_themselves(pair):
    original, folder = pair
    base = loaded(folder)
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
    got = apply(base, packed)[0]
    want = theirs(original, batch)
    want = np.concatenate([want[row, :n] for row, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("scan", [True, False])
def test_token_by_token_from_a_cache(pair, scan):
    original, folder = pair
    base = loaded(folder, scan=scan)
    batch = batch_of()
    want = theirs(original, batch)
    cache = base.cache(len(LENGTHS), 20)
    read = jax.jit(base.read)
    found = []
    for first, last in ((0, 4), *((n, n + 1) for n in range(4, 14))):
        part = {key: value[:, first:last] for key, value in batch.items()}
        logits, cache = read(base.params, part, cache)
        found.append(logits)
    got = np.asarray(jnp.concatenate(found, axis=1))
    np.testing.assert_allclose(got[batch["mask"]], want[batch["mask"]], atol=TOLERANCE)


def test_weights_go_back_as_they_came(pair):
    _, folder = pair
    base = loaded(folder)
    back = base.family.to_hf(base.params)
    with Tensors(folder) as tensors:
        assert {n: v.shape for n, v in back.items()} == dict(tensors.shapes)
        for name, value in back.items():
            np.testing.assert_array_equal(value, tensors.read(name))


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2", "qwen3_moe"])
def test_greedy_generation_is_that_of_transformers(name, tmp_path):
    original = made(name, tmp_path)
    tokenizer_beside(tmp_path)
    base = loaded(tmp_path)
    batch = batch_of()
    ids, mask = np.zeros_like(batch["ids"]), np.zeros_like(batch["mask"])
    for row, length in enumerate(LENGTHS):
        ids[row, -length:], mask[row, -length:] = batch["ids"][row, :length], True
    with torch.no_grad():
        want = original.generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=2,
        )[:, ids.shape[1] :].numpy()  # fmt: skip
    read = lambda one, cache: base.read(base.params, one, cache)
    found, _ = generate(
        read, batch, base.cache(len(LENGTHS), 24), steps=10, end=jnp.array([2]), pad=0
    )
    np.testing.assert_array_equal(found[:, : want.shape[1]], want)


def test_smollm2_is_what_transformers_makes_of_it():
    base = load("smollm2", precision="highest")
    folder, _ = locate("smollm2")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox jumps over the lazy dog, and 42 more followed it."
    ids = base.tokenizer.encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert base.tokenizer.decode(ids) == text
    batch = {"ids": np.array([ids], np.int32), "mask": np.ones((1, len(ids)), bool)}
    got, want = apply(base, batch), theirs(original, batch)
    # Logits reach 25 here.
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.std(want) > 3
    # What its authors would be sad to see changed.
    prompt = (
        "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = np.array([base.tokenizer.encode(prompt).ids], np.int32)
    answer, real = generate(
        lambda one, cache: base.read(base.params, one, cache),
        {"ids": ids, "mask": np.ones_like(ids, bool)},
        base.cache(1, ids.shape[1] + 12),
        steps=12,
        end=jnp.array(base.end),
        pad=base.spec.pad_id,
    )
    said = base.tokenizer.decode(
        np.asarray(answer)[np.asarray(real)].tolist(), skip_special_tokens=False
    )
    assert said == "The capital of Italy is Rome.<|im_end|>"
