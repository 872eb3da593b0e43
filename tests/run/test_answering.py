"""Questions and answers are a trial like any other: run, packed, resumed, judged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_language import write_llama, write_meanings
from tiny_run import composed

from lowrank.core.errors import BadInput, Preempted
from lowrank.io.language import load
from lowrank.io.peft import read_adapter
from lowrank.models.generation import sampling
from lowrank.run.answering import talk_of
from lowrank.run.judge import judge
from lowrank.run.packs import run_pack
from lowrank.run.prepare import prepare, prepare_pack
from lowrank.run.saying import Speaker
from lowrank.run.settings import read
from lowrank.run.stored import load_run, predict
from lowrank.run.survey import survey
from lowrank.run.trial import run_trial

pytestmark = pytest.mark.long

SMALL = (
    "experiment=laptop",
    "data.train_rows=null",
    "data.validation_rows=null",
    "data.test_rows=null",
    "data.batching.length=64",
    "data.batching.batch_size=2",
    "delta.targets=decoder/**/kernel",
    "delta.rank=4",
    "delta.alpha=8",
    "optim.lr=0.02",
    "optim.epochs=4",
    "evaluate.answers=8",
    "evaluate.resamples=50",
    "evaluate.latency=false",
    "evaluate.batch_size=4",
    "loop.evaluate_every=8",
    "loop.checkpoint_every=40",
    "loop.log_every=4",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    for name in ("llama", "data"):
        (root / name).mkdir()
    write_llama(root / "llama")
    write_meanings(root / "data")
    return root


@pytest.fixture(scope="module")
def config(place):
    def made(*overrides):
        own = (
            f"base.source={place / 'llama'}",
            f"data.path={place / 'data'}",
            f"run.root={place / 'runs'}",
            f"run.cache={place / 'cache'}",
        )
        return composed("config", *SMALL, *own, *overrides)

    return made


@pytest.fixture(scope="module")
def finished(config, place):
    directory = place / "finished"
    return directory, run_trial(config(f"run.directory={directory}"))


def numbers(result, split="test"):
    found = result["scores"][split]["metrics"]
    return {name: value["estimate"] for name, value in found.items()}


def test_a_run_teaches_the_answers(config, place, finished):
    _, result = finished
    found = numbers(result)
    assert {"loss", "perplexity", "accuracy", "bleu", "rouge_l", "exact"} <= {*found}
    prepared = prepare(read(config()))
    base = prepared.base

    def predict_base(batch):
        scores = base.scores(base.params, prepared.problem.inputs(batch))
        return {name: x[None] for name, x in scores.items()}

    (before,) = prepared.problem.score("test", predict_base, False)
    start = before.report(resamples=50, level=0.95)["metrics"]["loss"]["estimate"]
    assert found["loss"] < 0.7 * start
    assert np.isclose(found["perplexity"], np.exp(found["loss"]))
    assert result["best_step"] % 8 == 0
    assert result["data"]["rows"]["train"] == len(prepared.problem.task.splits["train"])
    # The best state is the one with the lowest loss.
    lines = (place / "finished" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    losses = {one["step"]: one["validation/loss"] for one in told
              if "validation/loss" in one}  # fmt: skip
    assert min(losses, key=losses.get) == result["best_step"]


def test_a_run_opens_to_the_model_it_judged(finished):
    directory, result = finished
    run = load_run(directory)
    for merged in (False, True):
        again = judge(
            run, evaluation=run.settings.evaluate, merged=merged, progress=False
        )
        for name, value in numbers(again).items():
            # Merged weights round once more; BLEU counts the same words.
            np.testing.assert_allclose(value, numbers(result)[name], rtol=1e-4)
    kept = run.record.predictions("test")
    assert kept["answer"].shape == kept["loss"].shape
    questions = [
        question
        for question in prepare(run.settings).problem.task.splits["test"].questions
    ]
    said = [row["answer"] for row in predict(run, questions, longest=8)]
    assert said == kept["answer"].tolist()


def test_its_adapter_is_one_for_peft(finished):
    directory, _ = finished
    adapter = read_adapter(directory / "adapter")
    assert len(adapter.corrections) == 2 * 7
    assert any("q_proj" in module for module in adapter.corrections)
    card = (directory / "adapter" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    written = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM"


def test_trials_of_a_pack_are_those_alone(config, place, finished):
    each = [
        read(config(f"seed={seed}", f"optim.lr={lr}", f"run.root={place / 'packed'}"))
        for seed, lr in ((0, 0.02), (1, 0.01))
    ]
    packed = run_pack(each, folder=place / "pack")
    other = run_trial(config("seed=1", "optim.lr=0.01", f"run.root={place / 'alone'}"))
    for one, alone in zip(packed, (finished[1], other), strict=True):
        assert one.error is None
        assert one.result["trial"] == alone["trial"]
        for split in ("validation", "test"):
            for name, value in numbers(alone, split).items():
                # Products of a pack are of another shape.
                found = numbers(one.result, split)[name]
                np.testing.assert_allclose(found, value, rtol=2e-3, atol=2e-3)


def test_a_run_that_was_stopped_ends_like_another(config, place, finished):
    directory = place / "stopped"
    own = (f"run.directory={directory}",)
    with pytest.raises(Preempted):
        run_trial(config(*own, "loop.stop_after=7"))
    again = run_trial(config(*own))
    assert again["state"] == finished[1]["state"]
    assert numbers(again) == numbers(finished[1])


def test_ranks_move_in_language_models(config, place):
    result = run_trial(
        config(
            "ranks=norm", "ranks.max_rank=6", f"run.directory={place / 'moved'}",
            "evaluate.answers=null",
        )
    )  # fmt: skip
    assert numbers(result)["loss"] > 0
    run = load_run(place / "moved")
    assert sum(run.ranks.final.values()) == 4 * 14


def test_a_preview_trains_nothing(config):
    found = run_trial(config("run.preview=true"))
    assert found["step"]["flops"] > 0
    assert len(found["sites"]) == 7


def test_the_sites_of_a_decoder(place):
    found = survey(
        composed("sites", "base=smollm2", f"base.source={place / 'llama'}", "tokens=16")
    )
    paths = {row["path"] for row in found["weights"] if row["adaptable"]}
    assert "decoder/layer/attention/query/kernel" in paths
    with pytest.raises(BadInput, match="65 tokens are more than 64"):
        survey(
            composed(
                "sites", "base=smollm2", f"base.source={place / 'llama'}", "tokens=65"
            )
        )


def test_answers_do_not_depend_on_where_corrections_are(config):
    """Merged or beside the weights, alone or in a pack."""
    prepared = prepare_pack([read(config("seed=0")), read(config("seed=1"))])
    problem, together = prepared.trials[0].problem, prepared.variants.together
    frozen = together.frozen()
    rng = np.random.default_rng(0)
    drawn = [
        jax.tree.map(
            lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), jnp.float32),
            together.init_trained(jax.random.key(seed)),
        )
        for seed in range(2)
    ]
    dials = prepared.variants.dials()
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    questions = problem.task.splits["test"].questions
    speaker = Speaker(problem.base, talk_of(problem.base), questions, tokens=8,
                      together=3)  # fmt: skip
    heard = []
    watched = Speaker(problem.base, talk_of(problem.base), questions, tokens=8,
                      together=3, alive=lambda: heard.append(1))  # fmt: skip
    both = watched.unmerged(together, frozen, stack(*drawn), stack(*dials))
    # A watchdog hears of every batch: answers may take hours.
    assert len(heard) == -(-len(questions) // 3)
    for own, dial, said in zip(drawn, dials, both, strict=True):
        alone = speaker.merged(together.merge(frozen, own, dial))
        assert alone.texts == said.texts
        assert len(said.texts) == len(questions)
    assert both[0].texts != both[1].texts
    base = speaker.merged(problem.base.params)
    assert base.texts != both[0].texts
    # Drawn ones as well: a question's draws are its own.
    draws = lambda count: Speaker(
        problem.base, talk_of(problem.base), questions, tokens=8, together=count,
        choose=sampling(1.5),
    )  # fmt: skip
    many = draws(3).unmerged(together, frozen, stack(*drawn), stack(*dials))
    few = draws(2).merged(together.merge(frozen, drawn[1], dials[1]))
    assert many[1].texts == few.texts
    assert many[1].texts != both[1].texts


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.batching.length=65"], "more than 64"),
        (["data.batching.length=16"], "more than 16"),
        (["delta=head"], "language model has its own"),
        (["base.pooling=cls"], "is for encoders"),
        (["evaluate.answers=0"], "at least 1"),
        (["evaluate.answers=40"], "more than 64"),
        (["evaluate.top_k=3"], "give evaluate.temperature"),
        (["evaluate.temperature=0"], "evaluate.temperature = 0.* must be positive"),
        (["evaluate.temperature=1.0", "evaluate.answers=null"], "nothing is said"),
        (["loop.select=macro_f1"], "no number about tokens"),
        (["data.train_rows=0"], "data.train_rows must be at least 1"),
        (["data.batching.buckets=[8]"], "buckets"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_be_is_said_before_there_is_a_directory(
    config, place, overrides, said
):
    if overrides == ["delta=head"]:
        # Its group has none of the fields that SMALL sets.
        given = config()
        given["delta"] = {"name": "head"}
    elif "buckets" in overrides[0]:
        given = config()
        given["data"]["batching"] = {"buckets": [8]}
    else:
        given = config(*overrides)
    given["run"]["directory"] = str(place / "none")
    with pytest.raises(BadInput, match=said):
        run_trial(given)
    assert not (place / "none").exists()


def test_data_and_base_of_different_kinds(world, config, place):
    with pytest.raises(BadInput, match="decoders are"):
        prepare(read(config(f"base.source={world.base}")))
    with pytest.raises(BadInput, match="as an encoder this loader reads"):
        prepare(read(world.config(f"base.source={place / 'llama'}")))
    with pytest.raises(BadInput, match=r"evaluate\.answers = 8 is for questions"):
        read(world.config("evaluate.answers=8"))


def test_a_run_is_judged_on_more_of_its_own_kind_only(world, config, finished, place):
    run = load_run(finished[0])
    other = {"name": "table", "path": str(world.table)}
    with pytest.raises(BadInput, match="trained on answers"):
        judge(run, evaluation=run.settings.evaluate, data=other)
    lines = ["question,answer"]
    for name in ("x", "y", "z", "the", "a", "one", "two", "this", "big", "small"):
        lines += [f"Say this to a customer {name},{name} is big in red"] * 2
    (place / "own.csv").write_text("\n".join(lines))
    more = {"name": "answers", "path": str(place / "own.csv"), "test_share": 0.4}
    found = judge(run, evaluation=run.settings.evaluate, data=more, progress=False)
    assert found["scores"]["test"]["num_rows"] > 0


def test_a_base_in_a_folder_is_what_the_run_names(config, place):
    prepared = prepare(read(config()))
    assert prepared.base.fingerprint == load(str(place / "llama")).fingerprint
    with pytest.raises(BadInput, match="has no classes"):
        _ = prepared.labeled
