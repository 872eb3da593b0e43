"""A language model trained and judged: packed rows, trials in packs, the experiment."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_language import write_llama, write_meanings

from experiments import data_to_text
from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.core.errors import BadInput
from lowrank.data.packing import one_by_one, packed
from lowrank.data.sequences import SequencePipeline, eval_rows
from lowrank.data.talk import Spoken
from lowrank.deltas.lora import LoRA
from lowrank.io.language import load
from lowrank.io.peft import read_adapter
from lowrank.run.answering import talk_of
from lowrank.run.fit import fit
from lowrank.run.judges import OF_TOKENS
from lowrank.run.language import INPUTS
from lowrank.run.saying import Speaker
from lowrank.train.loop import LoopSpec
from lowrank.train.losses import next_token
from lowrank.train.optim import AdamW

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def base(folder):
    return load(str(folder), precision="highest")


def spoken(count=24):
    """Every question has one answer that can be learned."""
    rng = np.random.default_rng(0)
    ids, starts = [], []
    for _ in range(count):
        color, size = rng.integers(17, 19), rng.integers(19, 21)
        ids.append(np.array([2, 21, color, size, 3, 15, size, color, 1], np.int32))
        starts.append(5)
    return Spoken(tuple(ids), tuple(starts))


def inputs(batch):
    return {name: batch[name] for name in INPUTS}


def trained(base, rates, seeds, steps=24, **more):
    rows = packed(spoken(), 20, 0)
    batches = SequencePipeline(rows, batch_size=4, trial_seeds=seeds, num_steps=steps)
    example = inputs({k: v[0] for k, v in batches.examples()[0].items()})
    rules = [Rule("decoder/**/kernel", LoRA(alpha=8.0), rank=4)]
    adapted = attach(base.scores, base.params, example, rules=rules)
    return fit(
        adapted, batches, validation=eval_rows(one_by_one(spoken(8), 0), 4),
        loss=next_token, judge=OF_TOKENS, optim=[AdamW(lr=rate) for rate in rates],
        seeds=seeds, loop=LoopSpec(evaluate_every=8, select="loss", log_every=1),
        inputs=inputs, progress=False, **more,
    )  # fmt: skip


def test_a_language_model_learns_its_answers_and_the_best_loss_is_kept(base):
    logged = []
    fitted = trained(
        base, [0.02], [0], log=lambda at, rows: logged.append((at, dict(rows[0])))
    )
    losses = [row["train/loss"] for _, row in logged if "train/loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    validated = {at: row for at, row in logged if "validation/loss" in row}
    best = min(validated, key=lambda at: validated[at]["validation/loss"])
    assert int(fitted.state.best_step[0]) == best
    assert validated[best]["validation/perplexity"] == pytest.approx(
        np.exp(validated[best]["validation/loss"]), rel=1e-6
    )
    # The base is as it was, and so is what it says.
    assert fitted.adapted.frozen() is not None


@pytest.mark.slow
def test_trials_of_a_pack_are_those_alone(base):
    both = trained(base, [0.02, 0.005], [0, 1], steps=6)
    for trial, (rate, seed) in enumerate(((0.02, 0), (0.005, 1))):
        alone = trained(base, [rate], [seed], steps=6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            both.trained(trial),
            alone.trained(),
        )


def test_packed_and_padded_rows_give_one_loss_and_gradient(base):
    rules = [Rule("decoder/**/kernel", LoRA(alpha=8.0), rank=4)]
    constants = {"label_smoothing": jnp.float32(0.1)}
    found = []
    for rows in (packed(spoken(), 20, 0), one_by_one(spoken(), 0)):
        batch = {name: jnp.asarray(x) for name, x in rows.items()}
        adapted = attach(base.scores, base.params, inputs(batch), rules=rules)
        frozen, start = adapted.init(jax.random.key(1))
        start = jax.tree.map(lambda x: x + 0.1, start)

        def loss(tree, adapted=adapted, frozen=frozen, batch=batch):
            sums = next_token(
                adapted.apply(frozen, tree, inputs(batch)), batch, constants
            )
            return sums.loss / sums.weight

        found.append(jax.jit(jax.value_and_grad(loss))(start))
    (one, slopes), (other, others) = found
    np.testing.assert_allclose(one, other, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slopes, others
    )


def test_another_number_to_choose_by_is_refused():
    with pytest.raises(BadInput, match="accuracy, loss, perplexity"):
        OF_TOKENS.check("loop.select", "macro_f1", [])


@pytest.fixture
def meanings(tmp_path):
    return write_meanings(tmp_path)


def plan(folder, meanings, **more):
    fields = {
        "base": str(folder),
        "data": {"path": str(meanings), "seed": 0, "train_rows": None,
                 "validation_rows": None, "test_rows": None},
        "pattern": "decoder/**/kernel", "rank": 4, "alpha": 8.0, "lr": 0.02,
        "steps": 30, "batch_size": 2, "length": 64, "evaluate_every": 10,
        "answer_tokens": 8, "together": 4, "seed": 0,
        "results": str(meanings / "results"), "adapter": str(meanings / "adapter"),
        "merged": None, "cache": None, "progress": False,
    }  # fmt: skip
    return data_to_text.read({**fields, **more})


@pytest.mark.slow
def test_the_experiment_tells_before_from_after(folder, meanings):
    found = data_to_text.study(plan(folder, meanings, merged=str(meanings / "merged")))
    assert (
        found["after"]["loss"]["estimate"] < 0.7 * found["before"]["loss"]["estimate"]
    )
    assert found["difference"]["rouge_l"]["estimate"] > 0
    assert sum(found["rows"].values()) == 32
    assert json.loads(json.dumps(found)) == found
    text = data_to_text.table(found)
    assert "| bleu |" in text
    adapter = read_adapter(meanings / "adapter")
    assert len(adapter.corrections) == 2 * 7
    assert any("q_proj" in module for module in adapter.corrections)
    # What was judged is what the folder holds, and it answers as the study said.
    again = load(str(meanings / "merged"), precision="highest")
    assert again.fingerprint != load(str(folder)).fingerprint
    (first,) = (one["after"] for one in found["examples"][:1])
    rows = plan(folder, meanings).data.load().splits["test"]
    speaker = Speaker(again, talk_of(again), rows.questions, tokens=8, together=4)
    assert speaker.merged(again.params).texts[0] == first


def test_plans_that_cannot_be(folder, meanings):
    with pytest.raises(BadInput, match="data is a group"):
        plan(folder, meanings, data="here")
    with pytest.raises(BadInput, match="stepz"):
        plan(folder, meanings, stepz=1)
    # Before anything is trained.
    with pytest.raises(BadInput, match="is not empty"):
        data_to_text.study(plan(folder, meanings, merged=str(meanings), base="nowhere"))
    with pytest.raises(BadInput, match="more than 16"):
        data_to_text.study(plan(folder, meanings, length=16))
