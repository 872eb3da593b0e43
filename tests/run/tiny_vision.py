"""A random tiny Vision Transformer and images whose class is easily seen."""

import json

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from lowrank.core.trees import flatten
from lowrank.io import vit
from lowrank.models.vision import Classifier, VisionSpec

SPEC = VisionSpec(
    image_size=16, patch_size=4, d_model=24, num_layers=2, num_heads=4, d_ff=48,
    layer_scale=True, norm_eps=1e-6,
)  # fmt: skip
CONFIG = {
    "model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip
PREPARED = {"size": 16, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
#: What a class looks like: which channel is bright.
CLASSES = {"red": 0, "green": 1, "blue": 2}


def write_base(folder, seed=0, prepared=PREPARED):
    """A random encoder in the layout of Hugging Face."""
    one = {"pixels": np.zeros((1, 16, 16, 3), np.float32)}
    model = Classifier(SPEC, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    rng = np.random.default_rng(seed)
    leaves, structure = flatten(shapes)
    draw = lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32)
    gain = lambda path: np.float32("scale" in path)
    params = structure.unflatten(
        {path: draw(leaf) + gain(path) for path, leaf in leaves.items()}
    )
    folder.mkdir(parents=True)
    tensors = vit.tensors_of(vit.DINOV2, params, SPEC, prefix="")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / vit.PREPARATION).write_text(json.dumps(prepared))
    return folder


def image(label, rng, height=12, width=14):
    """Noise in which one channel is brighter."""
    pixels = rng.integers(0, 130, (height, width, 3))
    pixels[..., CLASSES[label]] += 60
    return pixels.astype(np.uint8)


def write_images(folder, per_class=24, seed=0, classes=tuple(CLASSES)):
    """A folder of PNG files for each class."""
    rng = np.random.default_rng(seed)
    for label in classes:
        own = folder / label
        own.mkdir(parents=True)
        for number in range(per_class):
            Image.fromarray(image(label, rng)).save(own / f"{number}.png")
    return folder
