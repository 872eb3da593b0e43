"""Models that nobody here wrote, built small, as their packages build them.

An entry returns (apply, params, inputs): what it takes to call the model as a pure
function, and nothing that knows of adaptation.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from pure import KEY, equinox, haiku, ids, image, in_nnx, linen, model

# Linen.


@model("flaxmodels", "ResNet-18", "Linen")
def flaxmodels_resnet():
    import flaxmodels

    net = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5)
    return linen(net, image(1, 16, 16, 3), train=False)


@model("jax-resnet", "ResNeSt block", "Linen")
def jax_resnest():
    from jax_resnet import ResNeStBottleneckBlock

    return linen(ResNeStBottleneckBlock(4), image(1, 8, 8, 8))


@model("jax-resnet", "ResNeXt block (grouped)", "Linen")
def jax_resnext():
    from jax_resnet import ResNetBottleneckBlock

    return linen(ResNetBottleneckBlock(8, groups=4), image(1, 8, 8, 8))


@model("bottleneck-transformer-flax", "BoTNet", "Linen")
def botnet():
    from bottleneck_transformer_flax.botnet import BoTNet, BoTNetConfig

    config = BoTNetConfig(
        stage_sizes=(1, 1, 1, 1), num_classes=3, num_heads=2, head_dim=4,
        initial_filters=8,
    )  # fmt: skip
    return linen(BoTNet(config), image(4, 32, 32, 3))


@model("transformer-in-transformer-flax", "TNT", "Linen")
def tnt():
    from transformer_in_transformer_flax.tnt import TNTConfig, TransformerInTransformer

    config = TNTConfig(
        num_classes=3, depth=1, image_size=32, patch_size=16, transformed_patch_size=4,
        inner_dim=4, inner_heads=2, inner_dim_head=4, outer_dim=8, outer_heads=2,
        outer_dim_head=4,
    )  # fmt: skip
    return linen(TransformerInTransformer(config), image(1, 32, 32, 3))


@model("local-attention-flax", "local attention", "Linen")
def local_attention():
    from local_attention_flax import LocalAttention

    net = LocalAttention(dim=8, window_size=4, heads=2, dim_head=4)
    return linen(net, image(8, 8))


@model("jax-models", "MLP-Mixer", "Linen")
def mlp_mixer():
    from jax_models.models.mlp_mixer import MLPMixer

    net = MLPMixer(
        patch_size=8, num_mixers_layers=2, hidden_size=8, channels_dim=12,
        tokens_dim=6, attach_head=True, num_classes=3,
    )  # fmt: skip
    return linen(net, image(1, 16, 16, 3), deterministic=True)


@model("jax-models", "CaiT", "Linen")
def cait():
    from jax_models.models.cait import CaiT

    net = CaiT(
        patch_size=8, embed_dim=8, depth=2, num_heads=2, depth_token_only=1,
        num_classes=3,
    )  # fmt: skip
    return linen(net, image(1, 16, 16, 3), deterministic=True)


@model("vanilla-transformer-jax", "encoder block", "Linen")
def vtransformer():
    from vtransformer.layers import EncoderBlock

    return linen(EncoderBlock(8, 2, 4, 4, 12), image(2, 4, 8))


# Haiku.


@model("dm-haiku", "ResNet-18", "Haiku")
def haiku_resnet():
    import haiku as hk

    net = lambda x, training=True: hk.nets.ResNet18(4)(x, training)
    return haiku(net, image(1, 16, 16, 3), training=False)


@model("dm-haiku", "MobileNet", "Haiku")
def haiku_mobilenet():
    import haiku as hk

    def net(x, training=True):
        return hk.nets.MobileNetV1((1, 2), (6, 8), 4)(x, training)

    return haiku(net, image(1, 8, 8, 3), training=False)


@model("dm-haiku", "LSTM unrolled by scan", "Haiku")
def haiku_lstm():
    import haiku as hk

    def net(x):
        core = hk.DeepRNN([hk.LSTM(6), hk.GRU(5)])
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return haiku(net, image(5, 2, 4))


@model("progen-transformer", "ProGen", "Haiku")
def progen():
    from progen_transformer.progen import ProGenBase

    options = dict(
        num_tokens=20, dim=8, seq_len=8, depth=2, window_size=4, global_mlp_depth=1,
        heads=2, dim_head=4, ff_mult=2,
    )  # fmt: skip
    return haiku(lambda x: ProGenBase(**options)(x), ids(8))


@model("mlp-gpt-jax", "gMLP language model", "Haiku")
def mlp_gpt():
    from mlp_gpt_jax.mlp_gpt_jax import MLPGpt

    options = dict(num_tokens=20, dim=8, depth=2, seq_len=8, ff_mult=2)
    return haiku(lambda x: MLPGpt(**options)(x), ids(8))


@model("jraph", "graph network", "Haiku")
def graph_network():
    import haiku as hk
    import jraph

    graph = jraph.GraphsTuple(
        nodes=image(4, 3), edges=image(5, 2), senders=jnp.array([0, 1, 2, 3, 0]),
        receivers=jnp.array([1, 2, 3, 0, 2]), n_node=jnp.array([4]),
        n_edge=jnp.array([5]), globals=image(1, 2),
    )  # fmt: skip

    def net(nodes, edges):
        mlp = lambda size: jraph.concatenated_args(lambda x: hk.nets.MLP([6, size])(x))
        network = jraph.GraphNetwork(mlp(4), mlp(3), mlp(2))
        done = network(graph._replace(nodes=nodes, edges=edges))
        return done.nodes, done.globals

    return haiku(net, graph.nodes, graph.edges)


@model("e3nn-jax", "equivariant network", "Haiku")
def equivariant():
    import e3nn_jax as e3nn
    from e3nn_jax import haiku as layers

    def net(x):
        h = e3nn.IrrepsArray("2x0e + 2x1o", x)
        h = layers.Linear("4x0e + 3x1o")(h)
        h = e3nn.tensor_square(h)
        return layers.Linear("2x0e + 1x1o")(h).array

    return haiku(net, image(3, 8))


# Equinox.


@model("equimo", "vision transformer", "Equinox")
def equimo_vit():
    from equimo.models.vit import VisionTransformer

    net = VisionTransformer(
        img_size=16, in_channels=3, dim=8, patch_size=8, num_heads=[2], depths=[2],
        num_classes=3, key=KEY,
    )  # fmt: skip
    call = lambda net, x: net(x, inference=True, key=KEY)
    return equinox(net, image(3, 16, 16), call=call)


@model("jaxonmodels", "vision transformer of CLIP", "Equinox")
def jaxonmodels_vit():
    from jaxonmodels.models.vit import VisionTransformer

    net = VisionTransformer(16, 8, 8, 2, 2, 6, key=KEY, dtype=jnp.float32)
    return equinox(net, image(3, 16, 16))


@model("palm-jax", "PaLM", "Equinox")
def palm():
    from palm_jax.palm_lite import PaLM

    net = PaLM(
        num_tokens=20, dim=8, dim_head=4, depth=2, heads=2, key=KEY, max_seq_len=8
    )
    return equinox(net, ids(6))


@model("esm2quinox", "ESM-2 (layers scanned, embedding tied)", "Equinox")
def esm2():
    import esm2quinox

    net = esm2quinox.ESM2(2, 8, 2, token_dropout=True, key=KEY)
    call = lambda net, x: net(x).logits
    return equinox(net, ids(6, high=30), call=call)


@model("gatv2-eqx", "graph attention", "Equinox")
def graph_attention():
    from gatv2_eqx.model import GATv2

    net = GATv2(4, key=KEY)
    adjacency = jnp.asarray(np.eye(3) + np.eye(3, k=1), jnp.float32)
    call = lambda net, x, a: net(x, a, 2, key=KEY)
    return equinox(net, image(3, 4), adjacency, call=call)


@model("flowjax", "normalizing flow (log probability)", "Equinox")
def flow():
    import jax.random as jr
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    net = coupling_flow(
        jr.key(0), base_dist=Normal(jnp.zeros(4)), flow_layers=2, nn_width=6
    )
    import equinox as eqx
    import paramax

    params, static = eqx.partition(net, eqx.is_inexact_array)

    def apply(params, x):
        return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    return apply, params, (image(3, 4),)


@model("diffrax", "neural differential equation", "Equinox")
def neural_ode():
    import diffrax
    import equinox as eqx

    net = eqx.nn.MLP(3, 3, 6, 2, activation=jnp.tanh, key=KEY)

    def call(net, y):
        term = diffrax.ODETerm(lambda t, y, args: net(y))
        # Its default derives a loop of unknown length by a rule of its own.
        done = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y, max_steps=16,
            adjoint=diffrax.DirectAdjoint(),
        )  # fmt: skip
        return done.ys

    return equinox(net, image(3), call=call)


# NNX.


def mamba(family, config, **options):
    """A Mamba language model, which returns a mapping."""
    config = config(
        vocab_size=20, hidden_size=8, head_dim=4, chunk_size=4, num_hidden_layers=2,
        **options,
    )  # fmt: skip
    apply, params, inputs = in_nnx(family(config, rngs=nnx.Rngs(0)), ids(1, 8))
    return lambda p, x: apply(p, x)["logits"], params, inputs


@model("mamba2-jax", "Mamba-2 language model", "NNX")
def mamba2():
    from mamba2_jax.modeling import Mamba2Config, Mamba2ForCausalLM

    return mamba(Mamba2ForCausalLM, Mamba2Config, state_size=4)


@model("mamba3-jax", "Mamba-3 language model", "NNX")
def mamba3():
    from mamba3_jax.modeling import Mamba3Config, Mamba3ForCausalLM

    return mamba(Mamba3ForCausalLM, Mamba3Config, state_size=8)


# Others.


@model("penzai", "Llama-like transformer", "Penzai")
def penzai_llama():
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=1, query_head_multiplier=2, embedding_dim=8, projection_dim=4,
        mlp_hidden_dim=12, num_decoder_blocks=2, vocab_size=20, mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )  # fmt: skip
    net = llamalike.build_llamalike_transformer(config, init_base_rng=KEY)
    body, variables = pz.unbind_params(net)
    params = {v.label: v.value.unwrap(*v.value.named_axes) for v in variables}
    axes = {v.label: tuple(v.value.named_axes) for v in variables}

    def apply(params, tokens):
        own = [
            pz.ParameterValue(label=name, value=pz.nx.wrap(array).tag(*axes[name]))
            for name, array in params.items()
        ]
        bound = pz.bind_variables(body, own)
        named = pz.nx.wrap(tokens).tag("batch", "seq")
        positions = pz.nx.arange("seq", tokens.shape[1])
        done = bound(named, token_positions=positions)
        return done.unwrap("batch", "seq", "vocabulary")

    return apply, params, (ids(2, 5),)


@model("jax", "stax convolutional network", "stax")
def stax_network():
    from jax.example_libraries import stax

    init, apply = stax.serial(
        stax.Conv(4, (3, 3), padding="SAME"), stax.Relu, stax.MaxPool((2, 2)),
        stax.GeneralConv(("NHWC", "HWIO", "NHWC"), 6, (3, 3)), stax.Tanh,
        stax.Flatten, stax.Dense(3),
    )  # fmt: skip
    x = image(2, 8, 8, 2)
    return apply, init(KEY, x.shape)[1], (x,)
