"""Models of Keras and Keras Hub, on the JAX backend; see `catalogue`."""

import jax.numpy as jnp
from pure import ids, image, in_keras, model


@model("keras", "convolutional network", "Keras")
def keras_convolutions():
    import keras

    layers = keras.layers
    x = given = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, strides=2, activation="gelu")(x)
    x = layers.SeparableConv2D(8, 3, padding="same", activation="gelu")(x)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2)(x)
    x = layers.BatchNormalization()(layers.Conv2DTranspose(4, 2, strides=2)(x))
    x = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
    return in_keras(keras.Model(given, x), image(2, 8, 8, 3))


@model("keras", "transformer of Keras layers", "Keras")
def keras_transformer():
    import keras

    x = given = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8)(x)
    x = x + keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = x + keras.layers.EinsumDense("btd,de->bte", (6, 8))(x)
    x = keras.layers.GRU(5)(keras.layers.LayerNormalization()(x))
    return in_keras(keras.Model(given, keras.layers.Dense(3)(x)), ids(2, 6))


def backbone(name, **options):
    """A Keras Hub backbone: (apply, params, inputs) on eight tokens."""
    import keras_hub

    net = getattr(keras_hub.models, f"{name}Backbone")(**options)
    spec = {key: value for key, value in net.input.items()}
    given = {key: ids(1, 8) if "token_ids" in key else jnp.ones((1, 8), int)
             for key in spec}  # fmt: skip
    return in_keras(net, given)


@model("keras-hub", "BERT", "Keras")
def keras_bert():
    return backbone(
        "Bert", vocabulary_size=20, num_layers=2, num_heads=2, hidden_dim=8,
        intermediate_dim=12, max_sequence_length=8,
    )  # fmt: skip


@model("keras-hub", "DeBERTa v3 (disentangled attention)", "Keras")
def keras_deberta():
    return backbone(
        "DebertaV3", vocabulary_size=20, num_layers=2, num_heads=2, hidden_dim=8,
        intermediate_dim=12, max_sequence_length=8, bucket_size=4,
    )  # fmt: skip


@model("keras-hub", "Llama 3", "Keras")
def keras_llama():
    return backbone(
        "Llama3", vocabulary_size=20, num_layers=2, num_query_heads=2,
        num_key_value_heads=1, hidden_dim=8, intermediate_dim=12,
    )  # fmt: skip


@model("keras-hub", "Gemma", "Keras")
def keras_gemma():
    return backbone(
        "Gemma", vocabulary_size=20, num_layers=2, num_query_heads=2,
        num_key_value_heads=1, hidden_dim=8, intermediate_dim=12, head_dim=4,
    )  # fmt: skip


@model("keras-hub", "Mixtral (mixture of experts)", "Keras")
def keras_mixtral():
    return backbone(
        "Mixtral", vocabulary_size=20, num_layers=1, num_query_heads=2,
        num_key_value_heads=1, hidden_dim=8, intermediate_dim=12, num_experts=3,
        top_k=2,
    )  # fmt: skip


@model("keras-hub", "T5", "Keras")
def keras_t5():
    return backbone(
        "T5", vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=8,
        intermediate_dim=12,
    )  # fmt: skip
