"""Rules: which weight falls under which, and what is refused before any compiling."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lowrank.adapt.assign import claim
from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Freeze, Rule, Train
from lowrank.core.errors import BadInput, UnknownName
from lowrank.deltas.lora import LoRA

X = jnp.ones((3, 6))
PARAMS = {
    "body": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)},
    "head": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(5)},
    "steps": jnp.arange(3),
}


def apply(p, x):
    hidden = jnp.tanh(x @ p["body"]["kernel"] + p["body"]["bias"][None])
    return hidden @ p["head"]["kernel"] + p["head"]["bias"][None] + p["steps"][0]


def attached(*rules, **options):
    return attach(apply, PARAMS, X, rules=rules, **options)


def lora(pattern, rank=2, **options):
    return Rule(pattern, LoRA(), rank=rank, **options)


@pytest.fixture
def unhooked():
    """As users run it: the type hook of the tests would speak before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_first_match_wins():
    claims = claim(
        [Freeze("body/bias"), lora("**/kernel"), Train("**")],
        ["body/kernel", "body/bias", "head/kernel", "head/bias"],
    )
    kinds = {path: type(rule).__name__ for path, (rule,) in claims.items()}
    assert kinds == {
        "body/kernel": "Rule",
        "head/kernel": "Rule",
        "body/bias": "Freeze",
        "head/bias": "Train",
    }


def test_each_tree_holds_what_its_rule_says():
    adapted = attached(Freeze("head/kernel"), Train("head/*"), lora("body/kernel", 3))
    frozen, trained = adapted.init(jax.random.key(0))
    assert set(frozen) == {"body/kernel", "body/bias", "head/kernel", "steps"}
    assert set(trained) == {"head/bias", "body/kernel"}
    assert trained["body/kernel"]["a"].shape == (3, 6)
    assert adapted.fully_trained == ("head/bias",)
    assert adapted.ranks == {"body/kernel": 3}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ([lora("boddy/kernel")], UnknownName, "'boddy/kernel'.*'body/kernel'"),
        ([lora("kernel")], UnknownName, r"\*\*/name"),
        ([lora("**/kernel"), Train("head/kernel")], BadInput, "shadowed.*narrower"),
        ([Freeze("**"), Train("head/bias")], BadInput, "shadowed"),
        ([Freeze("**")], BadInput, "trains anything"),
        ([], BadInput, "trains anything"),
        (["**/kernel"], BadInput, "Rule, Train or Freeze"),
        ([lora("body/bias")], BadInput, "'body/bias'.*two or more axes"),
        ([lora("steps")], BadInput, "'steps'.*real numbers"),
        ([Train("steps")], BadInput, "int32.*no gradient"),
        ([lora("body/kernel", 7)], BadInput, r"rank 7.*min\(d_in, d_out\) = 6"),
        ([lora("body/kernel", 2, max_rank=7)], BadInput, "rank 7.*= 6"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(rules, error, words):
    with pytest.raises(error, match=words):
        attached(*rules)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "2", None])
def test_a_rank_is_a_whole_number_of_at_least_one(rank):
    with pytest.raises(BadInput, match="rank must be a whole number"):
        lora("**", rank)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("max_rank", [0, True, 1.5])
def test_a_largest_rank_is_one_too(max_rank):
    with pytest.raises(BadInput, match="max_rank must be a whole number"):
        lora("**", 1, max_rank=max_rank)


def test_a_rank_fits_below_its_largest():
    with pytest.raises(BadInput, match="rank 3 is above max_rank 2"):
        lora("**", 3, max_rank=2)


@pytest.mark.usefixtures("unhooked")
def test_a_rule_holds_a_delta():
    with pytest.raises(
        BadInput, match=r"must be a Delta, such as LoRA\(\), not 'lora'"
    ):
        Rule("**", "lora", rank=1)


@pytest.mark.usefixtures("unhooked")
def test_an_unknown_start_is_refused():
    with pytest.raises(BadInput, match="'keep', 'zeros' or 'dense', not 'ones'"):
        Train("**", init="ones")


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("ref_rank", [0, -4, True, 2.0])
def test_the_divisor_of_scales_is_a_whole_number(ref_rank):
    with pytest.raises(BadInput, match="ref_rank"):
        attached(lora("body/kernel"), ref_rank=ref_rank)


def test_the_divisor_defaults_to_the_largest_rank():
    rules = [lora("body/kernel", 4), lora("head/kernel", 2)]
    assert attached(*rules).ref_rank == 4
    adapted = attached(*rules, ref_rank=8)
    assert {float(d["scale"]) for d in adapted.dials().values()} == {2.0}


def test_keep_copies_and_never_shares():
    adapted = attached(Train("head/*"))
    frozen, trained = adapted.init(jax.random.key(0))
    kept = trained["head/kernel"]
    assert kept is not PARAMS["head"]["kernel"]
    assert kept.unsafe_buffer_pointer() != (
        PARAMS["head"]["kernel"].unsafe_buffer_pointer()
    )
    assert jnp.array_equal(kept, PARAMS["head"]["kernel"])
    assert frozen["body/kernel"] is PARAMS["body"]["kernel"]
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(trained)
    assert not PARAMS["head"]["kernel"].is_deleted()


def test_dense_is_drawn_anew_for_every_trial():
    adapted = attached(Train("head/*", init="dense"))
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.vmap(adapted.init_trained)(keys)
    kernels = np.asarray(drawn["head/kernel"])
    assert kernels.shape == (3, 8, 5)
    assert len({k.tobytes() for k in kernels}) == 3
    assert not np.any(drawn["head/bias"])
    alone = adapted.init_trained(keys[1])["head/kernel"]
    np.testing.assert_array_equal(kernels[1], alone)


def test_dense_has_variance_one_over_its_inputs():
    leaf = jnp.zeros((400, 300))
    drawn = Train("*", init="dense").draw(jax.random.key(0), leaf)
    assert float(drawn.std()) == pytest.approx(400**-0.5, rel=0.01)
    assert float(jnp.abs(drawn).max()) < 2.3 * 400**-0.5


def test_dense_needs_a_matrix():
    with pytest.raises(BadInput, match="defined for matrices"):
        Train("*", init="dense").draw(jax.random.key(0), jnp.zeros((2, 3, 4)))


def test_zeros_are_zeros_of_the_same_kind():
    leaf = jnp.ones((2, 3), jnp.bfloat16)
    drawn = Train("*", init="zeros").draw(jax.random.key(0), leaf)
    assert drawn.dtype == jnp.bfloat16
    assert drawn.shape == (2, 3)
    assert not jnp.any(drawn)
