"""A Vision Transformer: shapes, scanned and unrolled alike, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.core.trees import flatten
from lowrank.io.keymaps import stacked_path
from lowrank.models.pixels import ImageInput
from lowrank.models.resampling import bicubic, triangle
from lowrank.models.vision import Classifier, VisionSpec

SPEC = VisionSpec(
    image_size=24, patch_size=8, d_model=24, num_layers=3, num_heads=4, d_ff=40,
    layer_scale=True, init_stddev=0.3,
)  # fmt: skip


def pixels(side=24, rows=2, channels=3):
    rng = np.random.default_rng(0)
    return {"pixels": rng.normal(size=(rows, side, side, channels)).astype(np.float32)}


def made(batch=None, **options):
    model = Classifier(SPEC, 5, precision="highest", **options)
    return model, model.init(jax.random.key(0), batch or pixels())


def unrolled(params):
    """Weights of a scanned model, layer by layer."""
    leaves, _ = flatten(params)
    _, other = made(scan=False)
    paths, structure = flatten(other["params"])
    found = {}
    for path in paths:
        stacked, layer = stacked_path(path)
        found[path] = leaves[stacked] if layer is None else leaves[stacked][layer]
    return structure.unflatten(found)


@pytest.mark.parametrize("pooling", ["cls", "mean", "both"])
def test_shapes_and_a_head_that_says_nothing(pooling):
    model, params = made(pooling=pooling)
    features = model.apply(params, pixels(), method="features")
    assert features.shape == (2, 48 if pooling == "both" else 24)
    np.testing.assert_array_equal(model.apply(params, pixels()), np.zeros((2, 5)))
    hidden = model.apply(params, pixels(), method="hidden")
    assert hidden.shape == (2, 1 + 9, 24)
    both = {"cls": hidden[:, 0], "mean": hidden[:, 1:].mean(axis=1)}
    if pooling in both:
        np.testing.assert_allclose(features, both[pooling], rtol=1e-6)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("side", [24, 40])
def test_scanned_is_unrolled(side, remat):
    model, params = made(remat=remat)
    other, _ = made(scan=False, remat=remat)
    batch = pixels(side)
    one = model.apply(params, batch, method="hidden")
    two = other.apply({"params": unrolled(params["params"])}, batch, method="hidden")
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_low_precision_computes_and_keeps_weights_wide():
    model, params = made(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    wide, _ = made()
    exact = wide.apply(params, pixels(), method="features")
    rough = model.apply(params, pixels(), method="features")
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(rough - exact)).max() < 0.2


def test_trials_are_mapped_over():
    model, params = made()
    many = {"pixels": np.stack([pixels()["pixels"]] * 3)}
    found = jax.vmap(lambda x: model.apply(params, x, method="features"))(many)
    alone = model.apply(params, pixels(), method="features")
    np.testing.assert_allclose(found[2], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"ids": np.zeros((1, 3), np.int32)}, "needs 'pixels'"),
        (pixels(20), "not cut into patches"),
        (pixels(channels=1), "not \\(2, 24, 24, 1\\)"),
        ({"pixels": np.zeros((1, 24, 24, 3), np.uint8)}, "normalized floats"),
    ],
    ids=range(4),
)
def test_what_is_no_input_is_said(batch, said):
    with pytest.raises(BadInput, match=said):
        made(batch)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"patch_size": 7}, "patch_size must divide image_size"),
        ({"num_heads": 5}, "num_heads must divide d_model"),
        ({"num_layers": 0}, "num_layers must be positive"),
    ],
)
def test_a_shape_that_cannot_be_is_said(fields, said):
    known = {"image_size": 24, "patch_size": 8, "d_model": 24, "num_layers": 3}
    with pytest.raises(BadInput, match=said):
        VisionSpec(**{**known, "num_heads": 4, "d_ff": 40, **fields})
    with pytest.raises(BadInput, match="pooling of a Vision Transformer"):
        made(pooling="pooler")


@pytest.mark.parametrize("weights", [bicubic, triangle])
@pytest.mark.parametrize(("old", "new"), [(5, 5), (8, 98), (37, 7), (3, 4), (1, 4)])
def test_a_flat_image_stays_flat(weights, old, new):
    found = weights(old, new)
    assert found.shape == (new, old)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    if old == new:
        np.testing.assert_array_equal(found, np.eye(old))
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-3)


def test_linear_weights_are_linear():
    # Old places lie at -0.25 + k of new ones; a ramp stays one inside.
    ramp = triangle(4, 8) @ np.arange(4.0)
    np.testing.assert_allclose(ramp[1:-1], np.arange(6) * 0.5 + 0.25)
    np.testing.assert_array_equal(triangle(4, 2)[0].nonzero()[0], [0, 1, 2])


def test_images_are_fitted_and_normalized():
    wants = ImageInput(size=8, multiple=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 17
    fitted = wants.fitted(grey, 8)
    assert fitted.shape == (8, 8, 3)
    assert (fitted[..., 0] == fitted[..., 2]).all()
    np.testing.assert_array_equal(wants.fitted(fitted, 8), fitted)
    numbers = wants.normalized(fitted)
    np.testing.assert_allclose(numbers, (fitted / 255 - 0.5) / 0.25, atol=1e-6)
    one = ImageInput(size=4, channels=1, mean=(0.0,), std=(1.0,))
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert (one.fitted(red, 4) == 76).all()
    with pytest.raises(BadInput, match="2 channels"):
        wants.fitted(np.zeros((4, 4, 2), np.uint8), 8)


def test_sides_and_numbers_that_cannot_be_are_said():
    wants = ImageInput(size=28, multiple=14)
    assert wants.side(None, "x") == 28
    assert wants.side(98, "x") == 98
    with pytest.raises(BadInput, match=r"data.size = 100 .* 14, .* set it to 98"):
        wants.side(100, "data.size")
    with pytest.raises(BadInput, match="set it to 14"):
        wants.side(5, "data.size")
    for fields, said in (
        ({"size": 0}, "at least 1"),
        ({"size": 8, "mean": (0.5,)}, "1 numbers for 3"),
        ({"size": 8, "std": (1.0, 0.0, 1.0)}, "must be positive"),
    ):
        with pytest.raises(BadInput, match=said):
            ImageInput(**fields)
