"""The decoder by its own lights: caches, packed rows, windows, remat, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.models.attention import (
    angles,
    attend,
    bias_of,
    frequencies,
    near,
    rotate,
    sees,
)
from lowrank.models.blocks import RMSNorm
from lowrank.models.decoder import LanguageModel, counted, empty_cache
from lowrank.models.decoder_spec import DecoderSpec, RopeScaling

SPEC = DecoderSpec(
    vocab_size=61,
    d_model=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    d_head=6,
    d_ff=20,
    max_positions=32,
    init_stddev=0.4,
)
MIXED = dataclasses.replace(
    SPEC, window=3, local=[True, False, True], local_theta=50.0, qk_norm=True
)
LENGTHS = np.array([9, 4])


def batch_of(seq=9):
    ids = np.random.default_rng(0).integers(1, 61, (2, seq)).astype(np.int32)
    mask = np.arange(seq)[None] < LENGTHS[:, None]
    return {"ids": jnp.asarray(np.where(mask, ids, 0)), "mask": jnp.asarray(mask)}


@functools.cache
def model_of():
    model = LanguageModel(MIXED, precision="highest")
    return model, jax.jit(model.init)(jax.random.key(0), batch_of())


def logits(model, params, batch):
    return np.asarray(jax.jit(model.apply)(params, batch))


def unrolled(params):
    """The same weights, one leaf per layer."""
    own = dict(params["params"]["decoder"])
    stack = own.pop("layer")
    for n in range(SPEC.num_layers):
        own[f"layer_{n}"] = jax.tree.map(lambda leaf, n=n: leaf[n], stack)
    return {"params": {**params["params"], "decoder": own}}


def test_scanned_and_unrolled_are_one_function():
    model, params = model_of()
    other = LanguageModel(MIXED, scan=False, precision="highest")
    np.testing.assert_allclose(
        logits(other, unrolled(params), batch_of()),
        logits(model, params, batch_of()),
        atol=1e-5,
    )


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_gradients_do_not_depend_on_what_is_computed_again(remat):
    model, params = model_of()
    other = LanguageModel(MIXED, remat=remat, precision="highest")
    total = lambda own: lambda p: jnp.sum(jnp.sin(own.apply(p, batch_of())))
    one, two = (jax.jit(jax.grad(total(own)))(params) for own in (model, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)


def test_what_comes_later_changes_nothing_before():
    model, params = model_of()
    batch = batch_of()
    changed = {**batch, "ids": batch["ids"].at[0, 6:].set(7)}
    one, two = (logits(model, params, b) for b in (batch, changed))
    np.testing.assert_array_equal(one[0, :6], two[0, :6])
    assert np.abs(one[0, 6:] - two[0, 6:]).max() > 1e-3


def test_a_window_hides_what_lies_further_back():
    # With one layer; through several, what is hidden is seen by those that are seen.
    shape = dataclasses.replace(SPEC, num_layers=1, window=3)
    model = LanguageModel(shape, precision="highest")
    params = jax.jit(model.init)(jax.random.key(0), batch_of())
    batch = batch_of()
    changed = {**batch, "ids": batch["ids"].at[0, 2].set(7)}
    one, two = (logits(model, params, b) for b in (batch, changed))
    seen = np.abs(one[0] - two[0]).max(axis=-1) > 1e-6
    assert seen.tolist() == [False, False, True, True, True, *[False] * 4]


def test_a_cache_in_pieces_is_the_whole_read_at_once():
    model, params = model_of()
    batch = batch_of()
    whole = logits(model, params, batch)
    cache = empty_cache(MIXED, 2, 11)
    found = []
    read = jax.jit(lambda part, cache: model.apply(params, part, cache, method="read"))
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 9)):
        part = {name: x[:, first:last] for name, x in batch.items()}
        some, cache = read(part, cache)
        found.append(some)
    assert int(cache.length) == 9
    mask = np.asarray(batch["mask"])
    got = np.concatenate(found, axis=1)
    np.testing.assert_allclose(got[mask], whole[mask], atol=1e-5)
    np.testing.assert_array_equal(cache.real[:, :9], mask)


def test_a_read_may_be_asked_for_one_place_of_each_row():
    model, params = model_of()
    batch, cache = batch_of(), empty_cache(MIXED, 2, 9)
    read = jax.jit(lambda part: model.apply(params, part, cache, method="read"))
    whole, kept = read(batch)
    at = jnp.array([3, 7])
    found, same = read({**batch, "at": at})
    assert found.shape == (2, 1, MIXED.vocab_size)
    np.testing.assert_allclose(found[:, 0], whole[jnp.arange(2), at], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, same)


def test_packed_rows_are_sequences_by_themselves():
    model, params = model_of()
    batch = batch_of()
    whole = logits(model, params, batch)
    rows = [np.asarray(batch["ids"])[row, :n] for row, n in enumerate(LENGTHS)]
    packed = {
        "ids": jnp.asarray(np.concatenate(rows)[None]),
        "mask": jnp.ones((1, 13), bool),
        "segments": jnp.asarray(np.repeat([4, 9], LENGTHS)[None].astype(np.int32)),
        "positions": jnp.asarray(
            np.concatenate([np.arange(n) for n in LENGTHS])[None].astype(np.int32)
        ),
    }
    got = logits(model, params, packed)[0]
    want = np.concatenate([whole[row, :n] for row, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_positions_count_real_tokens_and_go_on_after_a_cache():
    mask = jnp.array([[False, True, True], [True, True, False]])
    assert counted(mask).tolist() == [[0, 0, 1], [0, 1, 1]]
    cache = empty_cache(SPEC, 2, 4)
    real = cache.real.at[0, :3].set(True).at[1, 0].set(True)
    cache = dataclasses.replace(cache, real=real)
    assert counted(mask, cache).tolist() == [[3, 3, 4], [1, 2, 2]]


def test_grouped_heads_are_repeated_ones():
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 2, 7, 6)).astype(np.float32)
    allowed = rng.random((2, 5, 7)) < 0.7
    allowed[..., 0] = True
    bias = bias_of(jnp.asarray(allowed), jnp.float32)
    for cap in (None, 1.5):
        got = attend(
            *map(jnp.asarray, (q, k, v)), bias, scale=0.3, softcap=cap,
            precision="highest",
        )  # fmt: skip
        keys, values = (np.repeat(x, 2, axis=1) for x in (k, v))
        scores = 0.3 * np.einsum("bhqd,bhkd->bhqk", q, keys)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        scores = np.where(allowed[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        want = np.einsum("bhqk,bhkd->bhqd", weights, values)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_rotated_scores_depend_on_distance_alone():
    radians = frequencies(8, 100.0)
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(first, second):
        at = lambda n: angles(jnp.array([[n]], jnp.int32), radians, jnp.float32)
        return jnp.sum(rotate(q, at(first)) * rotate(k, at(second)))

    np.testing.assert_allclose(score(9, 4), score(25, 20), atol=1e-5)
    assert abs(float(score(9, 4) - score(9, 5))) > 1e-3
    np.testing.assert_allclose(score(0, 0), jnp.sum(q * k), atol=1e-6)


def test_a_pair_is_turned_forward():
    turned = angles(jnp.array([[1]], jnp.int32), np.array([0.3]), jnp.float32)
    got = rotate(jnp.array([[[[1.0, 0.0]]]]), turned)
    np.testing.assert_allclose(got[0, 0, 0], [np.cos(0.3), np.sin(0.3)], atol=1e-6)


def test_scaled_frequencies():
    plain = frequencies(16, 1e4)
    np.testing.assert_allclose(plain, 1e4 ** -(np.arange(8) / 8))
    linear = frequencies(16, 1e4, RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4)
    scaling = RopeScaling(kind="llama3", factor=8.0, low=1.0, high=4.0, original=64)
    turns = 64 * plain / (2 * np.pi)
    found = frequencies(16, 1e4, scaling)
    np.testing.assert_allclose(found[turns >= 4], plain[turns >= 4])
    np.testing.assert_allclose(found[turns <= 1], plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (found[between] < plain[between]).all()
    assert (found[between] > plain[between] / 8).all()


def test_who_sees_whom():
    queries = jnp.array([[2, 3]])
    keys = jnp.array([[0, 1, 2, 3]])
    real = jnp.array([[True, False, True, True]])
    allowed = sees(queries, keys, real)
    assert allowed.tolist() == [[[True, False, True, False], [True, False, True, True]]]
    own, others = jnp.array([[5, 5]]), jnp.array([[4, 4, 5, 5]])
    assert sees(queries, keys, real, (own, others)).tolist() == [
        [[False, False, True, False], [False, False, True, True]]
    ]
    assert near(queries, keys, 2).tolist() == [
        [[False, True, True, True], [False, False, True, True]]
    ]


def test_the_offset_of_a_norm():
    x = jax.random.normal(jax.random.key(0), (2, 5))
    scale = jnp.arange(5.0)
    for offset in (False, True):
        norm = RMSNorm(1e-6, jnp.float32, offset)
        got = norm.apply({"params": {"scale": scale}}, x)
        want = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(got, want * (scale + offset)[None], rtol=1e-5)
        fresh = norm.init(jax.random.key(0), x)["params"]["scale"]
        assert (fresh == (0.0 if offset else 1.0)).all()


def test_bfloat16_keeps_weights_and_logits_wide():
    model = LanguageModel(SPEC, dtype="bfloat16")
    params = jax.jit(model.init)(jax.random.key(0), batch_of())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    found = logits(model, params, batch_of())
    assert found.dtype == np.float32
    exact = logits(LanguageModel(SPEC), params, batch_of())
    mask = np.asarray(batch_of()["mask"])
    assert np.abs(found - exact)[mask].max() < 0.2 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads"),
        ({"d_head": 5}, "d_head = 5 must be even"),
        ({"d_ff": 0}, "d_ff must be positive"),
        ({"pad_id": 61}, "pad_id must be a row"),
        ({"window": 2, "local": [True]}, "speaks of 1 layers"),
        ({"local": [True, False, False]}, "window is None"),
        ({"num_experts": 4}, "experts_per_token = 0 does not suit"),
        ({"num_experts": -1}, "num_experts must be 0 or more"),
        ({"experts_per_token": 2}, "does not suit num_experts = 0"),
    ],
)
def test_shapes_that_cannot_be(more, text):
    with pytest.raises(BadInput, match=text):
        dataclasses.replace(SPEC, **more)


@pytest.mark.parametrize(
    ("more", "text"),
    [({"factor": 0.0}, "factor must be positive"), ({"low": 5.0}, "0 < low < high")],
)
def test_scalings_that_cannot_be(more, text):
    with pytest.raises(BadInput, match=text):
        RopeScaling(**{"kind": "llama3", "factor": 8.0, **more})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: {"ids": b["ids"]}, "'mask'.* missing"),
        (lambda b: {**b, "mask": b["mask"].astype(jnp.int32)}, "boolean"),
        (
            lambda b: {**b, "segments": b["ids"][:, :2]},
            r"batch\['segments'\] has shape",
        ),
        (lambda b: {k: jnp.tile(v, (1, 4)) for k, v in b.items()}, "36 tokens.* 32"),
    ],
)
def test_batches_that_cannot_be(change, text):
    model, params = model_of()
    with pytest.raises(BadInput, match=text):
        model.apply(params, change(batch_of()))


def test_segments_do_not_go_with_a_cache():
    model, params = model_of()
    batch = {**batch_of(), "segments": batch_of()["ids"]}
    with pytest.raises(BadInput, match="segments"):
        model.apply(params, batch, empty_cache(MIXED, 2, 9), method="read")
