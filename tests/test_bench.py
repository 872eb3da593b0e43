"""The benchmark compares like with like, and says so in numbers that add up."""

import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny_bench import SETTING, tiny_base

from experiments.bench import __main__ as bench
from experiments.bench import child, handwritten, ours, peers, products, report
from experiments.bench.setting import MAPS, Setting, draw_batch
from lowrank.adapt.rules import Rule, Train
from lowrank.core.errors import BadInput
from lowrank.deltas.lora import LoRA
from lowrank.train.losses import cross_entropy

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def arms(base):
    return ours.lora(SETTING, base), handwritten.by_hand(SETTING, base)


def our_loss_and_gradients(base):
    rules = [Train(base.head), Rule(ours.SITES, LoRA(alpha=SETTING.alpha), rank=2)]
    adapted, trained, packed = ours.attached(SETTING, base, rules)
    batch = {name: jnp.asarray(value[0]) for name, value in packed.items()}

    def loss(trained):
        logits = adapted.apply(adapted.frozen(), trained, ours.inputs_of(batch))
        sums = cross_entropy(logits, batch, {"label_smoothing": jnp.float32(0)})
        return sums.loss / sums.weight

    value, grads = jax.value_and_grad(loss)(trained)
    parent = lambda path: path.split("/")[-2]
    maps = {parent(p): g for p, g in grads.items() if p in adapted.sites}
    head = {p.split("/")[-1]: g for p, g in grads.items() if parent(p) == "head"}
    assert set(maps) == set(MAPS)
    return value, {**maps, "head": head}


@pytest.mark.parametrize("product", [handwritten.thin, handwritten.plain])
def test_all_programs_have_the_same_loss_and_gradients(base, product):
    with jax.default_matmul_precision("highest"):
        want_loss, want = our_loss_and_gradients(base)
        loss, (trained, frozen, batch) = handwritten.objective(SETTING, base, product)
        got_loss, got = jax.value_and_grad(loss)(trained, frozen, batch)
    assert abs(got_loss - want_loss) < 1e-5 * want_loss
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        size = float(jnp.abs(one).max())
        assert size > 1e-6, path
        np.testing.assert_allclose(other, one, atol=1e-4 * size, err_msg=str(path))


def test_arms_stay_together_while_they_train(arms):
    losses = np.array([[arm.step() for _ in range(4)] for arm in arms])
    assert losses[0, 3] < losses[0, 0] - 1e-3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_ours_has_the_flops_of_the_handwritten_step(arms):
    mine, theirs = arms
    assert mine.facts["num_trained"] == theirs.facts["num_trained"]
    assert mine.facts["flops"]() <= 1.01 * theirs.facts["flops"]()


def test_the_products_of_a_step_are_timed_one_by_one(monkeypatch, base):
    """All its FLOPs are in the table, and what is left of the step is told."""
    monkeypatch.setattr(products.hub, "load", lambda *args, **more: base)
    found = products.measure(SETTING, rounds=2)
    work = sum(number * product.flops for product, number, _ in found["products"])
    assert work == ours.lora(SETTING, base).facts["flops"]()
    assert found["share"]["median"] > 0
    for product, _, _ in found["products"]:
        assert products.alone(product)().size > 0
    console = Console(file=io.StringIO(), width=100)
    products.show(found, console)
    assert "of the step" in console.file.getvalue()


def test_full_fine_tuning_trains_every_weight(base):
    count = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    assert ours.full(SETTING, base).facts["num_trained"] == count


def test_the_batch_is_padded_as_a_length_bucket_is():
    setting = Setting(batch=64, seq=16)
    batch = draw_batch(setting, 50)
    lengths = batch["mask"][0].sum(axis=1)
    assert lengths.max() == 16
    assert 8 < lengths.min() < 16
    assert (batch["ids"][~batch["mask"]] == 0).all()
    assert (batch["ids"][batch["mask"]] > 0).all()
    assert {name: value.shape[0] for name, value in batch.items()} == dict.fromkeys(
        ("ids", "mask", "label", "weight", "index"), 1
    )


class Counting:
    """An arm that takes no time."""

    facts = {"flops": lambda: 12.0}

    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1
        return 1.0 / self.count


def test_a_child_answers_each_command_with_one_line():
    arm, answers = Counting(), io.StringIO()
    commands = io.StringIO('{"steps": 3}\n{"flops": true}\n{"steps": 1}\n')
    child.serve(arm, commands, answers)
    steps, flops, more = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert steps["losses"] == [1.0, 1 / 2, 1 / 3]
    assert len(steps["seconds"]) == 3
    assert flops["flops"] == 12.0
    assert more["losses"] == [1 / 4]
    assert more["peak_bytes"] > 2**20


def test_a_missing_peer_is_an_error_that_names_the_extra(monkeypatch):
    find = lambda name: None if name == "peft" else types.SimpleNamespace()
    monkeypatch.setattr(peers.importlib.util, "find_spec", find)
    with pytest.raises(BadInput, match=r"needs peft, .*lowrank\[parity\]"):
        peers.require()
    options = bench.parse(["--quick"])
    with pytest.raises(BadInput, match="parity"):
        bench.compare(options)


def test_a_setting_refuses_nonsense():
    with pytest.raises(BadInput, match="rank must be positive"):
        Setting(rank=0)


def test_the_interval_of_a_median_is_the_one_of_the_sign_test():
    # n = 12: the third value from either end covers with probability 0.9614.
    found = report.median_interval([float(v) for v in range(12, 0, -1)])
    assert (found["median"], found["low"], found["high"]) == (6.5, 3.0, 10.0)
    assert found["coverage"] == pytest.approx(1 - 2 * (1 + 12 + 66) / 2**12)
    # n = 3: the extremes, and no pretence of 95 %.
    few = report.median_interval([2.0, 1.0, 3.0])
    assert (few["low"], few["high"], few["coverage"]) == (1.0, 3.0, 0.75)
    assert report.median_interval([1.0])["coverage"] == 0.0


def arm(seconds, peak_bytes=100, flops=10.0, losses=(3.0, 2.0)):
    return {
        "rounds": [[s, s, 50 * s] for s in seconds],
        "losses": list(losses),
        "peak_bytes": peak_bytes,
        "flops": flops,
        "facts": {"compile_seconds": 1.5},
        "idle_cpu_seconds": [0.0],
    }


def shapes():
    arms = {
        "lora": arm([1.0, 2.0, 1.1, 1.0, 1.2, 1.0]),
        "by_hand": arm([1.0, 2.0, 1.1, 1.0, 1.2, 1.0]),
        "peft": arm([2.0, 4.0, 0.5, 2.0, 2.4, 2.0], peak_bytes=90, flops=None),
        "full": arm([3.0] * 6, losses=(9.0, 8.0)),
    }
    shape = {"arms": arms}
    return {"8x32": {**shape, "summary": report.summarize(shape)}}


def test_ratios_are_paired_by_round_and_verdicts_follow_the_interval():
    summary = shapes()["8x32"]["summary"]
    assert summary["ratios"]["lora/by_hand"]["high"] == 1.0
    assert summary["ratios"]["lora/peft"]["median"] == 0.5
    assert summary["arms"]["full"]["spread"] == 0.0
    verdicts = [(b["quantity"], b["limit"], b["verdict"]) for b in summary["bounds"]]
    assert verdicts == [
        ("seconds", 1.03, "met"),
        ("seconds", 1.0, "open"),
        ("seconds", 0.75, "open"),
        ("flops", 1.01, "met"),
        ("peak_bytes", 1.0, "missed"),
    ]
    assert summary["loss_gap"] == 0.0


def test_arms_that_compute_something_else_are_called_out():
    made = shapes()
    made["8x32"]["arms"]["peft"]["losses"] = [3.0, 2.1]
    made["8x32"]["summary"] = report.summarize(made["8x32"])
    assert "cannot be compared" in printed(made)
    assert "cannot be compared" not in printed(shapes())


def printed(made) -> str:
    machine = {**bench.describe(2), "load_after": 0.5}
    out = io.StringIO()
    starts = {"lora": {"cold": 9.0, "cached": 4.0}, "peft": {"cold": 5.0}}
    whole = {"schema": 1, "machine": machine, "shapes": made, "starts": starts}
    json.dumps(whole, allow_nan=False)
    report.show(whole, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_shows_every_arm_every_bound_and_no_markup():
    text = printed(shapes())
    for name in ("lora", "by_hand", "peft", "full"):
        assert report.TITLES[name] in text
    for words in ("seconds lora/by_hand <= 1.03", "missed", "0.500 to 2.200", "9.0"):
        assert words in text
    assert "[red]" not in text


def test_the_command_line_refuses_unknown_arms(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--arms", "lora,keras"])
    assert "keras" in capsys.readouterr().err
