"""Corrections of decoders equal the merged weights, experts and tied heads included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.deltas.lora import LoRA
from lowrank.models.decoder import LanguageModel, empty_cache
from lowrank.models.decoder_spec import DecoderSpec

pytestmark = pytest.mark.long

SPEC = DecoderSpec(
    vocab_size=31, d_model=12, num_layers=2, num_heads=4, num_kv_heads=2, d_head=6,
    d_ff=10, max_positions=16, init_stddev=0.4,
)  # fmt: skip
SHAPES = {
    "windows": {"window": 3, "local": [True, False], "qk_norm": True},
    "experts": {"num_experts": 3, "experts_per_token": 2},
    "fused": {
        "norm": "layer", "positions": "learned", "gated": False, "fused_qkv": True,
        "qkv_bias": True, "num_kv_heads": 4, "activation": "gelu",
    },
}  # fmt: skip
BATCH = {
    "ids": jax.random.randint(jax.random.key(0), (2, 7), 0, 31),
    "mask": jnp.arange(7)[None] < jnp.array([[7], [4]]),
    "label": jax.random.randint(jax.random.key(1), (2, 7), 0, 31),
}


def adapted_of(name, pattern, *, method=None, scan=True, **options):
    shape = dataclasses.replace(SPEC, **SHAPES[name])
    model = LanguageModel(shape, scan=scan, precision="highest", **options)
    params = jax.jit(model.init)(jax.random.key(2), BATCH)["params"]
    apply = lambda p, batch: model.apply({"params": p}, batch, method=method)
    rules = [Rule(pattern, LoRA(alpha=6.0), rank=2)]
    adapted = attach(apply, params, BATCH, rules=rules)
    frozen, trained = adapted.init(jax.random.key(3))
    keys = iter(jax.random.split(jax.random.key(4), len(jax.tree.leaves(trained))))
    trained = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), trained
    )
    return model, apply, adapted, frozen, trained


def assert_merged(apply, adapted, frozen, trained, batch=BATCH):
    found = jax.jit(adapted.apply)(frozen, trained, batch)
    merged = adapted.merge(frozen, trained, adapted.dials())
    want = jax.jit(apply)(merged, batch)
    plain = jax.jit(apply)(frozen_params(adapted, frozen, trained), batch)
    mask = np.asarray(batch["mask"])
    pairs = zip(*map(jax.tree.leaves, (found, want, plain)), strict=True)
    moved = 0.0
    for own in pairs:
        one, other, base = (np.asarray(x)[mask] for x in own)
        np.testing.assert_allclose(one, other, atol=2e-4)
        moved = max(moved, np.abs(one - base).max())
    assert moved > 1e-2


def frozen_params(adapted, frozen, trained):
    """The base's weights: merged with corrections that are nothing."""
    nothing = jax.tree.map(jnp.zeros_like, trained)
    return adapted.merge(frozen, nothing, adapted.dials())


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_every_kernel(name, scan):
    _, apply, *rest = adapted_of(name, "decoder/**/kernel", scan=scan)
    assert_merged(apply, *rest)


def test_every_expert_has_a_correction_of_its_own():
    *_, adapted, _, trained = adapted_of("experts", "**/experts/{gate,up,down}/kernel")
    path = "decoder/layer/mlp/experts/up/kernel"
    assert trained[path]["a"].shape == (2, 3, 2, 12)
    assert trained[path]["b"].shape == (2, 3, 2, 10)
    assert adapted.sites[path].num_layers == 6


def test_the_token_table_that_is_the_head_as_well():
    _, apply, *rest = adapted_of("windows", "**/token/embedding")
    assert_merged(apply, *rest)


def test_scores_in_pieces():
    pieces = {"method": "scores", "most_logits": 2 * SPEC.vocab_size}
    for rule in ("decoder/**/kernel", "**/token/embedding"):
        _, apply, *rest = adapted_of("windows", rule, **pieces)
        assert_merged(apply, *rest)


@pytest.mark.parametrize("rule", ["decoder/**/kernel", "**/token/embedding"])
def test_slopes_in_pieces_are_those_of_all_logits(rule):
    found = []
    for most in (2 * SPEC.vocab_size, 10**9):
        pieces = {"method": "scores", "most_logits": most}
        *_, adapted, frozen, trained = adapted_of("windows", rule, **pieces)

        def loss(trained, frozen, adapted=adapted):
            scores = adapted.apply(frozen, trained, BATCH)
            return jnp.sum(jnp.where(BATCH["mask"], scores["picked"], 0))

        # Compiled ahead, as steps are.
        step = jax.jit(jax.grad(loss)).lower(trained, frozen).compile()
        found.append(step(trained, frozen))
    # Sums of some terms around one, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *found)


def test_what_is_read_with_a_cache_is_corrected_alike():
    model, _, adapted, frozen, trained = adapted_of("windows", "decoder/**/kernel")
    whole = adapted.apply(frozen, trained, BATCH)
    read = lambda p, batch, cache: model.apply(
        {"params": p}, batch, cache, method="read"
    )
    cache = empty_cache(model.spec, 2, 7)
    part = {name: BATCH[name][:, :4] for name in ("ids", "mask")}
    rules = [Rule("decoder/**/kernel", LoRA(alpha=6.0), rank=2)]
    params = frozen_params(adapted, frozen, trained)
    reader = attach(read, params, part, cache, rules=rules)
    own, _ = reader.init(jax.random.key(0))
    step = jax.jit(reader.apply)
    first, cache = step(own, trained, part, cache)
    found = [first]
    for n in range(4, 7):
        one = {name: BATCH[name][:, n : n + 1] for name in ("ids", "mask")}
        logits, cache = step(own, trained, one, cache)
        found.append(logits)
    mask = np.asarray(BATCH["mask"])
    got = np.concatenate(found, axis=1)[mask]
    np.testing.assert_allclose(got, np.asarray(whole)[mask], atol=1e-4)
