"""Packages that were tried and could not be used, with what they said."""

UNUSABLE = {
    "canvit-nnx, eqx-zoo, heal-swin-nnx": "need Python 3.12 or later",
    "clip-jax 0.0.6": "imports Flax classes that transformers 5 no longer has",
    "deepvit-flax 0.0.3": "imports a name that its own module lacks",
    "elegy 0.5.0": "imports numpy.lib.arraysetops, which is gone",
    "eqxvision 0.2.8": "imports equinox.experimental, which is gone",
    "flax-vision-models": "needs Python before 3.11",
    "flaxmodels 0.1.3, GPT-2": "without downloaded weights reads a field never set",
    "haliax 1.3": "imports a private name of jax that is gone",
    "jax-models 0.0.5, ConvNeXt": "calls .item() on what is traced; so under any jit",
    "jax-transformer": "draws its weights inside the call: it has no parameters",
    "lpips-nnx 0.1.0": "downloads its weights while it is built",
    "neural-tangents 0.6.5, objax 1.8.0, trax 1.4.1": (
        "import TensorFlow, TensorBoard or gin, which this suite does not install"
    ),
    "torchax 0.0.13": "fails at import beside torch 2.13",
    "vit-flax 0.0.3": "imports flax.nn, which is gone",
}
