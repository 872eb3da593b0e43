"""Metrics of texts beside sacrebleu's own corpus score, and of tokens beside NumPy."""

import numpy as np
import pytest
import sacrebleu

from lowrank.core.errors import BadInput, NonFinite
from lowrank.evaluate import texts
from lowrank.evaluate.tokens import score_tokens

SAID = [
    "the satellite eurus 65 is a laptop with 4 gb of memory",
    "it runs windows 8 and weighs 2 kg",
    "goodbye",
    "the tecra is a nice laptop for home use",
]
RIGHT = [
    ("the satellite eurus 65 is a laptop for home use with 4 gb of memory",),
    ("it weighs 2 kg and runs windows 8", "it runs windows 8 and its weight is 2 kg"),
    ("goodbye",),
    ("the tecra is an exceptional laptop", "a laptop for home use is the tecra"),
]


def metric(name):
    return next(one for one in texts.text_metrics() if one.name == name)


def whole(name, said=SAID, right=RIGHT):
    own = metric(name)
    sums = texts.terms_of(own, said, right).sum(axis=0)
    return float(own.value(sums, sums))


def test_bleu_of_summed_counts_is_that_of_the_corpus():
    most = max(map(len, RIGHT))
    streams = [[own[min(n, len(own) - 1)] for own in RIGHT] for n in range(most)]
    want = sacrebleu.corpus_bleu(SAID, streams, smooth_method="none").score
    assert whole("bleu") == pytest.approx(want, abs=1e-9)
    assert want > 30


def test_bleu_at_its_ends():
    assert whole("bleu", RIGHT[0], [RIGHT[0]]) == pytest.approx(100.0)
    assert whole("bleu", ["nothing of it"], [RIGHT[0]]) == 0.0
    assert whole("bleu", [""], [RIGHT[0]]) == 0.0


def test_the_means():
    assert whole("exact") == 25.0
    each = [
        sacrebleu.sentence_chrf(s, list(r)).score
        for s, r in zip(SAID, RIGHT, strict=True)
    ]
    assert whole("chrf") == pytest.approx(np.mean(each))
    assert whole("rouge_l", ["a b c d"], [("a c d", "x")]) == pytest.approx(
        100 * 2 * (3 / 4) * 1 / (3 / 4 + 1)
    )


def test_intervals_and_differences():
    found = texts.report(SAID, RIGHT, ["a", "b", "c", "a"], resamples=200)
    assert {*found} == {"bleu", "chrf", "rouge_l", "exact"}
    assert found["bleu"]["num_groups"] == 3
    same = texts.compare(SAID, SAID, RIGHT, resamples=200)
    assert all(one["estimate"] == 0.0 for one in same.values())
    worse = ["laptop"] * len(SAID)
    better = texts.compare(SAID, worse, RIGHT, resamples=200)
    assert better["rouge_l"]["estimate"] > 0
    with pytest.raises(BadInput, match="3 texts have 4"):
        texts.report(SAID[:3], RIGHT)


def test_without_the_libraries_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(texts.importlib, "import_module", missing)
    with pytest.raises(BadInput, match=r"lowrank\[text\]"):
        texts.text_metrics()


def batches():
    rng = np.random.default_rng(0)
    weight = (rng.random((3, 5)) < 0.6).astype(np.float32)
    weight[:, 0] = 1.0
    picked = -rng.random((2, 3, 5)).astype(np.float32)
    correct = (rng.random((2, 3, 5)) < 0.5).astype(np.float32)
    order = np.array([2, 0, 1])
    first = {"weight": weight[order[:2]], "index": order[:2]}
    filled = np.stack([weight[order[2]], np.zeros(5, np.float32)])
    last = {"weight": filled, "index": np.array([1, -1])}
    outputs = [
        {"picked": picked[:, [2, 0]], "correct": correct[:, [2, 0]]},
        {"picked": picked[:, [1, 0]], "correct": correct[:, [1, 0]]},
    ]
    return [first, last], outputs, weight, picked, correct


def test_sums_of_tokens_are_those_of_all_counted_places():
    given, outputs, weight, picked, correct = batches()
    at = {id(batch): out for batch, out in zip(given, outputs, strict=True)}
    found = score_tokens(lambda batch: at[id(batch)], given)
    for trial, own in enumerate(found):
        numbers = own.numbers()
        loss = -(picked[trial] * weight).sum() / weight.sum()
        assert numbers["loss"] == pytest.approx(loss, rel=1e-6)
        assert numbers["perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
        assert numbers["accuracy"] == pytest.approx(
            (correct[trial] * weight).sum() / weight.sum(), rel=1e-6
        )
        report = own.report(["a", "b", "b"], resamples=100)
        assert report["loss"]["estimate"] == pytest.approx(loss, rel=1e-6)
        assert report["loss"]["num_groups"] == 2


def test_what_does_not_count_may_be_anything_and_what_counts_may_not():
    given, outputs, weight, *_ = batches()
    place = np.argwhere(weight[2] == 0)[0, 0]
    outputs[0]["picked"][:, 0, place] = np.nan
    at = {id(batch): out for batch, out in zip(given, outputs, strict=True)}
    assert np.isfinite(score_tokens(lambda b: at[id(b)], given)[0].terms).all()
    outputs[0]["picked"][:, 0, 0] = -np.inf
    broken = score_tokens(lambda b: at[id(b)], given)[0]
    for told in (broken.numbers, broken.report):
        with pytest.raises(NonFinite, match="not finite"):
            told()


def test_a_row_that_is_missing_is_noticed():
    given, outputs, *_ = batches()
    with pytest.raises(BadInput, match="exactly once"):
        score_tokens(lambda batch: outputs[0], given[:1])
