"""Generation: greedy is the argmax of whole reads, draws have their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import BadInput
from lowrank.models.decoder import LanguageModel, empty_cache
from lowrank.models.decoder_spec import DecoderSpec
from lowrank.models.generation import generate, greedy, sampling

SPEC = DecoderSpec(
    vocab_size=23, d_model=12, num_layers=2, num_heads=2, num_kv_heads=1, d_head=6,
    d_ff=16, max_positions=32, init_stddev=0.6,
)  # fmt: skip
MODEL = LanguageModel(SPEC, precision="highest")
PROMPTS = [[3, 7, 1, 9], [5, 2], [4]]
STEPS = 6


def padded(side="right"):
    seq = max(map(len, PROMPTS))
    ids, mask = np.zeros((3, seq), np.int32), np.zeros((3, seq), bool)
    for row, own in enumerate(PROMPTS):
        part = slice(0, len(own)) if side == "right" else slice(seq - len(own), seq)
        ids[row, part], mask[row, part] = own, True
    return {"ids": jnp.asarray(ids), "mask": jnp.asarray(mask)}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), padded())


APPLY = jax.jit(MODEL.apply)


def by_hand(params, own, steps=STEPS):
    """Reads everything again for every token, padded to one shape."""
    ids = list(own)
    for _ in range(steps):
        row = np.zeros((1, 12), np.int32)
        row[0, : len(ids)] = ids
        batch = {"ids": row, "mask": np.arange(12)[None] < len(ids)}
        ids.append(int(APPLY(params, batch)[0, len(ids) - 1].argmax()))
    return ids[len(own) :]


def run(params, prompts, end=(), **more):
    read = lambda batch, cache: MODEL.apply(params, batch, cache, method="read")
    rows, seq = prompts["ids"].shape
    cache = empty_cache(SPEC, rows, seq + STEPS)
    ends = jnp.array(end, jnp.int32)
    return generate(read, prompts, cache, steps=STEPS, end=ends, pad=0, **more)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_the_argmax_of_whole_reads(params, side):
    ids, real = jax.jit(lambda p: run(p, padded(side)))(params)
    assert real.all()
    assert ids.tolist() == [by_hand(params, own) for own in PROMPTS]


def test_a_row_that_has_ended_stays_so_and_the_others_go_on(params):
    free = [by_hand(params, own) for own in PROMPTS]
    end = free[0][2]
    ids, real = jax.jit(lambda p: run(p, padded(), end=(end,)))(params)
    for row, own in enumerate(free):
        length = own.index(end) + 1 if end in own else STEPS
        assert ids[row, :length].tolist() == own[:length]
        assert (ids[row, length:] == 0).all()
        assert real[row].tolist() == [True] * length + [False] * (STEPS - length)
    assert not real.all()


def test_trials_of_a_pack_generate_as_by_themselves(params):
    other = jax.jit(MODEL.init)(jax.random.key(1), padded())
    both = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    alone = jax.jit(lambda p: run(p, padded(), end=(2, 5))[0])
    ids = jax.jit(jax.vmap(alone))(both)
    for row, own in enumerate((params, other)):
        assert ids[row].tolist() == alone(own).tolist()


def test_draws_depend_on_the_key_alone(params):
    drawn = jax.jit(lambda key: run(params, padded(), choose=sampling(2.0), key=key)[0])
    draw = lambda seed: drawn(jax.random.key(seed)).tolist()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_what_a_row_draws_does_not_depend_on_its_neighbours(params):
    """With keys of their own; two rows alike with one key draw differently."""
    prompts, keys = padded(), jax.random.split(jax.random.key(3), 3)
    draw = jax.jit(lambda own, key: run(params, own, choose=sampling(2.0), key=key)[0])
    own = lambda rows: {name: x[rows] for name, x in prompts.items()}
    drawn = lambda rows: draw(own(rows), keys[rows]).tolist()
    together = drawn(jnp.arange(3))
    assert [drawn(jnp.array([row]))[0] for row in range(3)] == together
    twice = {n: jnp.repeat(x[:1], 2, axis=0) for n, x in prompts.items()}
    first, second = draw(twice, keys[0]).tolist()
    assert first != second


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 0.5}, 4),
        ({"top_k": 2}, 2),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.01}, 1),
        ({"top_k": 3, "top_p": 0.95}, 3),
    ],
)
def test_draws_have_the_distribution_that_was_asked_for(options, kept):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    want = p ** (1 / options.get("temperature", 1.0))
    want[kept:] = 0
    want /= want.sum()
    logits = jnp.log(jnp.asarray(p, jnp.float32))[None]
    choose = sampling(**options)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = choose(jnp.repeat(logits, len(keys), axis=0), keys)
    found = np.bincount(drawn, minlength=4) / len(keys)
    # Five standard errors.
    np.testing.assert_allclose(found, want, atol=5 * 0.5 / np.sqrt(len(keys)))
    assert (found[kept:] == 0).all()


def test_the_likeliest_token():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    assert greedy(logits, jax.random.split(jax.random.key(0))).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_draws_that_cannot_be(options, text):
    with pytest.raises(BadInput, match=text):
        sampling(**options)


def test_a_cache_without_room_is_refused(params):
    read = lambda batch, cache: MODEL.apply(params, batch, cache, method="read")
    cache = empty_cache(SPEC, 3, 5)
    with pytest.raises(BadInput, match="make one of 10"):
        generate(
            read, padded(), cache, steps=STEPS, end=jnp.array([], jnp.int32), pad=0
        )
