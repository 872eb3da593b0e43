"""The encoder: layouts agree, padding is silent, and bad input is named."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.core.trees import count, flatten
from lowrank.models.encoder import Classifier, EncoderSpec
from lowrank.models.zoo import SIZES

SPEC = SIZES["tiny_test"]
BATCH, SEQ, CLASSES = 3, 7, 5
LENGTHS = np.array([7, 4, 1])


def batch_of(lengths=LENGTHS, seq=SEQ, seed=0):
    ids = np.random.default_rng(seed).integers(1, SPEC.vocab_size, (len(lengths), seq))
    return {
        "ids": jnp.asarray(ids, jnp.int32),
        "mask": jnp.arange(seq)[None] < jnp.asarray(lengths)[:, None],
    }


def build(**options):
    """A classifier and weights of which none is at a special value."""
    model = Classifier(SPEC, CLASSES, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch_of())["params"]
    rng = np.random.default_rng(0)
    draw = {"scale": (1.0, 0.2), "kernel": (0.0, 0.2)}
    flat, structure = flatten(shapes)
    values = {}
    for path, leaf in flat.items():
        mean, spread = draw.get(path.rpartition("/")[2], (0.0, 0.5))
        values[path] = np.float32(mean + spread * rng.normal(size=leaf.shape))
    return model, structure.unflatten(values)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(model, params, batch, method=None):
    return model.apply({"params": params}, batch, method=method)


def unstack(params):
    encoder = dict(params["encoder"])
    stack = encoder.pop("layer")
    for index in range(SPEC.num_layers):
        encoder[f"layer_{index}"] = jax.tree.map(lambda x, i=index: x[i], stack)
    return {**params, "encoder": encoder}


def test_weights_are_found_under_the_promised_paths():
    _, params = build(pooling="pooler")
    layer = [
        f"attention/{name}/{leaf}"
        for name in ("query", "key", "value", "output")
        for leaf in ("kernel", "bias")
    ]
    layer += [
        f"mlp/{name}/{leaf}" for name in ("up", "down") for leaf in ("kernel", "bias")
    ]
    layer += [
        f"{part}/norm/{leaf}"
        for part in ("attention", "mlp")
        for leaf in ("scale", "bias")
    ]
    expected = {f"encoder/layer/{name}" for name in layer}
    expected |= {
        f"encoder/embeddings/{name}/embedding"
        for name in ("word", "position", "token_type")
    }
    expected |= {"encoder/embeddings/norm/scale", "encoder/embeddings/norm/bias"}
    expected |= {"pooler/kernel", "pooler/bias", "head/kernel", "head/bias"}
    flat, _ = flatten(params)
    assert set(flat) == expected
    shape = flat["encoder/layer/mlp/up/kernel"].shape
    assert shape == (SPEC.num_layers, SPEC.d_model, SPEC.d_ff)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_without_a_pooler_there_are_no_pooler_weights(pooling):
    _, params = build(pooling=pooling)
    assert set(params) == {"encoder", "head"}


@pytest.mark.parametrize(
    "remat", ["none", pytest.param("full", marks=pytest.mark.slow), "dots"]
)
def test_scanned_and_unrolled_agree_in_value_and_gradient(remat):
    scanned, params = build(remat=remat)
    unrolled = Classifier(SPEC, CLASSES, scan=False, remat=remat)

    def loss(model, params):
        return (model.apply({"params": params}, batch_of()) ** 2).mean()

    both = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, grad = both(scanned, params)
    other, other_grad = both(unrolled, unstack(params))
    np.testing.assert_allclose(value, other, rtol=1e-5)
    flat, other_flat = flatten(unstack(grad))[0], flatten(other_grad)[0]
    assert set(flat) == set(other_flat)
    for path, leaf in flat.items():
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(leaf, other_flat[path], atol=2e-5 * scale + 1e-7)


def test_remat_recomputes_what_its_name_says():
    def dots(remat):
        model, params = build(remat=remat)
        text = str(
            jax.make_jaxpr(
                jax.grad(lambda p: model.apply({"params": p}, batch_of()).sum())
            )(params)
        )
        return text.count("dot_general[")

    none, kept, full = dots("none"), dots("dots"), dots("full")
    # A layer has six products with weights and two of activations.
    assert kept == none + 2
    assert full > kept + 2


def test_padding_is_silent():
    model, params = build()
    batch = batch_of()
    other_ids = jnp.where(batch["mask"], batch["ids"], 13)
    wider = {
        "ids": jnp.pad(batch["ids"], ((0, 0), (0, 4))),
        "mask": jnp.pad(batch["mask"], ((0, 0), (0, 4))),
    }
    want = run(model, params, batch)
    for changed in ({**batch, "ids": other_ids}, wider):
        got = run(model, params, changed)
        np.testing.assert_allclose(got, want, atol=1e-5)
    seen = {**batch, "mask": jnp.ones_like(batch["mask"])}
    assert np.abs(run(model, params, seen) - want).max() > 1e-2


def test_a_row_of_padding_gives_zero_features_and_finite_gradients():
    model, params = build()
    batch = batch_of(np.array([3, 0]))

    def features(params):
        return run(model, params, batch, method="features")

    np.testing.assert_array_equal(features(params)[1], 0.0)
    grads = jax.grad(lambda p: (features(p) ** 2).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_pooling_takes_what_it_says():
    batch = batch_of()
    model, params = build(pooling="pooler")
    hidden = run(model, params, batch, method="hidden")
    assert hidden.shape == (BATCH, SEQ, SPEC.d_model)
    first = hidden[:, 0]
    dense = first @ params["pooler"]["kernel"] + params["pooler"]["bias"][None]
    mean = jnp.stack([row[:n].mean(0) for row, n in zip(hidden, LENGTHS, strict=True)])
    for pooling, want in {
        "pooler": jnp.tanh(dense),
        "cls": first,
        "mean": mean,
    }.items():
        pooled = Classifier(SPEC, CLASSES, pooling=pooling)
        got = run(pooled, params, batch, method="features")
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=pooling)
        alone = {name: x[1:2] for name, x in batch.items()}
        got = run(pooled, params, alone, method="features")
        np.testing.assert_allclose(got, want[1:2], atol=1e-5, err_msg=pooling)


def test_the_mean_of_examples_by_themselves_is_over_no_axis_of_one():
    """XLA:CPU would take ten times as long; see `blocks.without_ones`."""
    batch = batch_of()
    _, params = build(pooling="mean")
    model = Classifier(SPEC, CLASSES, pooling="mean")

    def alone(row):
        one = {name: x[None] for name, x in row.items()}
        return run(model, params, one, method="features")

    text = jax.jit(jax.vmap(alone)).lower(batch).as_text()
    summed = re.findall(r"stablehlo.reduce.*\(tensor<([\dx]*)xf32>", text)
    width = SPEC.d_model
    assert f"{BATCH}x{SEQ}x{width}" in summed
    assert f"{BATCH}x1x{SEQ}x{width}" not in summed


def test_a_fresh_head_is_zero_so_no_class_is_preferred():
    model = Classifier(SPEC, CLASSES)
    params = jax.jit(model.init)(jax.random.key(0), batch_of())["params"]
    np.testing.assert_array_equal(run(model, params, batch_of()), 0.0)


def test_fresh_layers_of_a_stack_differ():
    init = jax.jit(Classifier(SPEC, CLASSES).init)
    params = init(jax.random.key(0), batch_of())["params"]
    first, second, third = params["encoder"]["layer"]["mlp"]["up"]["kernel"]
    assert np.abs(first - second).max() > 0.01
    assert np.abs(second - third).max() > 0.01


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_at_both_ends():
    exact, params = build()
    model = Classifier(SPEC, CLASSES, dtype="bfloat16")
    fresh = jax.jit(model.init)(jax.random.key(0), batch_of())["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    got = run(model, params, batch_of())
    want = run(exact, params, batch_of())
    assert got.dtype == jnp.float32
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 1e-5 < error < 5e-2
    hidden = run(model, params, batch_of(), method="hidden")
    assert hidden.dtype == jnp.bfloat16


def test_precision_reaches_every_product():
    model, params = build(precision="highest", pooling="pooler")
    text = str(jax.make_jaxpr(model.apply)({"params": params}, batch_of()))
    products = len(re.findall(r"dot_general\[", text))
    named = len(re.findall(r"precision=\(Precision.HIGHEST", text))
    # Six maps and two products of activations in the one traced layer; pooler; head.
    assert products == named == 10


def test_token_types_are_optional_and_used_when_given():
    model, params = build()
    batch = batch_of()
    zeros = {**batch, "type_ids": jnp.zeros_like(batch["ids"])}
    ones = {**batch, "type_ids": jnp.ones_like(batch["ids"])}
    plain, same, other = (run(model, params, one) for one in (batch, zeros, ones))
    np.testing.assert_array_equal(plain, same)
    assert np.abs(other - plain).max() > 1e-3


def test_an_id_outside_the_vocabulary_gives_nan_not_a_neighbour():
    model, params = build()
    batch = batch_of()
    batch["ids"] = batch["ids"].at[0, 0].set(SPEC.vocab_size)
    logits = run(model, params, batch)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()


def test_trials_are_mapped_over_without_the_models_knowledge():
    model, params = build()
    batches = [batch_of(seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    logits = jax.vmap(lambda batch: run(model, params, batch))(stacked)
    for got, batch in zip(logits, batches, strict=True):
        want = run(model, params, batch)
        np.testing.assert_allclose(got, want, atol=1e-5)


def _without_mask(batch):
    return {"ids": batch["ids"]}


def _with_trials(batch):
    return {key: value[None] for key, value in batch.items()}


def _int_mask(batch):
    return {**batch, "mask": batch["mask"].astype(jnp.int32)}


def _too_long(_batch):
    return batch_of(seq=SPEC.max_positions + 1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_mask, "mask"),
        (_with_trials, "jax.vmap"),
        (_int_mask, "boolean"),
        (_too_long, "33 tokens"),
    ],
)
def test_a_bad_batch_is_named_before_anything_is_compiled(spoil, said):
    model, params = build()
    with pytest.raises(BadInput, match=said):
        model.apply({"params": params}, spoil(batch_of()))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pooling", "max"),
        ("remat", "some"),
        ("dtype", "float16"),
        ("dtype", "float64"),
        ("precision", "low"),
        ("num_classes", 0),
    ],
)
def test_an_unknown_option_is_named(option, value):
    options = {"num_classes": CLASSES, option: value}
    with pytest.raises(BadInput, match=option):
        Classifier(SPEC, **options).init(jax.random.key(0), batch_of())


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 5), ("num_layers", 0), ("pad_id", 97), ("norm_eps", 0.0)],
)
def test_a_shape_that_cannot_be_is_refused(field, value):
    fields = {name: getattr(SPEC, name) for name in EncoderSpec.__dataclass_fields__}
    with pytest.raises(BadInput, match=field):
        EncoderSpec(**{**fields, field: value})


@pytest.mark.parametrize(
    ("size", "parameters"),
    # As published, pooler included: model cards and transformers' own count.
    [("minilm_l6", 22_713_216), ("bert_base", 109_482_240), ("bert_tiny", 4_385_920)],
)
def test_named_sizes_have_the_published_number_of_parameters(size, parameters):
    model = Classifier(SIZES[size], 1, pooling="pooler")
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch_of())["params"]
    assert count(shapes) - count(shapes["head"]) == parameters
